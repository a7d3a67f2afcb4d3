package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// eventFlags are the flags of events.
type eventFlags struct {
	ctlFlags
	export string
	kinds  []string
	count  int
}

// eventKinds are what --kind takes.
var eventKinds = []string{"client-connected", "client-left", "io-error", "slow-request", "stuck-request", "export-state", "export-poisoned", "threshold", "reloaded", "lost"}

func newEvents() *cobra.Command {
	f := &eventFlags{}
	c := f.reading(&cobra.Command{
		Use:   "events",
		Short: "Follow what happens",
		Long: `Follow what happens, a line for each event, until it is interrupted or the
daemon ends: clients that come and leave, states of exports, I/O errors. An
event of the kind lost says that this command was too slow for some.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if f.count < 0 {
				return usage("--count cannot be negative")
			}
			for _, k := range f.kinds {
				if !slices.Contains(eventKinds, k) {
					return usage("--kind: %q is none of %s", k, strings.Join(eventKinds, ", "))
				}
			}
			return told(f.follow(c))
		},
	})
	n := c.Flags()
	n.StringVar(&f.export, "export", "", "only those of the export called `NAME`")
	n.StringSliceVar(&f.kinds, "kind", nil, "only those of these `KINDS`, with commas between: "+strings.Join(eventKinds, ", "))
	n.IntVar(&f.count, "count", 0, "end after `N` events")
	flagWords(c, "kind", eventKinds...)
	_ = c.RegisterFlagCompletionFunc("export", f.exportNames) // the flag is there
	return c
}

// errDaemonEnded is the end of a stream that nobody here asked for.
var errDaemonEnded = errors.New("the daemon has ended the events")

// follow prints events. That the user interrupts it is no failure.
func (f *eventFlags) follow(c *cobra.Command) error {
	cl, err := f.dial()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	seq, err := cl.Events(ctx)
	if c.Context().Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	only := c.Flags().Changed("export")
	printed := 0
	for e, err := range seq {
		if errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		wanted := (!only || e.Export == f.export) && (len(f.kinds) == 0 || slices.Contains(f.kinds, e.Kind))
		if e.Kind != "lost" && !wanted {
			continue
		}
		if err := f.printEvent(c.OutOrStdout(), e); err != nil {
			return err
		}
		if printed++; printed == f.count {
			return nil
		}
	}
	if c.Context().Err() != nil {
		return nil
	}
	return errDaemonEnded
}

// printEvent writes one line at once.
func (f *eventFlags) printEvent(w io.Writer, e api.Event) error {
	if f.json {
		j := json.NewEncoder(w)
		j.SetEscapeHTML(false)
		return j.Encode(e)
	}
	var b strings.Builder
	b.WriteString(stamp(e.Time) + " " + shown(e.Kind))
	if e.Export != "" {
		b.WriteString(" export=" + shown(e.Export))
	}
	if e.Client != 0 {
		fmt.Fprintf(&b, " client=%d", e.Client)
	}
	if e.State != "" {
		b.WriteString(" state=" + shown(e.State))
	}
	if e.Lost != 0 {
		fmt.Fprintf(&b, " lost=%d", e.Lost)
	}
	if e.Text != "" {
		b.WriteString(": " + visible(e.Text))
	}
	_, err := fmt.Fprintln(w, b.String())
	return err
}

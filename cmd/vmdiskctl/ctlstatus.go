package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

func newStatus() *cobra.Command {
	f := &ctlFlags{}
	return f.reading(&cobra.Command{
		Use:   "status",
		Short: "Show the daemon as a whole",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				s, err := cl.Status(ctx)
				if err != nil {
					return err
				}
				if f.json {
					return writeJSON(c.OutOrStdout(), s)
				}
				return printStatus(c.OutOrStdout(), s)
			})
		},
	})
}

func printStatus(w io.Writer, s api.Status) error {
	p := &printer{w: w}
	p.print("version: %s\npid: %d\nstarted: %s\nengine: %s\n", shown(s.Version), s.PID, stamp(s.Started), shown(s.Engine))
	if s.Config != "" {
		p.print("config: %s\n", shown(s.Config))
	}
	p.print("exports: %d\nclients: %d\n", s.Exports, s.Clients)
	p.list("listeners", s.Listeners)
	p.sums("memory", s.Memory)
	p.controls(s.Security)
	if len(s.Notes) > 0 {
		p.print("notes:\n")
	}
	for _, k := range slices.Sorted(maps.Keys(s.Notes)) {
		p.print("  %s: %s\n", visible(k), visible(s.Notes[k]))
	}
	return p.err
}

// controls prints what confines the daemon, a line for each.
func (p *printer) controls(all []api.Control) {
	if len(all) > 0 {
		p.print("security:\n")
	}
	for _, c := range all {
		why := ""
		if c.Reason != "" {
			why = ", " + visible(c.Reason)
		}
		p.print("  %s: %s%s\n", shown(c.Name), shown(c.State), why)
	}
}

// list prints texts of the daemon, a line for each.
func (p *printer) list(title string, all []string) {
	if len(all) > 0 {
		p.print("%s:\n", title)
	}
	for _, s := range all {
		p.print("  %s\n", shown(s))
	}
}

// sums prints bytes by what they are for.
func (p *printer) sums(title string, of map[string]int64) {
	if len(of) > 0 {
		p.print("%s:\n", title)
	}
	for _, k := range slices.Sorted(maps.Keys(of)) {
		p.print("  %s: %s\n", shown(k), roundSize(of[k]))
	}
}

// roundSize is a size in the largest unit of which it has one, for people.
func roundSize(n int64) string {
	unit, v := 0, float64(n)
	for v >= 1024 && unit < len(suffixes)-1 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprint(n)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + suffixes[unit:unit+1]
}

func newReload() *cobra.Command {
	f := &ctlFlags{}
	return f.changing(&cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read its configuration again",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
				r, err := cl.Reload(ctx, f.dryRun)
				if err != nil {
					return err
				}
				lines := make([]string, 0, len(r.Changes))
				for _, s := range r.Changes {
					lines = append(lines, visible(s))
				}
				if len(lines) == 0 {
					lines = append(lines, "no changes")
				}
				return f.did(c, r, "%s", strings.Join(lines, "\n"))
			})
		},
	})
}

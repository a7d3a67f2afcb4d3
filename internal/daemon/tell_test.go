package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// full is a listener of a process without descriptors, until it is closed.
type full struct {
	transport.Listener
	failures int
}

func (f *full) Addr() string { return "here" }

func (f *full) Accept(context.Context) (transport.Conn, error) {
	if f.failures--; f.failures < 0 {
		return nil, net.ErrClosed
	}
	return nil, errors.New("too many open files")
}

func TestFailuresToAcceptAreSaidOnce(t *testing.T) {
	var said bytes.Buffer
	d := &daemon{ctx: t.Context(), log: slog.New(slog.NewTextHandler(&said, nil))}
	f := &full{failures: 5}
	d.acceptLoop(&door{Listener: f})
	if n := strings.Count(said.String(), "too many open files"); n != 1 || f.failures != -1 {
		t.Errorf("said %d times, %d failures left:\n%s", n, f.failures, said.String())
	}
}

// TestPoisonedExportIsAnEventAndALine: the image of an export says so by itself, and
// the line of the log what is to be done. The record of an image ends when another is
// opened, whatever is told of it after that.
func TestPoisonedExportIsAnEventAndALine(t *testing.T) {
	var said bytes.Buffer
	d := &daemon{log: slog.New(slog.NewTextHandler(&said, nil))}
	sub, err := d.bus.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	k := &disk{cfg: config.Export{Name: "a"}}
	if err := d.disks.claim(k); err != nil {
		t.Fatal(err)
	}
	old := d.watch("a", new(poison))
	k.poison = new(poison)
	poisoned, gone := d.watch("a", k.poison), &backing.Error{Op: "flush", Off: -1, Kind: backing.ErrPoisoned, Err: errors.New("gone")}
	old(errors.New("closed too late"))
	if h := d.disks.healthOf(k); h != (health{}) {
		t.Errorf("after the one before was lost: got %+v, want it well", h)
	}
	said.Reset()
	poisoned(gone)
	poisoned(errors.New("gone for long"))
	if h := d.disks.healthOf(k); h != (health{poisoned: gone}) {
		t.Errorf("got %+v, want it poisoned by %v", h, gone)
	}
	if got := said.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "export=a") || !strings.Contains(got, "check the image") {
		t.Errorf("log: got %q, want one line", got)
	}
	e, _, err := sub.Next(t.Context())
	if err != nil || len(e) == 0 || e[0].Kind != obs.ExportPoisoned || e[0].Export != "a" {
		t.Errorf("events %+v, %v", e, err)
	}
}

// TestLastEventOfAnExportIsItsState: whoever follows the events knows what the list
// of exports says, of those that fail too.
func TestLastEventOfAnExportIsItsState(t *testing.T) {
	d := emptyService(t)
	d.tellStates()
	sub, err := d.bus.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	missing := func(name string) config.Export {
		x := config.Export{Name: name, Format: "raw", Image: filepath.Join(t.TempDir(), "none")}
		x.SetDefaults()
		return x
	}
	there := config.Export{Name: "mem", Format: "mem", Image: "1M"}
	there.SetDefaults()
	last := map[string]string{}
	s := service{d}
	remove := func(name string) func() error {
		return func() error { return s.Remove(t.Context(), name, true) }
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"add one without an image", func() error {
			if err := d.addExport(t.Context(), missing("added"), fromAPI, nil); err == nil {
				return errors.New("it was added")
			}
			return nil
		}},
		{"start with one without an image", func() error { d.tryDisk(&disk{cfg: missing("none"), origin: fromAPI}); return nil }},
		{"start with one that hangs", func() error {
			d.giveUp(&disk{cfg: there, origin: fromAPI, failed: errNoAnswer})
			return nil
		}},
		{"try them again", func() error { d.retry(t.Context(), func(error) bool { return true }); return nil }},
		{"pause", func() error { return s.Pause(t.Context(), "mem", time.Minute) }},
		{"resume", func() error { return s.Resume("mem") }},
		{"pause again", func() error { return s.Pause(t.Context(), "mem", time.Minute) }},
		{"lose a write meanwhile", func() error { d.watch("mem", d.disks.get("mem").poison)(backing.ErrPoisoned); return nil }},
		{"resume what has lost a write", func() error { return s.Resume("mem") }},
		{"remove what failed", remove("none")},
		{"remove what is ready", remove("mem")},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		d.bus.Publish(obs.Event{Kind: obs.Reloaded}) // there is one at least
		events, _, err := sub.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.Kind == obs.ExportState {
				last[e.Export] = e.Reason
			}
		}
		listed := map[string]string{}
		for name := range last {
			listed[name] = "closed"
		}
		for _, x := range s.Exports() {
			listed[x.Name] = x.State
		}
		if !maps.Equal(last, listed) {
			t.Errorf("after %s: the last events are %v, the list has %v", step.what, last, listed)
		}
	}
	if len(last) != 3 || last["none"] != "closed" {
		t.Errorf("the last events are %v, want three exports that are closed", last)
	}
}

// TestStatesHaveTheNamesOfTheAPI: a client knows no others.
func TestStatesHaveTheNamesOfTheAPI(t *testing.T) {
	for state, want := range map[export.State]string{
		export.Opening: api.StateOpening, export.Ready: api.StateReady, export.Failed: api.StateFailed, export.Draining: api.StateDraining,
	} {
		if string(state) != want {
			t.Errorf("got %q, want %q", state, want)
		}
	}
}

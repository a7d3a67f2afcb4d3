package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestWhatGoesIsRemovedWhenItsClientsHaveLeft, also if that is after the end of
// the reload; the name is free then.
func TestWhatGoesIsRemovedWhenItsClientsHaveLeft(t *testing.T) {
	var said strings.Builder
	d := &daemon{exports: export.NewRegistry(), stopping: t.Context(), log: slog.New(slog.NewTextHandler(&said, nil))}
	x := config.Export{Name: "a"}
	k := &disk{cfg: x, stack: &stack{}}
	if err := d.disks.claim(k); err != nil {
		t.Fatal(err)
	}
	if err := d.exports.Add(export.Spec{Name: "a", Owner: k, Device: mem.New(1, nil)}); err != nil {
		t.Fatal(err)
	}
	client, err := d.exports.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.retire(over, k, nil); err != nil {
		t.Errorf("retire: %v", err)
	}
	if d.disks.get("a") == nil {
		t.Error("an export in use was forgotten")
	}
	client.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.closing.Wait()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("the export is never removed")
	}
	if d.disks.get("a") != nil || d.exports.Len() != 0 {
		t.Errorf("the export is still there: %v", d.exports.Status())
	}
	if got := said.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "when its clients have left") {
		t.Errorf("log: got %q, want one line", got)
	}
}

// TestReloadThatComesTooLateDoesNothing: what stops opens no sockets any more.
func TestReloadThatComesTooLateDoesNothing(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	d := &daemon{exports: export.NewRegistry(), stopping: over}
	c := &config.Config{Groups: map[string]config.Rate{"g": {Ops: 1}}}
	if _, err := d.apply(over, c, config.Diff(&config.Config{}, c), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if d.groups.find("g") != nil || d.conf.Load() != nil {
		t.Error("the configuration was applied")
	}
}

// emptyService is a service that serves nothing yet, and needs no engine.
func emptyService(t *testing.T) *daemon {
	logs, err := obs.Open(obs.Options{Sink: "null"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(logs.Close)
	d := &daemon{exports: export.NewRegistry(), stopping: t.Context(), logs: logs, log: logs.For("daemon")}
	d.conf.Store(&config.Config{})
	return d
}

// TestRemovedExportIsNotTriedAgain: neither what failed and is removed while it is
// about to be tried, nor what a reload has closed to open it anew. The others are.
func TestRemovedExportIsNotTriedAgain(t *testing.T) {
	d := emptyService(t)
	for _, name := range []string{"a", "b"} {
		x := config.Export{Name: name, Format: "mem", Image: "1M"}
		x.SetDefaults()
		if err := d.disks.claim(&disk{cfg: x, origin: fromAPI, failed: backing.ErrLocked}); err != nil {
			t.Fatal(err)
		}
	}
	asked := 0
	d.retry(t.Context(), func(error) bool {
		if asked++; asked == 2 {
			if err := d.removeFailed(t.Context(), d.disks.get("b"), "b"); err != nil {
				t.Errorf("removal: %v", err)
			}
		}
		return true
	})
	if k := d.disks.find("a"); k == nil || k.again != nil || len(d.disks.failed()) != 0 {
		t.Errorf("the other is %+v, want it open and nothing to be failed", k)
	}
	if k := d.disks.get("b"); k != nil {
		t.Errorf("what was removed is there again: %+v", k)
	}
	k := d.disks.get("a")
	_, back, err := d.closeFor(t.Context(), k, d.likeness(k))
	if err == nil {
		err = d.removeFailed(t.Context(), d.disks.get("a"), "a")
	}
	if err != nil {
		t.Fatal(err)
	}
	back()
	if k := d.disks.get("a"); k != nil || d.exports.Len() != 0 {
		t.Errorf("what was removed when it was closed is there again: %+v", k)
	}
}

// TestAttemptThatFailsLeavesTheNameToWhatFailed before, with the new reason.
func TestAttemptThatFailsLeavesTheNameToWhatFailed(t *testing.T) {
	d := emptyService(t)
	x := config.Export{Name: "a", Format: "raw", Image: filepath.Join(t.TempDir(), "none")}
	x.SetDefaults()
	if err := d.disks.claim(&disk{cfg: x, origin: fromState, failed: backing.ErrLocked}); err != nil {
		t.Fatal(err)
	}
	if got := d.retry(t.Context(), func(error) bool { return true }); !slices.Equal(got, []string{"a"}) {
		t.Errorf("tried %q, want a", got)
	}
	k := d.disks.get("a")
	if k == nil || k.origin != fromState || k.again != nil || k.inPlaceOf != nil || !errors.Is(k.failed, os.ErrNotExist) {
		t.Errorf("got %+v, want the export with the reason %v", k, os.ErrNotExist)
	}
}

// TestLostListenerLeavesItsPlaceToTheNext of its URI, which can be found as the
// configuration has it then.
func TestLostListenerLeavesItsPlaceToTheNext(t *testing.T) {
	d := emptyService(t)
	one := config.Listener{URI: "nbd://127.0.0.1:0"}
	d.conf.Store(&config.Config{Listeners: []config.Listener{one, one}})
	var places []config.Place
	var open [][]*door
	for place, l := range d.conf.Load().Shared() {
		list, err := d.share(t.Context(), place, *l)
		if err != nil {
			t.Fatal(err)
		}
		defer d.closeDoors(list)
		places, open = append(places, place), append(open, list)
	}
	d.closeDoors(d.doors.sharedAt(places[0]))
	d.lose(places[0])
	if got := d.doors.sharedAt(places[0]); !slices.Equal(got, open[1]) || len(d.conf.Load().Listeners) != 1 {
		t.Errorf("at the first place are %d doors, of %d listeners of the configuration, want those of the second, and one", len(got), len(d.conf.Load().Listeners))
	}
	if got := d.doors.sharedAt(places[1]); len(got) > 0 {
		t.Errorf("at the second place are %d doors, want none", len(got))
	}
}

// TestEventOfAReloadIsALine that clients take, however much has changed.
func TestEventOfAReloadIsALine(t *testing.T) {
	d := readyService(t)
	var text strings.Builder
	const n = 3000
	for i := range n {
		fmt.Fprintf(&text, "[[export]]\nname = \"%d\"\nformat = \"mem\"\nimage = \"1M\"\n", i)
	}
	d.cfg.File = filepath.Join(t.TempDir(), "conf")
	for _, text := range []string{"", text.String()} {
		if err := os.WriteFile(d.cfg.File, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if text == "" {
			c, err := config.Load(d.cfg.File)
			if err != nil {
				t.Fatal(err)
			}
			d.conf.Store(c)
		}
	}
	sub, err := d.bus.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	r, err := service{d}.Reload(t.Context(), false)
	if err != nil || len(r.Changes) != n {
		t.Fatalf("reload: %d changes, %v, want %d", len(r.Changes), err, n)
	}
	events, _, err := sub.Next(t.Context())
	if err != nil || len(events) == 0 {
		t.Fatalf("events %+v, %v", events, err)
	}
	last := events[len(events)-1]
	line, err := json.Marshal(eventsOf([]obs.Event{last}, 0)[0])
	if err != nil || len(line) >= limits.ControlEventLine {
		t.Errorf("the event has %d bytes, %v, want less than %d", len(line), err, limits.ControlEventLine)
	}
	if !strings.HasPrefix(last.Reason, "3000 changes: ") || !strings.Contains(last.Reason, r.Changes[0]) || !strings.HasSuffix(last.Reason, "; and 2980 more") {
		t.Errorf("the text of the event is %q", last.Reason)
	}
}

// TestReloadShowsNothingEarlyWhereItNarrows: until a reload is over, what it adds or
// changes cannot be opened at listeners that show it no more then, change otherwise, or
// go. Afterwards each shows what it shall, also if the reload has failed.
func TestReloadShowsNothingEarlyWhereItNarrows(t *testing.T) {
	d := readyService(t)
	d.ctx = t.Context()
	t.Cleanup(func() {
		d.closeDoors(d.doors.all())
		d.accepted.Wait()
	})
	dir := t.TempDir()
	d.cfg.File = filepath.Join(dir, "conf")
	listener := func(name, more string) string {
		return fmt.Sprintf("[[listener]]\nuri = \"nbd+unix:///?socket=%s\"\n%s\n", filepath.Join(dir, name), more)
	}
	exported := func(name, more string) string {
		return fmt.Sprintf("[[export]]\nname = %q\nformat = \"mem\"\nimage = \"1M\"\n%s\n", name, more)
	}
	reload := func(conf ...string) error {
		if err := os.WriteFile(d.cfg.File, []byte(strings.Join(conf, "")), 0o600); err != nil {
			return err
		}
		_, err := service{d}.Reload(t.Context(), false)
		return err
	}
	if err := os.WriteFile(d.cfg.File, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	empty, err := config.Load(d.cfg.File)
	if err != nil {
		t.Fatal(err)
	}
	d.conf.Store(empty)
	if err := reload(listener("narrowed", ""), listener("turned", `exports = ["b", "a"]`), listener("altered", ""), listener("removed", ""),
		exported("a", ""), exported("b", ""), exported("c", "")); err != nil {
		t.Fatal(err)
	}
	doors := func() map[string]*transport.Peer { // who comes in by the listeners that are open
		all := map[string]*transport.Peer{}
		for _, o := range d.doors.all() {
			all[filepath.Base(o.Addr())] = &transport.Peer{Kind: transport.Unix, Scope: &o.scope}
		}
		return all
	}
	// want says of each listener which of the exports s, a, b and the empty name it opens.
	want := func(when string, want map[string]string) {
		t.Helper()
		got := map[string]string{}
		for at, peer := range doors() {
			for _, name := range []string{"s", "a", "b", ""} {
				x, err := d.exports.Open(t.Context(), name, peer)
				if err != nil {
					continue
				}
				x.Close()
				got[at] += cmp.Or(name, "="+x.Name)
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: the listeners open %q, want %q", when, got, want)
		}
	}
	d.exports.Changed = func(name string, _ export.State) { // c is opened anew when s is there, and again before s is taken back
		for at, peer := range doors() {
			if name != "c" || at == "new" {
				continue
			}
			if x, err := d.exports.Open(t.Context(), "s", peer); err == nil {
				x.Close()
				t.Errorf("while c changes, listener %q opens s", at)
			}
		}
	}
	before := map[string]string{"narrowed": "ab=a", "turned": "ab=b", "altered": "ab=a", "removed": "ab=a"}
	want("before", before)
	for _, tt := range []struct {
		altered string
		fails   bool
		after   map[string]string
	}{
		{`owner = "no-such-user"`, true, before},
		{`mode = "0660"`, false, map[string]string{"narrowed": "b=b", "turned": "a=a", "altered": "sab=a", "new": "s=s"}},
	} {
		k := d.disks.find("b")
		k.busy.Lock() // the reload changes b when it has opened s
		done := make(chan error, 1)
		go func() {
			done <- reload(listener("narrowed", `exports = ["b"]`), listener("turned", `exports = ["a"]`), listener("altered", tt.altered), listener("new", `exports = ["s"]`),
				exported("a", ""), exported("b", `description = "changed"`), exported("c", "readonly = true"), exported("s", ""))
		}()
		eventually(t, "the new export is open", func() bool {
			state, _ := d.exports.StateOf("s")
			return state == export.Ready || len(done) > 0
		})
		want("meanwhile, with "+tt.altered, map[string]string{"narrowed": "ab=a", "turned": "a", "altered": "a=a", "removed": "a=a", "new": "s=s"})
		k.busy.Unlock()
		if err := <-done; (err != nil) != tt.fails {
			t.Fatalf("with %s: %v", tt.altered, err)
		}
		want("after that", tt.after)
	}
}

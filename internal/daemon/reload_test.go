package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// TestWhatGoesIsRemovedWhenItsClientsHaveLeft, also if that is after the end of
// the reload; the name is free then.
func TestWhatGoesIsRemovedWhenItsClientsHaveLeft(t *testing.T) {
	var said strings.Builder
	d := &daemon{exports: export.NewRegistry(), stopping: t.Context(), log: slog.New(slog.NewTextHandler(&said, nil))}
	x := config.Export{Name: "a"}
	if err := d.disks.claim(&disk{cfg: x, stack: &stack{}}); err != nil {
		t.Fatal(err)
	}
	if err := d.exports.Add(export.Spec{Name: "a", Device: mem.New(1, nil)}); err != nil {
		t.Fatal(err)
	}
	client, err := d.exports.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	d.retire(over, "a", nil)
	if d.disks.get("a") == nil {
		t.Error("an export in use was forgotten")
	}
	client.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.accepted.Wait()
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
	d := &daemon{stopping: over}
	c := &config.Config{Groups: map[string]config.Rate{"g": {Ops: 1}}}
	if err := d.apply(over, c, config.Diff(&config.Config{}, c)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if d.groups.find("g") != nil || d.conf.Load() != nil {
		t.Error("the configuration was applied")
	}
}

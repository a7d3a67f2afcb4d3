package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// TestWhoHasLeftChangesNothing: neither while another changes the export, nor when it
// is done; nor does a reload wait for its turn whose caller has left.
func TestWhoHasLeftChangesNothing(t *testing.T) {
	p := layer.NewPause(mem.New(4096, nil))
	d := &daemon{exports: export.NewRegistry(), stopping: t.Context()}
	d.conf.Store(&config.Config{})
	k := &disk{cfg: config.Export{Name: "a"}, stack: &stack{top: p, pause: p}}
	if err := errors.Join(d.disks.claim(k), d.exports.Add(export.Spec{Name: "a", Owner: k, Device: p})); err != nil {
		t.Fatal(err)
	}
	s, text := service{d}, "changed"
	asked := map[string]func(context.Context) error{
		"set": func(ctx context.Context) error {
			_, err := s.Patch(ctx, "a", api.Patch{Description: &text})
			return err
		},
		"resize":   func(ctx context.Context) error { _, err := s.Resize(ctx, "a", api.Resize{Size: 8192}); return err },
		"snapshot": func(ctx context.Context) error { _, err := s.Snapshot(ctx, "a", api.Snapshot{}, nil); return err },
		"pause":    func(ctx context.Context) error { return s.Pause(ctx, "a", time.Minute) },
		"remove":   func(ctx context.Context) error { return s.Remove(ctx, "a", true) },
		"reload":   func(ctx context.Context) error { _, err := s.Reload(ctx, false); return err },
		"forget":   func(ctx context.Context) error { _, err := s.Forget(ctx, "a", true, false); return err },
	}
	k.busy.Lock()
	d.reloading.Lock()
	for what, ask := range asked {
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { left <- ask(ctx) }()
		leave()
		select {
		case err := <-left:
			if err == nil {
				t.Errorf("%s was done for nobody", what)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s waits for its turn although its caller has left", what)
		}
	}
	d.reloading.Unlock()
	k.busy.Unlock()
	if x, err := s.Export("a"); err != nil || x.Description != "" || x.Size != 4096 || x.State != string(export.Ready) {
		t.Errorf("afterwards: got %+v, %v, want the export as it was", x, err)
	}
	if err := s.Remove(t.Context(), "a", true); err != nil {
		t.Errorf("remove by who stays: %v", err)
	}
}

package daemon

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// stuckWrite has writes wait until the gate is open.
type stuckWrite struct {
	backing.Device
	gate chan struct{}
}

func (s stuckWrite) WriteAt(context.Context, []byte, int64, backing.Flags) error {
	<-s.gate
	return nil
}

// stuck is a daemon with the export a, which has a write that ends when the gate is
// open.
func stuck(t *testing.T) (d *daemon, p *layer.Pause, gate chan struct{}) {
	t.Helper()
	gate = make(chan struct{})
	p = layer.NewPause(stuckWrite{mem.New(4096, nil), gate})
	d = &daemon{exports: export.NewRegistry()}
	k := &disk{cfg: config.Export{Name: "a"}, stack: &stack{top: p, pause: p}}
	if err := errors.Join(d.disks.claim(k), d.exports.Add(export.Spec{Name: "a", Owner: k, Device: p})); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.WriteAt(context.Background(), make([]byte, 512), 0, 0) }()
	synctest.Wait()
	return d, p, gate
}

// TestRemovalEndsAPauseThatHasBegun: one that waits for a request holds up neither
// the last flush nor the end.
func TestRemovalEndsAPauseThatHasBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, p, gate := stuck(t)
		defer close(gate)
		paused := make(chan error, 1)
		go func() { paused <- service{d}.Pause(context.Background(), "a", time.Minute) }()
		synctest.Wait()
		if !p.Paused() {
			t.Fatal("the pause has not begun")
		}
		if err := d.removeExport(t.Context(), d.disks.get("a"), nil); err != nil {
			t.Errorf("removal: %v", err)
		}
		wantCode(t, "pause", <-paused, api.CodeTimeout)
	})
}

// TestPauseThatFailsIsNone: there is nothing to resume.
func TestPauseThatFailsIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _, gate := stuck(t)
		defer close(gate)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantCode(t, "pause", service{d}.Pause(ctx, "a", time.Minute), api.CodeTimeout)
		wantCode(t, "resume", service{d}.Resume("a"), api.CodeInvalid)
	})
}

func wantCode(t *testing.T, what string, err error, code string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: got %v, want an error with code %s", what, err, code)
	}
}

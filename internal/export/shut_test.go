package export

import (
	"context"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
)

// slowFlush is a disk whose flush takes until proceed is closed, and fails.
type slowFlush struct {
	backing.Device
	flushing, proceed chan struct{}
	err               error
}

func (s *slowFlush) Flush(context.Context) error {
	close(s.flushing)
	<-s.proceed
	return s.err
}

// TestRemovalsOfOneExportEndTogether: nobody is told that the disk is closed
// while it is flushed, and all are told how that ended.
func TestRemovalsOfOneExportEndTogether(t *testing.T) {
	r := NewRegistry()
	d := &slowFlush{mem.New(4096, nil), make(chan struct{}), make(chan struct{}), errors.New("no flush")}
	add(t, r, Spec{Name: "a", Device: d})
	e := r.byName["a"]
	removed := make(chan error, 1)
	go func() { removed <- r.Remove(context.Background(), "a", nil, true) }()
	<-d.flushing
	hasty, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Remove(hasty, "a", nil, true); !errors.Is(err, ErrInUse) || !errors.Is(err, context.Canceled) {
		t.Errorf("a second removal that may not wait: got %v, want ErrInUse", err)
	}
	select {
	case err := <-removed:
		t.Errorf("during the flush: the removal ended with %v", err)
	default:
	}
	close(d.proceed)
	if err := <-removed; !errors.Is(err, d.err) {
		t.Errorf("removal: got %v, want %v", err, d.err)
	}
	if err := r.shut(t.Context(), e); !errors.Is(err, d.err) {
		t.Errorf("one that has waited for it: got %v, want %v", err, d.err)
	}
	if n := r.Len(); n != 0 {
		t.Errorf("exports afterwards: got %d, want 0", n)
	}
}

package qcow2_test

import (
	"context"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// left is a file whose reader gives up in the middle of a read, which goes on
// as one of the page cache does.
type left struct {
	*storetest.Mem
	leave func() // may be nil

}

func (l *left) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if l.leave != nil {
		l.leave()
	}
	return l.Mem.ReadAt(context.WithoutCancel(ctx), p, off)
}

// TestOpeningEndsWhenTheCallerHasLeft: it is no fault of the image.
func TestOpeningEndsWhenTheCallerHasLeft(t *testing.T) {
	b := made(t, "cluster_size=64k", "64M", written)
	for _, readOnly := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		o := quiet()
		o.ReadOnly = readOnly
		if _, err := qcow2.Open(ctx, storetest.New(b), o); !errors.Is(err, context.Canceled) || errors.Is(err, backing.ErrIO) {
			t.Errorf("open, read-only %v: got %v, want %v alone", readOnly, err, context.Canceled)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := qcow2.Open(ctx, &left{Mem: storetest.New(b), leave: cancel}, quiet()); !errors.Is(err, context.Canceled) || errors.Is(err, backing.ErrIO) {
		t.Errorf("open that is given up meanwhile: got %v, want %v alone", err, context.Canceled)
	}
}

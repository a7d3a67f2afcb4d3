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
	reads int    // since then
}

func (l *left) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if l.leave != nil {
		l.leave()
		l.reads++
	}
	return l.Mem.ReadAt(context.WithoutCancel(ctx), p, off)
}

// TestSpansEndWhenTheirReaderHasLeft: between two tables, two parts of one, and
// two entries that name none.
func TestSpansEndWhenTheirReaderHasLeft(t *testing.T) {
	for name, b := range map[string][]byte{
		"tables": made(t, "cluster_size=4k", "64M", "write -q -P 1 0 64k", "write -q -P 1 32M 64k"),
		"parts":  made(t, "cluster_size=2M", "64G", written, "write -q -P 1 40G 64k"),
		"holes":  made(t, "cluster_size=512", "64M", written),
	} {
		t.Run(name, func(t *testing.T) {
			st := &left{Mem: storetest.New(b)}
			m, err := qcow2.OpenImage(t.Context(), st, quiet())
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			ctx, cancel := context.WithCancel(t.Context())
			st.leave = cancel
			off := int64(0)
			err = m.Spans(ctx, 0, m.Size(), func(s qcow2.Span) bool { off += s.Len; return true })
			if !errors.Is(err, context.Canceled) || errors.Is(err, backing.ErrIO) {
				t.Errorf("spans: got %v, want %v alone", err, context.Canceled)
			}
			if st.reads > 1 || off > m.Size()/2 {
				t.Errorf("%d reads were made and spans of %d bytes yielded", st.reads, off)
			}
		})
	}
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

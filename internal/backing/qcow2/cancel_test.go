package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
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

// leaver is a file whose writer gives up while its n-th operation waits: that one is
// not made, unless it has to be.
type leaver struct {
	*storetest.Mem
	left  atomic.Int64 // operations until then
	leave func()
}

func (l *leaver) count() {
	if l.left.Add(-1) == 0 {
		l.leave()
	}
}

func (l *leaver) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	l.count()
	return l.Mem.ReadAt(ctx, p, off)
}

func (l *leaver) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	l.count()
	return l.Mem.WriteAt(ctx, p, off, durable)
}

func (l *leaver) Zero(ctx context.Context, off, n int64) error {
	l.count()
	return l.Mem.Zero(ctx, off, n)
}

func (l *leaver) Punch(ctx context.Context, off, n int64) error {
	l.count()
	return l.Mem.Punch(ctx, off, n)
}

// The range that writers who leave want to change, of 1 MiB.
const leaverSize, leaverBlock, leaverOff, leaverLen = 1 << 20, 512, 4096 + 512, 128<<10 + 7*512

// TestWriterWhoLeavesAtAnyOperationLeavesADiskThatIsWhole: a write has happened or
// not, block by block, all else is untouched, and the image has no fault and takes
// all that the next writer has.
func TestWriterWhoLeavesAtAnyOperationLeavesADiskThatIsWhole(t *testing.T) {
	image := made(t, "cluster_size=4k", "1M", "write -q -P 65 0 256k", "snapshot s", "write -q -P 66 64k 64k")
	write := func(f backing.Flags) func(context.Context, backing.Device) error {
		return func(ctx context.Context, d backing.Device) error {
			return d.WriteAt(ctx, bytes.Repeat([]byte{'N'}, leaverLen), leaverOff, f)
		}
	}
	zero := func(ctx context.Context, d backing.Device) error {
		return d.Zero(ctx, leaverOff, leaverLen, backing.NoHole)
	}
	for name, tt := range map[string]struct {
		do   func(context.Context, backing.Device) error
		fill byte
	}{
		"write":         {write(0), 'N'},
		"durable write": {write(backing.FUA), 'N'},
		"zero":          {zero, 0},
	} {
		t.Run(name, func(t *testing.T) {
			for n := 1; leaveAt(t, image, n, tt.do, tt.fill); n++ {
			}
		})
	}
}

// leaveAt has a writer give up at operation n of a change that fills the range; it
// reports whether there was one.
func leaveAt(t *testing.T, image []byte, n int, do func(context.Context, backing.Device) error, fill byte) bool {
	t.Helper()
	st := &leaver{Mem: storetest.New(image)}
	d, err := qcow2.Open(t.Context(), st, quiet())
	if err != nil {
		t.Fatal(err)
	}
	before, after := make([]byte, leaverSize), make([]byte, leaverSize)
	if err := d.ReadAt(t.Context(), before, 0); err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, st.leave = context.WithCancel(t.Context())
	defer st.leave()
	st.left.Store(int64(n))
	err = do(ctx, d)
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Fatalf("operation %d: got %v", n, err)
	}
	left := st.left.Swap(0) <= 0
	if err := d.ReadAt(t.Context(), after, 0); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < leaverSize; at += leaverBlock {
		b := after[at : at+leaverBlock]
		within := at >= leaverOff && at < leaverOff+leaverLen
		if within && bytes.Count(b, []byte{fill}) == leaverBlock {
			continue
		}
		if within && err == nil || !bytes.Equal(b, before[at:at+leaverBlock]) {
			t.Fatalf("operation %d, %v: the disk has %q at %d, had %q", n, err, b[0], at, before[at])
		}
	}
	next := bytes.Repeat([]byte{'B'}, leaverSize)
	if err := errors.Join(d.WriteAt(t.Context(), next, 0, 0), d.Flush(t.Context()), d.ReadAt(t.Context(), after, 0)); err != nil || !bytes.Equal(after, next) {
		t.Fatalf("operation %d: the next writer lost bytes: %v", n, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := audit(t.Context(), disktest.Files{Image: storetest.New(st.Contents())}); err != nil {
		t.Fatalf("operation %d: %v", n, err)
	}
	return left
}

package nbd

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

const (
	tornExtents = 10_000_000
	tornExtent  = 4 << 10 // bytes of each
)

// torn is a disk of tornExtents extents, each looked for on its own. Every
// other one is a hole, or all of them are data that lies apart.
type torn struct {
	backing.Device
	holes  bool
	looked atomic.Int64 // at so many extents
}

func (d *torn) Extents(_ context.Context, off, n int64, _ backing.Flags, yield func(backing.Extent) bool) error {
	for end := off + n; off < end; off += tornExtent {
		d.looked.Add(1)
		hole := d.holes && off/tornExtent%2 == 1
		if !yield(backing.Extent{Len: min(tornExtent, end-off), Hole: hole, Zero: hole}) {
			return nil
		}
	}
	return nil
}

// Map keeps what it is asked for off the disk of memory below.
func (d *torn) Map(engine.Op, int64, int64, *backing.Mapping) error { return backing.ErrNotMappable }

// extentsClient selects base:allocation on a connection with such replies.
func (r *rig) extentsClient(t *testing.T, replies client.Replies) *client.Client {
	t.Helper()
	s, err := client.Negotiate(t.Context(), r.dial(t), client.Options{Replies: replies})
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Go(t.Context(), "disk", []string{wire.ContextAllocation})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestBlockStatusLooksAtABoundedNumberOfExtents: neither the reply nor the
// work for it grows with the extents of the disk, and whoever goes on where a
// reply ends sees all of it.
func TestBlockStatusLooksAtABoundedNumberOfExtents(t *testing.T) {
	for _, tt := range []struct {
		name    string
		holes   bool
		replies client.Replies
		most    int // extents in a reply
	}{
		{"holes, compact", true, client.Structured, limits.MaxExtents},
		{"holes, extended", true, client.Extended, limits.MaxExtents},
		{"all data, compact", false, client.Structured, 1},
		{"all data, extended", false, client.Extended, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const size = tornExtents * tornExtent
			d := &torn{Device: mem.New(size, nil), holes: tt.holes}
			r := newRig(t, backing.NewEmulate(d), engine.NewPool(2), bufpool.New(limits.BufferBudget))
			c := r.extentsClient(t, tt.replies)
			for off := int64(0); off < 4*limits.MaxExtents*tornExtent; {
				before := d.looked.Load()
				got, err := c.Extents(t.Context(), off, size-off, 0)
				if err != nil {
					t.Fatal(err)
				}
				if n := d.looked.Load() - before; n > limits.ExtentsLooked {
					t.Fatalf("block status at %d looked at %d extents, want at most %d", off, n, limits.ExtentsLooked)
				}
				if n := len(got[0]); n == 0 || n > tt.most {
					t.Fatalf("block status at %d has %d extents, want 1 to %d", off, n, tt.most)
				}
				for _, x := range got[0] {
					off += x.Len
				}
			}
		})
	}
}

// laborious is a disk that answers one gigabyte at a time where it may.
type laborious struct{ torn }

func (d *laborious) Extents(_ context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	d.looked.Store(n)
	if f&backing.Partial != 0 {
		d.looked.Store(min(n, 1<<30))
	}
	yield(backing.Extent{Len: d.looked.Load()})
	return nil
}

// TestBlockStatusMayEndBeforeItsRange: a disk is never made to look at all of it
// for one request.
func TestBlockStatusMayEndBeforeItsRange(t *testing.T) {
	const size = 1 << 40
	d := &laborious{torn{Device: mem.New(size, nil)}}
	r := newRig(t, backing.NewEmulate(d), engine.NewPool(2), bufpool.New(limits.BufferBudget))
	c := r.extentsClient(t, client.Extended)
	for _, f := range []wire.CmdFlags{0, wire.FlagReqOne} {
		got, err := c.Extents(t.Context(), 0, size, f)
		if err != nil {
			t.Fatal(err)
		}
		if len(got[0]) != 1 || got[0][0].Len != 1<<30 || d.looked.Load() != 1<<30 {
			t.Errorf("flags %v: got %v with %d bytes looked at, want one extent of 1 GiB", f, got[0], d.looked.Load())
		}
	}
}

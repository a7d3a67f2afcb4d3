package nbd

import (
	"context"
	"errors"
	"slices"
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
	depthContext  = "qemu:allocation-depth"
	bitmapContext = "qemu:dirty-bitmap:nightly"
)

// described is a disk whose first half is of depth 1, the rest 2; its bitmap
// has every other 64 KiB marked.
type described struct{ backing.Device }

func (d described) Descriptions() []string { return []string{depthContext, bitmapContext} }

func (d described) Describe(_ context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	unit, value := int64(64<<10), func(at int64) uint32 { return uint32(at >> 16 & 1) }
	switch name {
	case depthContext:
		unit, value = d.Info().Size/2, func(at int64) uint32 { return uint32(at/(d.Info().Size/2)) + 1 }
	case bitmapContext:
	default:
		return backing.ErrInvalid
	}
	for end := off + n; off < end; {
		step := min(end, (off/unit+1)*unit) - off
		if !yield(backing.Status{Len: step, Value: value(off)}) || f&backing.ReqOne != 0 {
			return nil
		}
		off += step
	}
	return nil
}

// describedRig serves 1 MiB through Emulate, as package open does.
func describedRig(t *testing.T) *rig {
	bufs := bufpool.New(limits.BufferBudget)
	r := newRig(t, backing.NewEmulate(described{mem.New(1<<20, nil)}), engine.NewPool(2), bufs)
	r.exports.contexts = r.dev.(backing.Describer).Descriptions()
	return r
}

func TestContextsAreListedByNamespace(t *testing.T) {
	ctx := context.Background()
	s, err := client.Negotiate(ctx, describedRig(t).dial(t), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ queries, want []string }{
		{nil, []string{wire.ContextAllocation, depthContext, bitmapContext}},
		{[]string{"base:"}, []string{wire.ContextAllocation}},
		{[]string{"qemu:"}, []string{depthContext, bitmapContext}},
		{[]string{"qemu:dirty-bitmap:"}, []string{bitmapContext}},
		{[]string{"qemu:dirty-bitmap:night"}, nil},
		{[]string{"x-other:"}, nil},
	} {
		got, err := s.ListContexts(ctx, "disk", tt.queries...)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("list %q: got %q, %v, want %q", tt.queries, got, err, tt.want)
		}
	}
}

func TestEachContextHasItsOwnExtents(t *testing.T) {
	ctx := context.Background()
	s, err := client.Negotiate(ctx, describedRig(t).dial(t), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Go(ctx, "disk", []string{bitmapContext, wire.ContextAllocation, "qemu:dirty-bitmap:", depthContext})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.Export().Contexts, []string{wire.ContextAllocation, depthContext, bitmapContext}; !slices.Equal(got, want) {
		t.Fatalf("selected: got %q, want %q", got, want)
	}
	got, err := c.Extents(ctx, 0, 1<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || len(got[0]) != 1 || len(got[1]) != 2 || len(got[2]) != 16 {
		t.Fatalf("extents: got %v, want 1, 2 and 16 of them", got)
	}
	if d := got[1]; d[0] != (client.Extent{Len: 512 << 10, Flags: 1}) || d[1] != (client.Extent{Off: 512 << 10, Len: 512 << 10, Flags: 2}) {
		t.Errorf("depth: got %v, want 1 and 2, half of the disk each", d)
	}
	for i, x := range got[2] {
		if x.Len != 64<<10 || uint32(x.Flags) != uint32(i%2) {
			t.Errorf("bitmap extent %d: got %v", i, x)
		}
	}
	one, err := c.Extents(ctx, 64<<10, 256<<10, wire.FlagReqOne)
	if err != nil || len(one) != 3 || len(one[2]) != 1 || one[2][0].Len != 64<<10 {
		t.Errorf("with REQ_ONE: got %v, %v, want one of 64 KiB last", one, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestUnknownDescriptionIsRefused(t *testing.T) {
	dev := backing.NewChecked(describedRig(t).dev, 0)
	nothing := func(backing.Status) bool { return true }
	if err := dev.Describe(context.Background(), "qemu:dirty-bitmap:other", 0, 512, 0, nothing); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("unknown name: got %v, want %v", err, backing.ErrInvalid)
	}
	if err := dev.Describe(context.Background(), depthContext, 1<<20, 1, 0, nothing); !errors.Is(err, backing.ErrOutOfRange) {
		t.Errorf("beyond the end: got %v, want %v", err, backing.ErrOutOfRange)
	}
}

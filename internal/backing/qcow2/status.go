package qcow2

import (
	"context"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// longestRun is where a run is yielded that still goes on: whoever asks may
// have enough, and what follows costs time to find.
const longestRun = 2048 * limits.MapPage

// depthContext is the metadata context that says which image of a chain has
// the bytes: 1 for the top, 2 for the one below, and so on, 0 for none (QEMU's
// docs/interop/nbd.rst, "qemu:allocation-depth").
const depthContext = "qemu:allocation-depth"

var chainDescriptions = []string{depthContext}

// Descriptions has the allocation depth.
func (d *chainDevice) Descriptions() []string { return chainDescriptions }

// Describe tells the depth of a range. What is damaged counts where that was
// found.
func (d *chainDevice) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	if !slices.Contains(chainDescriptions, name) {
		return backing.ErrInvalid
	}
	return d.wrap("describe", off, n, runs(ctx, d.cursor(off, n), f, depthOf, func(n int64, depth uint32) bool {
		return yield(backing.Status{Len: n, Value: depth})
	}))
}

func depthOf(x *piece) uint32 {
	if x.kind == Absent {
		return 0
	}
	return uint32(x.depth) + 1
}

// Extents reports as holes what no layer has allocated. What is damaged counts
// as data: who reads it finds out.
func (d *chainDevice) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	return d.wrap("extents", off, n, runs(ctx, d.cursor(off, n), f, stateOf, func(n int64, e backing.Extent) bool {
		e.Len = n
		return yield(e)
	}))
}

// stateOf is an extent without its length.
func stateOf(x *piece) (e backing.Extent) {
	switch x.kind {
	case Absent:
		e.Hole, e.Zero = true, true
	case Zero:
		e.Hole, e.Zero = !x.allocated, true
	}
	return e
}

// runs yields what of says of each piece, equal neighbours as one. It honours
// ReqOne.
func runs[S comparable](ctx context.Context, k cursor, f backing.Flags, of func(*piece) S, yield func(int64, S) bool) error {
	var n int64
	var state S
	for k.off < k.end {
		x, err := k.next(ctx)
		if err != nil {
			return err
		}
		s := of(&x)
		if n > 0 && (s != state || n >= longestRun) {
			if !yield(n, state) || f&backing.ReqOne != 0 {
				return nil
			}
			n = 0
		}
		n, state = n+x.n, s
	}
	if n > 0 {
		yield(n, state)
	}
	return nil
}

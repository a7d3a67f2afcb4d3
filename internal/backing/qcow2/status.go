package qcow2

import (
	"context"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// longestRun is where a run is yielded that still goes on: whoever asks may
// have enough, and what follows costs time to find.
const longestRun = 2048 * limits.MapPage

// depthContext is the metadata context that says which image of a chain has
// the bytes: 1 for the top, 2 for the one below, and so on, 0 for none (QEMU's
// docs/interop/nbd.rst, "qemu:allocation-depth").
const depthContext = "qemu:allocation-depth"

// described is a device with a name for errors, and what it can say of its
// bytes beside Extents.
type described struct {
	path         string
	descriptions []string
	bitmaps      *bitmaps.Set // nil for none
}

// Descriptions has the allocation depth, and the bitmaps that can be shown.
func (d *described) Descriptions() []string { return d.descriptions }

// wrap gives err its place, unless it has one or the caller gave up waiting.
func (d *described) wrap(op string, off, n int64, err error) error {
	return backing.WrapIn(op, d.path, off, n, err)
}

// describe does what Describe does; depths walks the range for its depths.
func (d *described) describe(name string, off, n int64, f backing.Flags, yield func(backing.Status) bool, depths func(*runs[uint32]) error) error {
	switch {
	case !slices.Contains(d.descriptions, name):
		return backing.ErrInvalid
	case name != depthContext:
		more := func(s backing.Status) bool { return yield(s) && f&backing.ReqOne == 0 }
		return d.wrap("describe", off, n, d.bitmaps.Describe(name, off, n, more))
	}
	r := depthRuns(f, yield)
	return d.wrap("describe", off, n, r.end(depths(r)))
}

// Describe tells the depth of a range, or what a bitmap has of it. What is
// damaged counts where that was found.
func (d *chainDevice) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return d.describe(name, off, n, f, yield, func(r *runs[uint32]) error {
		return d.pieces(ctx, off, n, func(x *piece) bool { return r.looks(x) && r.add(x.n, depthOf(x)) })
	})
}

func depthOf(x *piece) uint32 {
	if x.kind == Absent {
		return 0
	}
	return uint32(x.depth) + 1
}

// Extents reports as holes what no layer has allocated, and as zeroes also what
// is a hole of the file: clusters that were preallocated. What is damaged counts
// as data: who reads it finds out.
func (d *chainDevice) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	r := extentRuns(f, yield)
	err := d.pieces(ctx, off, n, func(x *piece) bool { return r.looks(x) && addExtent(ctx, r, x) })
	return d.wrap("extents", off, n, r.end(err))
}

// addExtent adds a piece to the runs.
func addExtent(ctx context.Context, r *runs[backing.Extent], x *piece) bool {
	if x.kind != Data {
		return r.add(x.n, stateOf(x))
	}
	return addData(ctx, r, x.store(), x.off, x.n)
}

// addData adds n bytes of data at off of a file, of which holes are zeroes. A
// file that does not tell has none.
func addData(ctx context.Context, r *runs[backing.Extent], st store.Store, off, n int64) (more bool) {
	more = true
	err := st.Extents(ctx, off, n, func(e backing.Extent) bool {
		k := min(e.Len, n)
		more, n = r.add(k, backing.Extent{Zero: e.Zero}), n-k
		return more && n > 0
	})
	if !more || err == nil && n == 0 {
		return more
	}
	return r.add(n, backing.Extent{})
}

// pieces calls f for each piece of a range until it wants no more.
func (d *chainDevice) pieces(ctx context.Context, off, n int64, f func(*piece) bool) error {
	for k := d.cursor(off, n); k.off < k.end; {
		x, err := k.next(ctx)
		if err != nil || !f(&x) {
			return err
		}
	}
	return nil
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

// runs yields equal neighbours as one. It honours ReqOne and Partial.
type runs[S comparable] struct {
	flags backing.Flags
	yield func(n int64, state S) bool

	n     int64 // bytes of the run so far
	state S
	done  bool // yield wants no more

	page  *page // of a chain that was looked at last
	pages int   // that were looked at
}

func depthRuns(f backing.Flags, yield func(backing.Status) bool) *runs[uint32] {
	return &runs[uint32]{flags: f, yield: func(n int64, depth uint32) bool {
		return yield(backing.Status{Len: n, Value: depth})
	}}
}

func extentRuns(f backing.Flags, yield func(backing.Extent) bool) *runs[backing.Extent] {
	return &runs[backing.Extent]{flags: f, yield: func(n int64, e backing.Extent) bool {
		e.Len = n
		return yield(e)
	}}
}

// looks takes note of the page that x is of, if it is of one. It reports whether
// the request may look at it.
func (r *runs[S]) looks(x *piece) bool {
	if x.page != nil && x.page != r.page {
		r.page = x.page
		r.pages++
	}
	return r.flags&backing.Partial == 0 || r.pages <= limits.StatusTables
}

// add takes the state of the next n bytes and reports whether more is wanted.
func (r *runs[S]) add(n int64, s S) bool {
	if r.n > 0 && (s != r.state || r.n >= longestRun) {
		r.done = !r.yield(r.n, r.state) || r.flags&backing.ReqOne != 0
		r.n = 0
	}
	if r.done {
		return false
	}
	r.n, r.state = r.n+n, s
	return true
}

// end yields what is left, unless the walk failed.
func (r *runs[S]) end(err error) error {
	if err == nil && !r.done && r.n > 0 {
		r.yield(r.n, r.state)
	}
	return err
}

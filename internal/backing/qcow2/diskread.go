package qcow2

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// spanBatch is how many spans are looked up before their bytes are read.
const spanBatch = 16

// span is what the mapping in memory says of the bytes from off on, up to end
// at most; ok is false where it is not in memory. With d.m.mu, for reading at
// least.
func (d *disk) span(off, end int64) (s Span, ok bool) {
	number := off / d.m.coverage
	if i := off / d.g.L2Coverage; d.m.l1[i] == 0 {
		return Span{Kind: Absent, Len: min(end, (i+1)*d.g.L2Coverage) - off}, true
	}
	piece := d.m.slices[number]
	if piece == nil {
		d.m.misses.Add(1)
		return Span{}, false
	}
	d.m.hits.Add(1)
	piece.touch()
	i := off % d.m.coverage >> d.g.ClusterBits
	skip := off & (d.g.ClusterSize - 1)
	n := min(end-off, d.g.ClusterSize-skip)
	if err := piece.bad[i]; err != nil {
		return Span{Kind: Damaged, Len: n, Err: err}, true
	}
	c := d.cluster(piece, i)
	return d.spanOf(&c, skip, n), true
}

// spanOf is the first span of n bytes of a cluster, from skip on.
func (d *disk) spanOf(c *format.Cluster, skip, n int64) Span {
	if c.Compressed {
		return Span{
			Kind: Compressed, Len: n, Store: d.st, Off: c.Host, InLen: min(c.Length, d.end-c.Host), Skip: skip,
			Cluster: d.g.ClusterSize, Codec: d.header.Compression,
		}
	}
	sub := skip / d.g.SubSize
	kind := c.Kind(sub)
	end := skip + n
	n = min(end, (sub+1)*d.g.SubSize) - skip
	for skip+n < end && c.Kind((skip+n)/d.g.SubSize) == kind {
		n = min(end-skip, n+d.g.SubSize)
	}
	switch kind {
	case format.SubData:
		return Span{Kind: Data, Len: n, Store: d.data, Off: c.Host + skip}
	case format.SubZero:
		s := Span{Kind: Zero, Len: n}
		if c.HasHost() {
			s.Store = d.data
		}
		return s
	}
	return Span{Kind: Absent, Len: n}
}

// lookup fills spans with what the mapping says from off to end, as far as it
// is in memory and there is room, neighbours put together. It says where they
// end. With d.m.mu, for reading at least.
func (d *disk) lookup(off, end int64, spans []Span) (n int, to int64) {
	for off < end {
		s, ok := d.span(off, end)
		if !ok {
			break
		}
		if n > 0 && continues(&spans[n-1], &s) {
			spans[n-1].Len += s.Len
		} else if n == len(spans) {
			break
		} else {
			spans[n] = s
			n++
		}
		off += s.Len
	}
	return n, off
}

// errEnough ends a walk over spans early.
var errEnough = errors.New("no more is wanted")

// eachSpan calls f for each span of a range with its guest offset, until f
// fails. It loads what is missing. The caller holds a lease.
func (d *disk) eachSpan(ctx context.Context, off, n int64, f func(at int64, s *Span) error) error {
	var spans [spanBatch]Span
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		d.m.mu.RLock()
		k, _ := d.lookup(off, end, spans[:])
		d.m.mu.RUnlock()
		if k == 0 {
			if err := d.load(ctx, off/d.m.coverage); err != nil {
				return err
			}
		}
		for i := range spans[:k] {
			if err := f(off, &spans[i]); err != nil {
				return err
			}
			off += spans[i].Len
		}
	}
	return nil
}

// use takes a lease.
func (d *disk) use() *epoch {
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	return d.lease()
}

// belowHas is how many bytes the chain below has from off on.
func (d *disk) belowHas(off int64) int64 {
	if d.below == nil {
		return 0
	}
	return max(0, d.below.info.Size-off)
}

// ReadAt fills p. Compressed clusters are decompressed side by side.
func (d *disk) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.wrap("read", off, int64(len(p)), d.readAt(ctx, p, off))
}

func (d *disk) readAt(ctx context.Context, p []byte, off int64) error {
	defer d.use().Release()
	g := gather{cache: d.clusters}
	defer g.free()
	err := d.eachSpan(ctx, off, int64(len(p)), func(at int64, s *Span) error {
		to := p[at-off:][:s.Len]
		if s.Kind == Absent {
			return d.readBelow(ctx, to, at)
		}
		return g.read(ctx, s, to)
	})
	if err != nil {
		return err
	}
	return g.finish(ctx)
}

// readBelow fills p from the chain below; what it does not have is zero.
func (d *disk) readBelow(ctx context.Context, p []byte, off int64) error {
	n := min(d.belowHas(off), int64(len(p)))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	return d.below.readAt(ctx, p[:n], off)
}

// Map names the runs behind a range whose mapping is in memory. A write must
// go to clusters that are the disk's alone.
func (d *disk) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if off < 0 || n <= 0 || off > d.size.Load() || n > d.size.Load()-off {
		return backing.ErrNotMappable
	}
	var spans [backing.MaxRuns]Span
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	k, to := d.lookup(off, off+n, spans[:])
	if to != off+n || op != engine.OpRead && !(d.bitmaps.Begun() && d.writable() == nil && d.inPlace(off, n)) {
		return backing.ErrNotMappable
	}
	j := joins.Get().(*join)
	if !d.joinSpans(op, off, spans[:k], j) {
		j.abandon()
		return backing.ErrNotMappable
	}
	j.keep(d.lease())
	if op != engine.OpRead && d.bitmaps.Tracking() {
		d.bitmaps.Mark(off, n)
		j.marks, j.off, j.len = d.bitmaps, off, n
	}
	j.give(m)
	return nil
}

// joinSpans puts the runs of some spans together; it tells whether that could
// be done.
func (d *disk) joinSpans(op engine.Op, off int64, spans []Span, j *join) bool {
	for i := range spans {
		s := &spans[i]
		switch {
		case s.Kind == Data:
			if !j.mapped(s.Store.Map(op, s.Off, s.Len, &j.part)) {
				return false
			}
			j.sum.Reused = true // when the cluster has been freed
		case s.Kind == Zero || s.Kind == Absent && d.belowHas(off) == 0:
			if op != engine.OpRead || !j.run(backing.Run{Len: s.Len}) {
				return false
			}
		case s.Kind == Absent && op == engine.OpRead && d.belowHas(off) >= s.Len:
			if !j.mapped(d.below.Map(op, off, s.Len, &j.part)) {
				return false
			}
		default:
			return false
		}
		off += s.Len
	}
	return true
}

// Describe tells the depth of a range, or what a bitmap has of it.
func (d *disk) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return d.describe(name, off, n, f, yield, func(r *runs[uint32]) error {
		return d.eachPiece(ctx, off, d.looked(off, n, f), func(own bool, x *piece) bool {
			depth := depthOf(x)
			if !own && depth > 0 {
				depth++
			}
			return r.looks(x) && r.add(x.n, depth)
		})
	})
}

// Extents reports as holes what neither the image nor the chain below has
// allocated.
func (d *disk) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	r := extentRuns(f, yield)
	err := d.eachSpan(ctx, off, d.looked(off, n, f), func(at int64, s *Span) error {
		var more bool
		switch s.Kind {
		case Absent:
			return d.eachBelow(ctx, at, s.Len, func(x *piece) bool { return r.looks(x) && addExtent(ctx, r, x) })
		case Data:
			more = addData(ctx, r, s.Store, s.Off, s.Len)
		default:
			more = r.add(s.Len, stateOf(s.piece()))
		}
		if !more {
			return errEnough
		}
		return nil
	})
	if err == errEnough {
		err = nil
	}
	return d.wrap("extents", off, n, r.end(err))
}

// looked is how much of a range a request for its state looks at: with Partial
// limits.StatusTables slices, and limits.MapHoleScan entries of the L1 table.
func (d *disk) looked(off, n int64, f backing.Flags) int64 {
	if f&backing.Partial == 0 {
		return n
	}
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	at, end := off, off+n
	for slices, entry := 0, off/d.g.L2Coverage; at < end && at/d.g.L2Coverage-entry < limits.MapHoleScan; {
		step := d.g.L2Coverage
		if d.m.l1[at/d.g.L2Coverage] != 0 {
			if slices++; slices > limits.StatusTables {
				break
			}
			step = d.m.coverage
		}
		at = at - at%step + step
	}
	return min(at, end) - off
}

// piece is what s has in common with a piece of a chain.
func (s *Span) piece() *piece {
	return &piece{extent: extent{kind: s.Kind, allocated: s.Store != nil}, n: s.Len}
}

// eachPiece calls f for each piece of a range, of the image's own or of the
// chain below, until it wants no more.
func (d *disk) eachPiece(ctx context.Context, off, n int64, f func(own bool, x *piece) bool) error {
	err := d.eachSpan(ctx, off, n, func(at int64, s *Span) error {
		if s.Kind == Absent {
			return d.eachBelow(ctx, at, s.Len, func(x *piece) bool { return f(false, x) })
		}
		if !f(true, s.piece()) {
			return errEnough
		}
		return nil
	})
	if err == errEnough {
		return nil
	}
	return err
}

// eachBelow does what eachPiece does for a range that the image does not have:
// behind the end of the chain below there are zeroes, and where there is no
// chain nothing.
func (d *disk) eachBelow(ctx context.Context, off, n int64, f func(*piece) bool) error {
	have, more := min(d.belowHas(off), n), true
	if have > 0 {
		err := d.below.pieces(ctx, off, have, func(x *piece) bool {
			more = f(x)
			return more
		})
		if err != nil {
			return err
		}
	}
	if rest := (piece{n: n - have}); more && rest.n > 0 {
		if d.below != nil {
			rest.kind = Zero
		}
		more = f(&rest)
	}
	if !more {
		return errEnough
	}
	return nil
}

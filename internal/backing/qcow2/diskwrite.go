package qcow2

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// WriteAt writes p. Neighbouring requests may be interrupted between clusters.
func (d *disk) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return d.wrap("write", off, int64(len(p)), d.writeAt(ctx, p, off, f))
}

func (d *disk) writeAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.bitmaps.Mark(off, int64(len(p)))
	late := false // the write is not durable before a commit is
	for len(p) > 0 {
		n, durable, err := d.overwrite(ctx, p, off, f&backing.FUA != 0)
		late = late || !durable
		if err == nil && n == 0 {
			n, err = d.allocate(ctx, p, off)
			late = true
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	if f&backing.FUA != 0 && late {
		return d.Flush(ctx)
	}
	return nil
}

// inPlace reports whether all of a range lies in clusters that are the disk's
// alone and that nobody has claimed. With d.m.mu, for reading at least; the
// mapping of the range is in memory.
func (d *disk) inPlace(off, n int64) bool {
	first, last := off>>d.g.ClusterBits, (off+n-1)>>d.g.ClusterBits
	if d.claimed(first, last-first+1) != nil {
		return false
	}
	for c := first; c <= last; c++ {
		s := d.m.slices[c/d.m.entries]
		if s == nil {
			return false
		}
		if x := d.cluster(s, c%d.m.entries); !x.Copied || x.Compressed {
			return false
		}
	}
	return true
}

// committed reports whether the file has the mapping of a range. With d.m.mu,
// for reading at least; the mapping of the range is in memory.
func (d *disk) committed(off, n int64) bool {
	for number := off / d.m.coverage; number <= (off+n-1)/d.m.coverage; number++ {
		s := d.m.slices[number]
		table := number / d.perTable()
		if s == nil || s.dirty || s.busy || d.m.fresh[table] != nil || d.m.unnamed[table] {
			return false
		}
	}
	return true
}

// overwrite writes what p begins with, as far as it can be written in place,
// and says how much that was. durable says that the bytes are, as wanted.
func (d *disk) overwrite(ctx context.Context, p []byte, off int64, fua bool) (n int64, durable bool, err error) {
	var spans [1]Span
	d.m.mu.RLock()
	d.lookup(off, off+int64(len(p)), spans[:])
	s := spans[0]
	for s.Kind == Data && s.Len > 0 && !d.inPlace(off, s.Len) {
		s.Len = (off+s.Len-1)&^(d.g.ClusterSize-1) - off
	}
	if s.Kind != Data || s.Len <= 0 {
		d.m.mu.RUnlock()
		return 0, false, nil
	}
	durable = fua && d.committed(off, s.Len)
	lease := d.lease()
	d.m.mu.RUnlock()
	defer lease.Release()
	return s.Len, durable, s.Store.WriteAt(ctx, p[:s.Len], s.Off, durable)
}

// allocate writes what p begins with to clusters that need a change of their
// mapping, and says how much that was; it may be nothing where somebody else
// just changed it.
func (d *disk) allocate(ctx context.Context, p []byte, off int64) (int64, error) {
	if err := d.commits.makeRoom(ctx); err != nil {
		return 0, err
	}
	x, err := d.planFunded(ctx, off, int64(len(p)))
	if errors.Is(err, backing.ErrNoSpace) {
		// What is in quarantine is free after a commit, unless it is in use, and a
		// device that has become larger is known to be.
		if err := d.commits.run(ctx); err != nil {
			return 0, err
		}
		x, err = d.planFunded(ctx, off, int64(len(p)))
	}
	if err != nil || x == nil {
		return 0, err
	}
	end := min(off+int64(len(p)), (x.first+x.n)<<d.g.ClusterBits)
	err = d.fill(ctx, x, p[:end-off], off)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	defer d.letGo(&x.claim)
	if err != nil {
		if x.fresh && !d.g.DataFile {
			d.space.Drop(x.run.Off, x.run.Len)
		}
		return 0, err
	}
	if d.g.DataFile && x.reach < d.reach.Load() {
		return 0, nil // the disk goes on where it was not filled
	}
	d.link(x, off, end)
	return end - off, nil
}

// planFunded is plan with storage for the metadata that it leads to.
func (d *disk) planFunded(ctx context.Context, off, n int64) (*stretch, error) {
	for {
		x, err := d.plan(ctx, off, n)
		if err == nil {
			return x, nil
		}
		if err := d.funded(ctx, err); err != nil {
			return nil, err
		}
	}
}

// plan claims the clusters that a write at off begins with, as many as can be
// treated alike, and reserves host clusters for them. It is nil where there is
// nothing to change any more.
func (d *disk) plan(ctx context.Context, off, n int64) (*stretch, error) {
	first, last := off>>d.g.ClusterBits, (off+n-1)>>d.g.ClusterBits
	s, free, err := d.lockForChange(ctx, first, last-first+1)
	if err != nil {
		return nil, err
	}
	defer d.m.mu.Unlock()
	x := &stretch{at: first % d.m.entries, reach: d.reach.Load()}
	x.first = first
	c := d.cluster(s, x.at)
	switch {
	case d.g.DataFile:
		x.n, x.data, x.fresh = 1, c.Data, !c.HasHost()
		x.run = space.Run{Off: first << d.g.ClusterBits, Len: d.g.ClusterSize}
	case !needsHost(&c):
		if c.Data&d.touched(first, off, off+n) == d.touched(first, off, off+n) {
			return nil, nil
		}
		x.n, x.data, x.run = 1, c.Data, space.Run{Off: c.Host, Len: d.g.ClusterSize}
	default:
		x.fresh, x.whole = true, c.Data != 0
		for x.n = 1; x.n < free; x.n++ {
			if next := d.cluster(s, x.at+x.n); !needsHost(&next) || (next.Data != 0) != x.whole {
				break
			}
		}
		if x.run, err = d.space.Reserve(x.n << d.g.ClusterBits); err != nil {
			return nil, err
		}
		x.n = x.run.Len >> d.g.ClusterBits
	}
	d.hold(&x.claim, s)
	return x, nil
}

// needsHost reports whether a cluster must get a host cluster of its own
// before it can be written.
func needsHost(c *format.Cluster) bool { return !c.HasHost() || !c.Copied }

// touched is the set of subclusters of a guest cluster that [off, end) touches.
func (d *disk) touched(cluster, off, end int64) uint32 {
	base := cluster << d.g.ClusterBits
	from := max(off, base) - base
	to := min(end, base+d.g.ClusterSize) - base
	return uint32(1<<((to-1)/d.g.SubSize+1) - 1<<(from/d.g.SubSize))
}

// unit is what is written as a whole in the clusters of x.
func (d *disk) unit(x *stretch) int64 {
	if x.whole {
		return d.g.ClusterSize
	}
	return d.g.SubSize
}

// fill writes p, and around it what is in its first and last subclusters, or
// clusters, so far.
func (d *disk) fill(ctx context.Context, x *stretch, p []byte, off int64) error {
	base := x.first << d.g.ClusterBits
	if !d.g.DataFile {
		if err := d.space.Extend(ctx, x.run.Off+x.run.Len); err != nil {
			return err
		}
	}
	unit := d.unit(x)
	end := off + int64(len(p))
	from, to := off&^(unit-1), (end+unit-1)&^(unit-1)
	if d.g.DataFile { // which may be a device that ends with the disk
		to = min(to, x.reach)
	}
	if fill, err := d.needsFill(ctx, x, from, off); err != nil {
		return err
	} else if !fill {
		from = off
	}
	if fill, err := d.needsFill(ctx, x, end, to); err != nil {
		return err
	} else if !fill {
		to = end
	}
	if to-from <= max(unit, limits.MaxFill) {
		return d.writeFilled(ctx, p, off, from, to, x.run.Off-base)
	}
	return d.fillApart(ctx, p, off, from, to, unit, x.run.Off-base)
}

// fillApart writes the first and the last unit with what is around p in them,
// and between them p as it is.
func (d *disk) fillApart(ctx context.Context, p []byte, off, from, to, unit, host int64) error {
	a, z := off, off+int64(len(p))
	if from < a {
		a = min(z, from+unit)
		if err := d.writeFilled(ctx, p[:a-off], off, from, a, host); err != nil {
			return err
		}
	}
	if to > z {
		last := max(a, to-unit)
		if err := d.writeFilled(ctx, p[last-off:], last, last, to, host); err != nil {
			return err
		}
		z = last
	}
	if a == z {
		return nil
	}
	return d.data.WriteAt(ctx, p[a-off:z-off], a+host, false)
}

// writeFilled writes [from, to), which p is a part of, with what the disk has
// around it.
func (d *disk) writeFilled(ctx context.Context, p []byte, off, from, to, host int64) error {
	if from == off && to == off+int64(len(p)) {
		return d.data.WriteAt(ctx, p, off+host, false)
	}
	buf := d.clusters.buffers.get(to - from)
	defer d.clusters.buffers.put(buf)
	b := buf.b
	copy(b[off-from:], p)
	end := off + int64(len(p))
	if err := d.readAt(ctx, b[:off-from], from); err != nil {
		return err
	}
	if err := d.readAt(ctx, b[end-from:], end); err != nil {
		return err
	}
	return d.data.WriteAt(ctx, b, from+host, false)
}

// needsFill tells whether what is in [from, to) must be written to the host
// clusters of x: not where both are zero.
func (d *disk) needsFill(ctx context.Context, x *stretch, from, to int64) (bool, error) {
	switch {
	case from == to:
		return false, nil
	case !x.fresh:
		// Data that are there already may be written to in place meanwhile.
		return x.data&d.touched(x.first, from, to) == 0, nil
	case !x.run.Zeroed:
		return true, nil
	}
	zero, err := d.isZero(ctx, from, min(to, d.reach.Load()))
	return !zero, err
}

// isZero tells whether a range is known to read as zeroes.
func (d *disk) isZero(ctx context.Context, off, end int64) (bool, error) {
	zero := true
	err := d.eachPiece(ctx, off, max(0, end-off), func(_ bool, x *piece) bool {
		zero = x.kind == Zero || x.kind == Absent
		return zero
	})
	return zero, err
}

// link makes the clusters of x, of which [off, end) was written, part of the
// disk. With d.m.mu.
func (d *disk) link(x *stretch, off, end int64) {
	d.m.linked = true
	for i := range x.n {
		old := d.cluster(x.s, x.at+i)
		written := d.touched(x.first+i, off, end)
		if x.whole {
			written = d.g.AllSubs()
		}
		c := format.Cluster{
			Host: x.run.Off + i<<d.g.ClusterBits, Copied: true,
			Data: old.Data | written, Zero: old.Zero &^ written,
		}
		d.set(x.s, x.at+i, c)
		if x.fresh {
			d.release(&old)
		}
	}
}

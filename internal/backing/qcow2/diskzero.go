package qcow2

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
)

// zeroBlock is what is written where the mapping cannot say zero.
var zeroBlock [64 << 10]byte

// Zero makes a range read as zeroes, by its mapping as far as it has whole
// subclusters. ErrNotSupported, with nothing changed, where the image cannot
// say so: version 2 above a backing file, and a data file that would have to be
// written.
func (d *disk) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	err := d.begin(ctx)
	if err == nil {
		err = d.zero(ctx, off, n, f)
		d.bitmaps.Mark(off, n)
	}
	if err == nil && f&backing.FUA != 0 {
		return d.Flush(ctx)
	}
	return d.wrap("zero", off, n, err)
}

func (d *disk) zero(ctx context.Context, off, n int64, f backing.Flags) error {
	from, to, last, err := d.inner(ctx, off, off+n)
	if err != nil {
		return err
	}
	defer last.Release()
	keep := f&backing.NoHole != 0
	if from >= to {
		return d.zeroBytes(ctx, off, off+n, keep)
	}
	if err := d.zeroWhole(ctx, from, to, keep, f&backing.FastZero != 0); err != nil {
		return err
	}
	if err := d.zeroBytes(ctx, off, from, keep); err != nil {
		return err
	}
	return d.zeroBytes(ctx, to, off+n, keep)
}

// zeroWhole is zero for whole subclusters.
func (d *disk) zeroWhole(ctx context.Context, from, to int64, keep, fast bool) error {
	switch {
	case keep && fast && !d.keepsFast(), !d.canZero(keep):
		return backing.ErrNotSupported
	case d.g.DataFile:
		return d.zeroData(ctx, from, to, keep)
	case keep:
		absent := func(int64) bool { return false }
		return d.eachStretch(ctx, from, to, true, absent, func(first, n int64) (int64, error) {
			return d.zeroKept(ctx, first, n, from, to)
		})
	}
	absent := func(off int64) bool { return d.belowHas(off) == 0 }
	return d.eachStretch(ctx, from, to, false, absent, func(first, n int64) (int64, error) {
		return d.eachCluster(ctx, first, n, from, to, d.zeroed)
	})
}

// keepsFast reports whether what has to stay allocated can be zero with no slow
// write. A device that has the guest's data may write all of it, and so may the
// file of an image, which says that it cannot zero when the mapping has changed.
func (d *disk) keepsFast() bool { return d.g.DataFile != d.data.Fixed() }

// canZero reports whether an entry can say that a cluster reads as zeroes, with
// keep one that has a host cluster.
func (d *disk) canZero(keep bool) bool {
	return d.g.Version > 2 || d.below == nil && !keep
}

// inner is what there is of whole subclusters in [off, end). The last one of
// the disk counts as whole: where the disk ends within one it does not grow
// before the lease is released.
func (d *disk) inner(ctx context.Context, off, end int64) (from, to int64, l backing.Lease, err error) {
	mask := d.g.SubSize - 1
	from, to = (off+mask)&^mask, end&^mask
	if to == end || end != d.reach.Load() {
		return from, to, noLease{}, nil
	}
	if l, err = d.ends.Lock(ctx, 0, 1, false); err != nil {
		return 0, 0, nil, err
	}
	if end == d.reach.Load() {
		to = (end + mask) &^ mask
	}
	return from, to, l, nil
}

// noLease keeps nothing.
type noLease struct{}

// Release does nothing.
func (noLease) Release() {}

// zeroBytes writes zeroes to a range of less than two subclusters, unless it is
// zero; with keep always, for the storage.
func (d *disk) zeroBytes(ctx context.Context, off, end int64, keep bool) error {
	if off >= end {
		return nil
	}
	defer d.use().Release()
	if !keep {
		if zero, err := d.isZero(ctx, off, end); err != nil || zero {
			return err
		}
	}
	for n := int64(0); off < end; off += n {
		n = min(end-off, int64(len(zeroBlock)))
		if err := d.writeAt(ctx, zeroBlock[:n], off, 0); err != nil {
			return err
		}
	}
	return nil
}

// eachStretch calls f for the clusters of [from, to) that are not done, n from
// first on. f says how many it did, of one slice; what it cannot do is written as
// zeroes. None is passed over: an error is that of the first one that is not done.
// Where there is no L2 table and absent says that none is needed, f is not called.
func (d *disk) eachStretch(ctx context.Context, from, to int64, keep bool, absent func(off int64) bool, f func(first, n int64) (int64, error)) error {
	full := int64(-1)
	for first, end := from>>d.g.ClusterBits, d.g.Clusters(to); first < end; {
		if off := first << d.g.ClusterBits; absent(off) && d.noTable(off) {
			first = (off/d.g.L2Coverage + 1) * d.g.L2Entries
			continue
		}
		if err := d.commits.makeRoom(ctx); err != nil {
			return err
		}
		n, err := f(first, end-first)
		if first += n; err == errMustWrite {
			at := first << d.g.ClusterBits
			if err = d.zeroBytes(ctx, max(from, at), min(to, at+d.g.ClusterSize, d.reach.Load()), keep); err == nil {
				first++
			}
		}
		if err != nil {
			err = d.overcome(ctx, err, first, &full)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// overcome does what may help where a change of cluster first failed with err; nil
// is to try again. full is the last cluster for which there was no room: a commit is
// to find some once for each, as in allocate.
func (d *disk) overcome(ctx context.Context, err error, first int64, full *int64) error {
	err = d.funded(ctx, err)
	if errors.Is(err, backing.ErrNoSpace) && first > *full {
		*full = first
		return d.commits.run(ctx)
	}
	return err
}

// noTable reports whether a part of the disk has no L2 table.
func (d *disk) noTable(off int64) bool {
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	return d.m.l1[off/d.g.L2Coverage] == 0
}

// eachCluster makes of some of n clusters from first on what f says, given those
// of their subclusters that lie in [from, to), until f fails.
func (d *disk) eachCluster(ctx context.Context, first, n, from, to int64, f func(old *format.Cluster, subs uint32) (format.Cluster, error)) (done int64, err error) {
	s, n, err := d.lockClusters(ctx, first, n)
	if err != nil {
		return 0, err
	}
	defer d.m.mu.Unlock()
	for ; done < n; done++ {
		i := first%d.m.entries + done
		old := d.cluster(s, i)
		c, err := f(&old, d.touched(first+done, from, to))
		if err == nil && c != old {
			err = d.mayChange(s)
		}
		if err != nil {
			return done, err
		}
		if c == old {
			continue
		}
		d.set(s, i, c)
		if c.Host != old.Host || c.Compressed != old.Compressed {
			d.release(&old)
		}
	}
	return n, nil
}

// errMustWrite says that the mapping alone cannot make a part of a cluster zero.
var errMustWrite = errors.New("a part of a cluster must be written")

// zeroed is a cluster that reads as zeroes in subs, without a host cluster if it
// can be. With d.m.mu.
func (d *disk) zeroed(old *format.Cluster, subs uint32) (format.Cluster, error) {
	if old.Compressed && subs != d.g.AllSubs() {
		return *old, errMustWrite
	}
	c := format.Cluster{Host: old.Host, Copied: old.Copied, Data: old.Data &^ subs, Zero: old.Zero | subs}
	if c.Data == 0 {
		c.Host, c.Copied = format.NoHost, false
	}
	if d.g.Version < 3 {
		c.Zero = 0
	}
	return c, nil
}

// zeroKept makes what some of n clusters from first on have of [from, to) zero, in
// host clusters with storage, and says for how many. They are claimed until the
// storage is there: a mapping that names new clusters has it.
func (d *disk) zeroKept(ctx context.Context, first, n, from, to int64) (done int64, err error) {
	x, err := d.planKept(ctx, first, n, from, to)
	if err != nil {
		return 0, err
	}
	base := first << d.g.ClusterBits
	lo, hi := max(from, base), min(to, base+x.n<<d.g.ClusterBits)
	part := space.Ref{Off: x.run.Off + lo - base, Len: hi - lo}
	if x.fresh {
		err = d.space.Store(ctx, part)
	} else {
		err = d.space.Zero(ctx, part)
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	defer d.letGo(&x.claim)
	if err == nil {
		d.linkKept(x, from, to)
		return x.n, nil
	}
	if x.fresh {
		d.space.Drop(x.run.Off, x.run.Len)
	}
	return 0, err
}

// planKept claims some of n clusters from first on: those that have host clusters
// in a row, or such that need some, which are reserved. errMustWrite where the
// first one has to be copied, for what lies outside of [from, to).
func (d *disk) planKept(ctx context.Context, first, n, from, to int64) (*stretch, error) {
	s, free, err := d.lockForChange(ctx, first, n)
	if err != nil {
		return nil, err
	}
	defer d.m.mu.Unlock()
	x := &stretch{at: first % d.m.entries}
	x.first = first
	c := d.cluster(s, x.at)
	if d.mustCopy(&c, d.touched(first, from, to)) {
		return nil, errMustWrite
	}
	x.fresh, x.run = needsHost(&c), space.Run{Off: c.Host}
	for x.n = 1; x.n < free; x.n++ {
		next := d.cluster(s, x.at+x.n)
		if needsHost(&next) != x.fresh || !x.fresh && next.Host != c.Host+x.n<<d.g.ClusterBits ||
			d.mustCopy(&next, d.touched(first+x.n, from, to)) {
			break
		}
	}
	if x.fresh {
		if x.run, err = d.space.Reserve(x.n << d.g.ClusterBits); err != nil {
			return nil, err
		}
		x.n = x.run.Len >> d.g.ClusterBits
	}
	d.hold(&x.claim, s)
	return x, nil
}

// mustCopy reports whether a cluster can have subs in a host cluster of its own
// only with a copy of the others.
func (d *disk) mustCopy(c *format.Cluster, subs uint32) bool {
	return subs != d.g.AllSubs() && (c.Compressed || c.HasHost() && !c.Copied)
}

// linkKept makes the clusters of x read as zeroes in [from, to). With d.m.mu.
func (d *disk) linkKept(x *stretch, from, to int64) {
	for i := range x.n {
		old := d.cluster(x.s, x.at+i)
		subs := d.touched(x.first+i, from, to)
		c := format.Cluster{
			Host: x.run.Off + i<<d.g.ClusterBits, Copied: true,
			Data: old.Data &^ subs, Zero: old.Zero | subs,
		}
		if c == old {
			continue
		}
		d.set(x.s, x.at+i, c)
		if x.fresh {
			d.release(&old)
		}
	}
}

// Trim frees the host clusters of whole subclusters, which then read as zeroes,
// as far as the image can say so, and the host has room for the tables that say
// it; else it does nothing.
func (d *disk) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	err := d.begin(ctx)
	if err == nil {
		err = d.trim(ctx, off, n)
		d.bitmaps.Mark(off, n)
	}
	if err == nil && f&backing.FUA != 0 {
		return d.Flush(ctx)
	}
	return d.wrap("trim", off, n, err)
}

func (d *disk) trim(ctx context.Context, off, n int64) error {
	from, to, last, err := d.inner(ctx, off, off+n)
	if err != nil {
		return err
	}
	defer last.Release()
	if from >= to || d.discard == IgnoreTrim {
		return nil
	}
	if d.g.DataFile {
		return d.punchData(ctx, from, min(to, d.reach.Load()))
	}
	for err == nil && from < to {
		end := min(to, (from/d.g.L2Coverage+1)*d.g.L2Coverage)
		if err = d.trimTable(ctx, from, end); errors.Is(err, backing.ErrNoSpace) {
			err = nil // the disk cannot have what it shares with a snapshot for its own
		}
		from = end
	}
	return err
}

// trimTable is trim for whole subclusters of one L2 table.
func (d *disk) trimTable(ctx context.Context, from, to int64) error {
	absent := func(int64) bool { return true }
	err := d.eachStretch(ctx, from, to, false, absent, func(first, n int64) (int64, error) {
		return d.eachCluster(ctx, first, n, from, to, func(old *format.Cluster, subs uint32) (format.Cluster, error) {
			return d.trimmed(old, subs), nil
		})
	})
	if err == nil && d.discard == KeepCluster {
		err = d.punchKept(ctx, from, to)
	}
	return err
}

// trimmed is a cluster whose contents in subs do not matter. With d.m.mu.
func (d *disk) trimmed(old *format.Cluster, subs uint32) format.Cluster {
	all := subs == d.g.AllSubs()
	if *old == format.Unallocated || old.Compressed && !all || d.g.Version < 3 && d.below != nil {
		return *old
	}
	gone := subs & old.Data
	c := format.Cluster{Host: old.Host, Copied: old.Copied, Data: old.Data &^ gone, Zero: old.Zero | gone}
	keep := d.discard == KeepCluster && old.HasHost() && d.g.Version > 2
	if c.Data == 0 && !keep {
		c.Host, c.Copied = format.NoHost, false
	}
	if all && !keep && d.below == nil || d.g.Version < 3 {
		c.Zero = 0
	}
	return c
}

// punchKept frees the storage of host clusters that have no data any more and
// stay with the clusters of [from, to).
func (d *disk) punchKept(ctx context.Context, from, to int64) error {
	mask := d.g.ClusterSize - 1
	err := d.eachKept(ctx, from&^mask, to&^mask, func(host, n int64) error {
		return d.data.Punch(ctx, host, n)
	})
	if errors.Is(err, backing.ErrNotSupported) {
		return nil
	}
	return err
}

// eachKept calls f for the stretches of the image that host clusters have for
// [from, to) without data there. Meanwhile they are claimed.
func (d *disk) eachKept(ctx context.Context, from, to int64, f func(host, n int64) error) error {
	for first, end := from>>d.g.ClusterBits, d.g.Clusters(to); first < end; {
		if off := first << d.g.ClusterBits; d.noTable(off) {
			first = (off/d.g.L2Coverage + 1) * d.g.L2Entries
			continue
		}
		s, n, err := d.lockClusters(ctx, first, end-first)
		if err != nil {
			return err
		}
		host, kept := d.kept(s, first, n, from, to)
		if host == 0 {
			d.m.mu.Unlock()
			first += kept
			continue
		}
		x := &claim{first: first, n: kept}
		d.hold(x, s)
		d.m.mu.Unlock()
		at := first << d.g.ClusterBits
		lo, hi := max(from, at), min(to, at+kept<<d.g.ClusterBits)
		err = f(host+lo-at, hi-lo)
		d.m.mu.Lock()
		d.letGo(x)
		d.m.mu.Unlock()
		if err != nil {
			return err
		}
		first += kept
	}
	return nil
}

// kept is a run of up to n clusters from first on whose host clusters have no
// data in [from, to) and lie at host in a row; or host is 0 and the run has none
// such. With d.m.mu.
func (d *disk) kept(s *slice, first, n, from, to int64) (host, run int64) {
	for ; run < n; run++ {
		c := d.cluster(s, first%d.m.entries+run)
		idle := c.HasHost() && c.Copied && c.Data&d.touched(first+run, from, to) == 0
		switch {
		case run == 0 && idle:
			host = c.Host
		case host == 0 && idle, host != 0 && (!idle || c.Host != host+run<<d.g.ClusterBits):
			return host, run
		}
	}
	return host, run
}

// punchData frees what a data file has of a range. A file that cannot do that
// stays as it is.
func (d *disk) punchData(ctx context.Context, from, to int64) error {
	defer d.use().Release()
	err := d.eachSpan(ctx, from, to-from, func(_ int64, s *Span) error {
		if s.Kind != Data {
			return nil
		}
		return d.data.Punch(ctx, s.Off, s.Len)
	})
	if errors.Is(err, backing.ErrNotSupported) {
		return nil
	}
	return err
}

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
	}
	absent := func(off int64) bool { return !keep && d.belowHas(off) == 0 }
	err := d.eachStretch(ctx, from, to, keep, absent, func(s *slice, first, n int64) (int64, error) {
		return d.eachCluster(s, first, n, from, to, func(old *format.Cluster, subs uint32) (format.Cluster, error) {
			return d.zeroed(old, subs, keep)
		})
	})
	if err == nil && keep {
		err = d.storeKept(ctx, from, to)
	}
	return err
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

// eachStretch calls f for the clusters of [from, to), as many at a time as lie
// in one slice and nobody has claimed, with d.m.mu locked. f says how many of
// them it did; what it cannot do is written as zeroes. None is passed over: an
// error is that of the first one that is not done. Where there is no L2 table
// and absent says that none is needed, f is not called.
func (d *disk) eachStretch(ctx context.Context, from, to int64, keep bool, absent func(off int64) bool, f func(s *slice, first, n int64) (int64, error)) error {
	full := int64(-1)
	for first, end := from>>d.g.ClusterBits, d.g.Clusters(to); first < end; {
		if off := first << d.g.ClusterBits; absent(off) && d.noTable(off) {
			first = (off/d.g.L2Coverage + 1) * d.g.L2Entries
			continue
		}
		if err := d.commits.makeRoom(ctx); err != nil {
			return err
		}
		s, n, err := d.lockClusters(ctx, first, end-first)
		if err == nil {
			n, err = f(s, first, n)
			d.m.mu.Unlock()
		}
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

// eachCluster makes of n clusters from first on what f says, given those of
// their subclusters that lie in [from, to), until f fails. With d.m.mu.
func (d *disk) eachCluster(s *slice, first, n, from, to int64, f func(old *format.Cluster, subs uint32) (format.Cluster, error)) (done int64, err error) {
	for ; done < n; done++ {
		i := first%d.m.entries + done
		old := d.cluster(s, i)
		c, err := f(&old, d.touched(first+done, from, to))
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

// zeroed is a cluster that reads as zeroes in subs. With keep it has a host
// cluster of its own, which need not have storage yet. With d.m.mu.
func (d *disk) zeroed(old *format.Cluster, subs uint32, keep bool) (format.Cluster, error) {
	if subs != d.g.AllSubs() && (old.Compressed || keep && old.HasHost() && !old.Copied) {
		return *old, errMustWrite
	}
	c := format.Cluster{Host: old.Host, Copied: old.Copied, Data: old.Data &^ subs, Zero: old.Zero | subs}
	switch {
	case !keep && c.Data == 0:
		c.Host, c.Copied = format.NoHost, false
	case keep && needsHost(old):
		r, err := d.space.Reserve(d.g.ClusterSize)
		if err != nil {
			return *old, err
		}
		c.Host, c.Copied = r.Off, true
	}
	if d.g.Version < 3 {
		c.Zero = 0
	}
	return c, nil
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
	err := d.eachStretch(ctx, from, to, false, absent, func(s *slice, first, n int64) (int64, error) {
		return d.eachCluster(s, first, n, from, to, func(old *format.Cluster, subs uint32) (format.Cluster, error) {
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

// storeKept gives storage to what host clusters have of whole subclusters of
// [from, to) that were made zero, and makes it zero itself.
func (d *disk) storeKept(ctx context.Context, from, to int64) error {
	return d.eachKept(ctx, from, to, func(host, n int64) error {
		return d.space.Store(ctx, space.Ref{Off: host, Len: n})
	})
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

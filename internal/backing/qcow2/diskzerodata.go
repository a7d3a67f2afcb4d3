package qcow2

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// zeroData makes whole subclusters of a disk with a data file read as zeroes:
// first in the file, where they stay mapped if they are, then in the mapping of
// the others. ErrNotSupported, with nothing changed, where the file cannot and
// the mapping alone does not do: with keep, and for a raw data file, which has
// to have the disk byte for byte.
func (d *disk) zeroData(ctx context.Context, from, to int64, keep bool) error {
	full := int64(-1)
	for first, end := from>>d.g.ClusterBits, d.g.Clusters(to); first < end; {
		off := first << d.g.ClusterBits
		if !keep && d.belowHas(off) == 0 && d.noTable(off) {
			first = (off/d.g.L2Coverage + 1) * d.g.L2Entries
			if !d.rawData() {
				continue
			}
			if err := d.wipeData(ctx, max(from, off), min(to, first<<d.g.ClusterBits), false); err != nil {
				return err
			}
			continue
		}
		if err := d.commits.makeRoom(ctx); err != nil {
			return err
		}
		n, err := d.zeroDataOnce(ctx, first, end-first, from, to, keep)
		if err != nil {
			err = d.overcome(ctx, err, first, &full)
		}
		if err != nil {
			return err
		}
		first += n
	}
	return nil
}

// zeroDataOnce is zeroData for some of n clusters from first on, as far as they
// lie in [from, to), and says for how many. They are claimed meanwhile: whoever
// would fill them with what is below comes before or after.
func (d *disk) zeroDataOnce(ctx context.Context, first, n, from, to int64, keep bool) (done int64, err error) {
	s, n, err := d.lockForChange(ctx, first, n)
	if err != nil {
		return 0, err
	}
	x := &claim{first: first, n: n}
	d.hold(x, s)
	d.m.mu.Unlock()
	err = d.wipeData(ctx, max(from, first<<d.g.ClusterBits), min(to, (first+n)<<d.g.ClusterBits), keep)
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	defer d.letGo(x)
	wiped := err == nil
	if errors.Is(err, backing.ErrNotSupported) && !keep && !d.rawData() {
		err = nil
	}
	if err != nil {
		return 0, err
	}
	for c := first; c < first+n; c++ {
		i := c % d.m.entries
		old := d.cluster(s, i)
		if z := d.zeroedData(c, old, d.touched(c, from, to), keep, wiped); z != old {
			d.set(s, i, z)
			d.m.linked = true // a raw file is to be zero before the mapping says so
		}
	}
	return n, nil
}

// zeroedData is guest cluster c that reads as zeroes in subs. wiped says that
// the data file has zeroes there: what a write in flight brings to a mapped
// cluster then is not hidden.
func (d *disk) zeroedData(c int64, old format.Cluster, subs uint32, keep, wiped bool) format.Cluster {
	z := old
	if !wiped {
		z.Data &^= subs
	}
	z.Zero |= subs &^ z.Data
	if keep && !z.HasHost() {
		z.Host, z.Copied = c<<d.g.ClusterBits, true
	}
	return z
}

// wipeData makes a range of the data file zero, as far as the disk goes; with
// keep it has storage then.
func (d *disk) wipeData(ctx context.Context, off, end int64, keep bool) error {
	n := min(end, d.reach.Load()) - off
	if keep {
		return d.data.Zero(ctx, off, n)
	}
	return d.data.Punch(ctx, off, n)
}

// rawData reports whether the data file has the disk byte for byte.
func (d *disk) rawData() bool { return d.header.Autoclear&format.AutoclearRawData != 0 }

package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var _ backing.Resizer = (*disk)(nil)

// Resize makes the disk larger, to a multiple of 512 bytes. The bitmaps grow
// with it; whoever finds the image before it was closed does not believe them.
func (d *disk) Resize(ctx context.Context, size int64) error {
	d.resizing.Lock()
	defer d.resizing.Unlock()
	old := d.size.Load()
	err := d.canResize(ctx, old, size)
	if err != nil || size == old {
		return d.wrap("resize", size, 0, err)
	}
	err = d.commits.exclusive(func() error { return d.bitmaps.BeginGrowth(ctx, size) })
	if err == nil {
		err = d.grow(ctx, old, size)
	}
	if err != nil {
		return d.wrap("resize", size, 0, err)
	}
	d.bitmaps.Grown(size)
	d.size.Store(size)
	return nil
}

// grow changes the files, the size in the header last. If it fails the mapping ends
// where the disk does.
func (d *disk) grow(ctx context.Context, old, size int64) error {
	err := d.growData(ctx, old, size)
	if err == nil {
		err = d.moveEnd(ctx, size)
	}
	if err == nil {
		err = d.clearTail(ctx, old, size)
	}
	if err == nil {
		err = d.commits.exclusive(func() error {
			return d.writeHeader(ctx, binary.BigEndian.AppendUint64(nil, uint64(size)), format.OffSize)
		})
	}
	if err != nil {
		d.reach.Store(old)
		d.cutData(ctx, old)
	}
	return err
}

// canResize refuses what the format or this package cannot do.
func (d *disk) canResize(ctx context.Context, old, size int64) error {
	h := d.header
	var why error
	switch {
	case size < old:
		why = errors.New("a disk cannot shrink")
	case h.Version < 3 && h.Snapshots > 0:
		why = errors.New("the image is of version 2 and has snapshots, which have no size of their own")
	case size%512 != 0:
		return invalid(d.path, "size %d is not a multiple of 512", size)
	case d.g.L1Size(size) > format.MaxL1/8:
		return invalid(d.path, "size %d is too large for clusters of %d bytes", size, d.g.ClusterSize)
	}
	if why == nil {
		why = d.bitmaps.CanGrow(size)
	}
	if why == nil {
		why = d.snapshotsHaveSizes(ctx)
	}
	if why == nil {
		why = d.noVMState(ctx, size)
	}
	if why == nil {
		why = d.dataHasRoom(size)
	}
	if why != nil {
		return &backing.Error{Op: "resize", Path: d.path, Off: -1, Kind: backing.ErrNotSupported, Err: why}
	}
	return nil
}

// snapshotsHaveSizes refuses to grow those that are as large as the disk is.
func (d *disk) snapshotsHaveSizes(ctx context.Context) error {
	list, _, err := ReadSnapshots(ctx, d.st, d.header, limits.SnapshotTable)
	if err != nil {
		return err
	}
	for i := range list {
		if list[i].DiskSize == 0 {
			return fmt.Errorf("the snapshot %.80q has no size of its own", list[i].Name)
		}
	}
	return nil
}

// noVMState refuses to make part of the disk what the L1 table has behind it, if
// that has data: QEMU keeps a VM state there until the snapshot is made that it
// belongs to. An image without snapshots has none, whatever was left behind.
func (d *disk) noVMState(ctx context.Context, size int64) error {
	if d.header.Snapshots == 0 {
		return nil
	}
	behind, err := d.behind(ctx, d.g.L1Size(size))
	if err != nil {
		return err
	}
	for _, e := range behind {
		if err := d.noData(ctx, e); err != nil {
			return err
		}
	}
	return nil
}

// noData refuses an L2 table, which an L1 entry names, with an entry for data.
func (d *disk) noData(ctx context.Context, e uint64) error {
	table, _, err := d.g.DecodeL1(e)
	if err != nil || table == 0 {
		return err
	}
	words := make([]uint64, d.m.entries*d.g.EntrySize/8)
	for k := range d.perTable() {
		if err := d.readWords(ctx, words, table+k*d.m.entries*d.g.EntrySize); err != nil {
			return err
		}
		s := &slice{words: words}
		for i := range d.m.entries {
			c, err := d.g.DecodeL2(d.entry(s, i))
			if err != nil {
				return err
			}
			if c.Compressed || c.HasHost() {
				return errors.New("the image has a VM state behind the disk")
			}
		}
	}
	return nil
}

// behind is what the L1 table in the file has behind the one in memory, up to that
// many entries of it.
func (d *disk) behind(ctx context.Context, entries int64) ([]uint64, error) {
	d.m.mu.RLock()
	from := int64(len(d.m.l1))
	d.m.mu.RUnlock()
	words := make([]uint64, max(0, min(entries, int64(d.header.L1Size))-from))
	for at := 0; at < len(words); {
		n := min(len(words)-at, limits.MaxTableRead/8)
		if err := d.readWords(ctx, words[at:at+n], int64(d.header.L1Offset)+(from+int64(at))*8); err != nil {
			return nil, err
		}
		at += n
	}
	return words, nil
}

// dataHasRoom refuses what a block device that is the data file cannot hold.
func (d *disk) dataHasRoom(size int64) error {
	if !d.g.DataFile || !d.data.Fixed() {
		return nil
	}
	end, err := d.data.Size()
	if err == nil && end < size {
		err = fmt.Errorf("the block device of the data file has %d bytes, it must be made larger first", end)
	}
	return err
}

// growData makes the data file, if there is one, as long as the disk is to be,
// durably. What a raw one has behind the old end becomes zero: the new size makes
// it the disk's.
func (d *disk) growData(ctx context.Context, old, size int64) error {
	if !d.g.DataFile {
		return nil
	}
	end, err := d.data.Size()
	if n := min(end, size) - old; err == nil && n > 0 && d.rawData() {
		err = d.clearData(ctx, old, n)
	}
	if err == nil && !d.data.Fixed() {
		err = d.data.Truncate(size)
	}
	if err != nil {
		return err
	}
	return d.data.Sync(ctx)
}

// cutData lets the data file end where the disk does, after a growth that failed: a
// raw one is to have the disk and no more. It stays as long as it is where nobody
// knows what the header says. The caller has set reach to size before; what filled
// the last cluster beyond it is waited for, whether ctx has ended or not.
func (d *disk) cutData(ctx context.Context, size int64) {
	if !d.g.DataFile || d.data.Fixed() || d.writable() != nil {
		return
	}
	d.m.mu.RLock()
	last := d.claimed(size>>d.g.ClusterBits, 1)
	d.m.mu.RUnlock()
	if last != nil {
		_ = last.wait(context.WithoutCancel(ctx)) // it cannot give up
	}
	if err := d.data.Truncate(size); err != nil {
		d.log.Warn("data file could not be cut to the size of the disk, which has not grown",
			"path", d.path, "bytes", size, "error", err)
	}
}

// clearData makes a range of the data file zero, in the quickest way that it
// knows.
func (d *disk) clearData(ctx context.Context, off, n int64) error {
	err := d.data.Punch(ctx, off, n)
	if errors.Is(err, backing.ErrNotSupported) {
		err = d.data.Zero(ctx, off, n)
	}
	if !errors.Is(err, backing.ErrNotSupported) {
		return err
	}
	for end := off + n; off < end; off += n {
		n = min(end-off, int64(len(zeroBlock)))
		if err := d.data.WriteAt(ctx, zeroBlock[:n], off, false); err != nil {
			return err
		}
	}
	return nil
}

// moveEnd makes the mapping go up to size. It waits for those who count on the
// end that the disk has.
func (d *disk) moveEnd(ctx context.Context, size int64) error {
	l, err := d.ends.Lock(ctx, 0, 1, true)
	if err != nil {
		return err
	}
	defer l.Release()
	return d.commits.exclusive(func() error { return d.growL1(ctx, size) })
}

// growL1 gives the mapping the entries that a disk of size bytes needs, in the
// file first. Tables that the file has there, of a growth that was cut off or of a
// VM state that is gone, become the disk's: clearTail makes them zero. With
// commits.one.
func (d *disk) growL1(ctx context.Context, size int64) error {
	entries := d.g.L1Size(size)
	behind, err := d.behind(ctx, entries)
	if err != nil {
		return err
	}
	d.m.mu.Lock()
	d.m.l1 = append(d.m.l1, behind...)
	d.m.mu.Unlock()
	if entries > int64(d.header.L1Size) {
		if err := d.moveL1(ctx, entries); err != nil {
			return err
		}
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.m.l1 = append(d.m.l1, make([]uint64, max(0, entries-int64(len(d.m.l1))))...)
	d.reach.Store(size)
	return nil
}

// moveL1 writes the L1 table anew, with that many entries, and names it in the
// header.
func (d *disk) moveL1(ctx context.Context, entries int64) error {
	if err := d.commit(ctx); err != nil {
		return err
	}
	old := space.Ref{Off: int64(d.header.L1Offset), Len: int64(d.header.L1Size) * 8}
	run, err := d.space.ReserveMeta(d.g.Clusters(entries*8) << d.g.ClusterBits)
	if err != nil {
		return err
	}
	err = d.space.Fund(ctx)
	if err == nil {
		err = d.writeL1(ctx, run)
	}
	if err != nil {
		d.space.Drop(run.Off, run.Len)
		return err
	}
	p := binary.BigEndian.AppendUint32(nil, uint32(entries))
	p = binary.BigEndian.AppendUint64(p, uint64(run.Off))
	if err := d.writeHeader(ctx, p, format.OffL1); err != nil {
		return err // the header may name it or not: a leak
	}
	d.header.L1Offset, d.header.L1Size = uint64(run.Off), uint32(entries)
	return d.space.Release(context.WithoutCancel(ctx), []space.Ref{old})
}

// writeHeader makes p, which lies in one sector, a durable part of the header,
// also for a caller who gives up. After an error nobody knows what the header
// says. A commit could go to tables that it does not name, so there are no more.
// With commits.one.
func (d *disk) writeHeader(ctx context.Context, p []byte, off int64) error {
	ctx = context.WithoutCancel(ctx)
	err := d.st.WriteAt(ctx, p, off, false)
	if err == nil {
		err = d.st.Sync(ctx)
	}
	if err == nil {
		return nil
	}
	lost := &backing.Error{Op: "write header", Path: d.path, Off: -1, Kind: backing.ErrPoisoned, Err: err}
	d.log.Error("it is not known what the header says, image takes no more writes until it is opened anew",
		"path", d.path, "error", err)
	d.stopWrites(lost)
	return err
}

// writeL1 makes a copy of the L1 table in the file durable.
func (d *disk) writeL1(ctx context.Context, run space.Run) error {
	if err := d.space.Store(ctx, space.Ref{Off: run.Off, Len: run.Len}); err != nil {
		return err
	}
	words := make([]uint64, run.Len/8)
	d.m.mu.RLock()
	copy(words, d.m.l1)
	for i, f := range d.m.fresh {
		words[i] = f.entry
	}
	d.m.mu.RUnlock()
	for at := run.Off; len(words) > 0; {
		n := min(len(words), limits.MaxTableRead/8)
		if err := d.writeWords(ctx, words[:n], at); err != nil {
			return err
		}
		words, at = words[n:], at+int64(n)*8
	}
	if err := d.space.Write(ctx); err != nil {
		return err
	}
	return d.st.Sync(ctx)
}

// clearTail makes zeroes of what is new and is there already: the rest of the
// last cluster, what a backing file has, and what has a table.
func (d *disk) clearTail(ctx context.Context, old, size int64) error {
	end := (old + d.g.ClusterSize - 1) &^ (d.g.ClusterSize - 1)
	end = min(size, max(end, old+d.belowHas(old), d.tablesEnd(old)))
	if end <= old {
		return nil
	}
	err := d.zero(ctx, old, end-old, 0)
	if errors.Is(err, backing.ErrNotSupported) {
		err = d.zeroAll(ctx, old, end)
	}
	if err != nil {
		return fmt.Errorf("clearing what is behind the disk: %w", err)
	}
	return d.Flush(ctx)
}

// tablesEnd is how far the last L2 table goes that is not needed for a disk of old
// bytes, 0 if there is none.
func (d *disk) tablesEnd(old int64) int64 {
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	for i := int64(len(d.m.l1)); i > d.g.L1Size(old); i-- {
		if d.m.l1[i-1] != 0 {
			return i * d.g.L2Coverage
		}
	}
	return 0
}

// zeroAll writes zeroes to what is not zero of a range.
func (d *disk) zeroAll(ctx context.Context, off, end int64) error {
	for n := int64(0); off < end; off += n {
		n = min(end-off, int64(len(zeroBlock)))
		if err := d.zeroBytes(ctx, off, off+n, false); err != nil {
			return err
		}
	}
	return nil
}

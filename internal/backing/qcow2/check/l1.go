package check

import (
	"encoding/binary"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func (w *walker) activeL1() error {
	return w.l1Table(int64(w.h.L1Offset), int64(w.h.L1Size), true, "the active L1 table")
}

// l1Table counts an L1 table and notes its L2 tables.
func (w *walker) l1Table(off, entries int64, active bool, what string) error {
	n := entries * 8
	if n == 0 {
		return nil
	}
	w.ref(off, n, 1, what)
	w.claim(off, n, what)
	if off < 0 || off >= w.size {
		return nil
	}
	// Tables of a sound image do not overlap, so that they all fit.
	if w.l1Read += n; w.l1Read > w.size+w.g.ClusterSize {
		w.corrupt(1, "%s at %#x: the L1 tables are larger than the file", what, off)
		return nil
	}
	return w.eachPiece(off, n, func(at int64, p []byte) {
		for i := int(at-off) / 8; len(p) >= 8; p = p[8:] {
			w.l1Entry(binary.BigEndian.Uint64(p), i, active, what)
			i++
		}
	})
}

// l1Entry takes an entry apart itself, as all of the walker: what is wrong in
// one place says nothing about the others.
func (w *walker) l1Entry(e uint64, i int, active bool, what string) {
	if e == 0 {
		return
	}
	off := int64(e & format.OffsetMask)
	if e&format.L1Reserved != 0 {
		w.corrupt(1, "%s, entry %d: %#x has reserved bits set", what, i, e)
	}
	if off == 0 {
		if e&format.FlagCopied != 0 {
			w.corrupt(1, "%s, entry %d: %#x is marked copied and has no table", what, i, e)
		}
		return
	}
	if n := w.stored(off >> w.g.ClusterBits); active && (e&format.FlagCopied != 0) != (n == 1) {
		w.corrupt(1, "%s, entry %d: %#x has the wrong copied flag: refcount is %d", what, i, e, n)
		if n == 1 {
			w.r.unmarked++
		}
	}
	inFile := w.ref(off, w.g.ClusterSize, 1, "L2 table")
	if !w.g.Aligned(off) {
		w.corrupt(1, "%s, entry %d: L2 table at %#x is not on a cluster boundary", what, i, off)
		return
	}
	if !inFile {
		return
	}
	w.tables.add(off, i, active)
}

// snapshots counts the snapshot table and the L1 tables of all snapshots.
func (w *walker) snapshots() error {
	n, off := int(w.h.Snapshots), int64(w.h.SnapshotsOffset)
	if n == 0 {
		return nil
	}
	if w.g.DataFile {
		w.corrupt(1, "%d snapshots in an image with a data file", n)
	}
	list, used := w.snapshotTable(off, n)
	if list == nil {
		return nil
	}
	w.ref(off, used, 1, "the snapshot table")
	w.claim(off, used, "the snapshot table")
	for i := range list {
		s := &list[i]
		if w.h.Version >= 3 && !s.HasDiskSize() && !w.o.Sound {
			w.corrupt(1, "snapshot %q: the entry is incomplete, it does not say how large the disk was", s.Name)
		}
		switch {
		case !w.g.Aligned(s.L1Offset):
			w.corrupt(1, "snapshot %q: L1 table at %#x is not on a cluster boundary", s.Name, s.L1Offset)
		case s.L1Size > format.MaxL1/8:
			w.corrupt(1, "snapshot %q: L1 table of %d entries is too large", s.Name, s.L1Size)
		default:
			if err := w.l1Table(s.L1Offset, int64(s.L1Size), false, "the L1 table of a snapshot"); err != nil {
				return err
			}
		}
	}
	return nil
}

// snapshotTable reads the table, whose size only its entries tell: more and
// more of it until all are there.
func (w *walker) snapshotTable(off int64, n int) (list []format.Snapshot, used int64) {
	var err error
	for size := max(limits.CheckPiece, w.h.LeastSnapshotTable()); ; size *= 4 {
		all := size >= limits.CheckTable || size >= w.size-off
		p := make([]byte, max(0, min(size, limits.CheckTable, w.size-off)))
		if !w.read(p, off) {
			return nil, 0
		}
		var took int
		if list, took, err = format.ParseSnapshots(p, n); err == nil {
			return list, int64(took)
		}
		if all {
			w.corrupt(1, "%v", err)
			return nil, 0
		}
	}
}

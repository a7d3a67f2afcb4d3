package check

import (
	"encoding/binary"
	"maps"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// l2Tables claims all L2 tables, then walks them in the order of the file.
func (w *walker) l2Tables() error {
	offs := slices.Sorted(maps.Keys(w.tables))
	for _, off := range offs {
		w.claim(off, w.g.ClusterSize, "L2 table")
	}
	for _, off := range offs {
		t := l2Table{walker: w, off: off, weight: w.tables[off]}
		err := w.eachPiece(off, w.g.ClusterSize, func(at int64, p []byte) {
			for ; int64(len(p)) >= w.g.EntrySize; p = p[w.g.EntrySize:] {
				bitmap := uint64(0)
				if w.g.Extended {
					bitmap = binary.BigEndian.Uint64(p[8:])
				}
				t.entry(binary.BigEndian.Uint64(p), bitmap)
			}
		})
		if err != nil {
			return err
		}
		w.progress(w.g.ClusterSize)
	}
	return nil
}

// l2Table is the walk of one L2 table.
type l2Table struct {
	*walker
	weight
	off  int64
	next int64 // where the next cluster lies if nothing is fragmented
	i    int   // index of the entry
}

// bad counts a corruption of the current entry for each reference to the
// table.
func (t *l2Table) bad(text string, e uint64, args ...any) { t.badTimes(t.all, text, e, args...) }

// badTimes counts a corruption of the current entry n times.
func (t *l2Table) badTimes(n uint64, text string, e uint64, args ...any) {
	t.corrupt(n, "L2 table at %#x, entry %d: %#x "+text, append([]any{t.off, t.i, e}, args...)...)
}

func (t *l2Table) entry(e, bitmap uint64) {
	if e != 0 || bitmap != 0 {
		if e&format.FlagCompressed != 0 {
			t.compressed(e, bitmap)
		} else {
			t.standard(e, bitmap)
		}
	}
	t.i++
}

func (t *l2Table) compressed(e, bitmap uint64) {
	if e&format.FlagCopied != 0 {
		t.bad("is compressed and marked copied", e)
		e &^= format.FlagCopied
	}
	switch {
	case t.g.DataFile:
		t.bad("is compressed, in an image with a data file", e)
		return
	case bitmap != 0:
		t.bad("is compressed and has a subcluster bitmap", e)
		return
	}
	shift := 62 - (t.g.ClusterBits - 8)
	host := int64(e & (1<<shift - 1))
	n := (int64(e&^format.FlagCompressed>>shift)+1)*512 - host&511
	t.r.AllocatedClusters += int64(t.active)
	t.r.CompressedClusters += int64(t.active)
	t.r.FragmentedClusters += int64(t.active)
	if t.ref(host, n, t.all, "compressed cluster") {
		t.overlap(host, n, e)
	}
}

// overlap notes data that lie in metadata.
func (t *l2Table) overlap(off, n int64, e uint64) {
	for c := off >> t.g.ClusterBits; c <= (off+n-1)>>t.g.ClusterBits; c++ {
		if t.r.Meta.Has(c) && t.over.Add(c) {
			t.note(false, "L2 table at %#x, entry %d: %#x points into metadata", t.off, t.i, e)
		}
	}
}

func (t *l2Table) standard(e, bitmap uint64) {
	if e&format.L2Reserved != 0 {
		t.bad("has reserved bits set", e)
	}
	off, copied := int64(e&format.OffsetMask), e&format.FlagCopied != 0
	zero := e&format.FlagZero != 0 && !t.g.Extended
	if zero && t.g.Version < 3 {
		t.bad("of a version 2 image has the zero flag set", e)
	}
	if off == 0 && !(t.g.DataFile && copied) {
		switch {
		case copied:
			t.bad("is marked copied and has no cluster", e)
		case uint32(bitmap) != 0:
			t.bad("has data in subclusters and no cluster", e)
		}
		return
	}
	t.cluster(off, copied, e, bitmap)
}

// cluster counts a cluster that the entry has for itself.
func (t *l2Table) cluster(off int64, copied bool, e, bitmap uint64) {
	t.copied(off, copied, e)
	if uint32(bitmap)&uint32(bitmap>>32) != 0 {
		t.bad("has subclusters both allocated and zero: %#x", e, bitmap)
	}
	if !t.g.Aligned(off) {
		t.bad("has a cluster that is not on a cluster boundary", e)
	}
	t.r.AllocatedClusters += int64(t.active)
	if t.next != 0 && off != t.next {
		t.r.FragmentedClusters += int64(t.active)
	}
	t.next = off + t.g.ClusterSize
	if !t.g.DataFile && t.ref(off, t.g.ClusterSize, t.all, "cluster") {
		t.overlap(off, t.g.ClusterSize, e)
	}
}

// copied checks the flag that says "refcount 1": only the active L1 table is
// held to it. Clusters of a data file have no refcounts.
func (t *l2Table) copied(off int64, copied bool, e uint64) {
	if t.active == 0 || t.g.DataFile {
		return
	}
	if n := t.stored(off >> t.g.ClusterBits); copied != (n == 1) {
		t.badTimes(t.active, "has the wrong copied flag: refcount is %d", e, n)
	}
}

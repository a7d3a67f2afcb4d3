package check

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// table is an L2 table, and how often it is referenced: by all L1 tables, and by
// the active one. It is read once, and what it has counts as often.
type table struct {
	off         int64
	all, active uint64
	index       int64 // the first entry of the active L1 table that names it, MaxInt64 for none
}

// tables are L2 tables. After merge each is there once, in the order of the
// file. They take 32 bytes each, twice as much while they are gathered.
type tables struct{ list []table }

// add counts a reference to the table at off, by entry i of an L1 table.
func (l *tables) add(off int64, i int, active bool) {
	t := table{off: off, all: 1, index: math.MaxInt64}
	if active {
		t.active, t.index = 1, int64(i)
	}
	if len(l.list) == cap(l.list) {
		l.merge()
		l.list = slices.Grow(l.list, max(256, len(l.list)))
	}
	l.list = append(l.list, t)
}

func (l *tables) merge() {
	slices.SortFunc(l.list, func(a, b table) int { return cmp.Compare(a.off, b.off) })
	merged := l.list[:0]
	for _, t := range l.list {
		if last := len(merged) - 1; last >= 0 && merged[last].off == t.off {
			merged[last].all += t.all
			merged[last].active += t.active
			merged[last].index = min(merged[last].index, t.index)
			continue
		}
		merged = append(merged, t)
	}
	l.list = merged
}

// l2Tables claims all L2 tables, then walks them in the order of the file.
func (w *walker) l2Tables() error {
	for _, t := range w.tables.list {
		w.claim(t.off, w.g.ClusterSize, "L2 table")
	}
	for _, found := range w.tables.list {
		t := l2Table{walker: w, table: found}
		err := w.eachPiece(t.off, w.g.ClusterSize, func(at int64, p []byte) {
			for t.i = int((at - t.off) / w.g.EntrySize); int64(len(p)) >= w.g.EntrySize; p = p[w.g.EntrySize:] {
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
	table
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
	if !t.ref(host, n, t.all, "compressed cluster") {
		return
	}
	if host >= t.size {
		t.bad("is compressed, and its data begin behind the end of the file", e)
	}
	t.overlap(host, n, e)
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
	} else if t.g.DataFile {
		t.placed(off, e)
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
		if n == 1 {
			t.r.unmarked += int64(t.active)
		}
	}
}

// placed checks that a cluster of a data file lies at its guest offset (section
// "Header", incompatible_features, bit 2), which it does for one reference to the
// table at most. Such an image has no snapshots: only the active L1 table counts.
func (t *l2Table) placed(off int64, e uint64) {
	if t.active == 0 {
		return
	}
	guest, wrong := (t.index*t.g.L2Entries+int64(t.i))<<t.g.ClusterBits, t.active
	if off == guest {
		wrong--
	}
	t.badTimes(wrong, "has a cluster of the data file and is not at its place: guest offset %#x", e, guest)
}

// Package check walks all metadata of a qcow2 image, counts the references to
// each host cluster and compares them with the refcounts. It shares only the
// decoding of bytes with the reader and the writer, so that it can judge them.
//
// The image is hostile: a table is read only as far as the file goes, once,
// and in pieces, and not where it is a hole; memory is taken for what the file
// has, not for what its header says. What has references and no refcount takes
// memory as well, but where only a sound image is wanted.
package check

import (
	"context"
	"fmt"
	"math"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/clusters"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Options of a check. The zero value checks everything, in silence.
type Options struct {
	// Progress is told how many bytes of mapping and refcounts are done, of
	// how many. It is called often, from the goroutine of Run.
	Progress func(done, total int64)

	// Sound ends the check with the first thing that is wrong, but for leaks:
	// Run answers it, as a format.Corrupt. Its memory is then a few bytes for
	// each entry of an L1 table, and at most three times what the refcounts
	// take on the host, in its blocks of 4 KiB: whatever entries name, it is
	// looked at only as far as refcounts tell of it. Snapshots that do not say
	// how large their disk was are sound: that a disk grows is what harms them.
	Sound bool
}

// Problem is something that is wrong with an image.
type Problem struct {
	Leak bool   // storage is lost; all else is corruption
	Text string // for people; names from the file are quoted
}

// Report is what a check found. Numbers are those that qemu-img check shows.
type Report struct {
	Corruptions int64 // what can or did destroy data
	Leaks       int64 // clusters whose refcount is too high
	Errors      int64 // reads that failed: the rest is not to be relied on

	// Problems are the first limits.CheckProblems of what was found.
	Problems []Problem

	TotalClusters      int64 // of the disk
	AllocatedClusters  int64 // of them, mapped by the active L1 table
	FragmentedClusters int64 // not behind their predecessor in the file
	CompressedClusters int64
	ImageEnd           int64 // offset behind the last cluster in use

	// Used are the clusters whose refcount is above 0, Meta those that hold
	// metadata: anything but guest data.
	Used, Meta *clusters.Set

	leaked   *clusters.Set
	refs     *counts
	unmarked int64 // of Corruptions: entries without the copied flag, of refcount 1
}

// Run checks the image with header h in st; it writes nothing. What is wrong
// with the image is in the report. Errors are that of Options.Sound, that of a
// context that ended, and that of a file that does not tell its size.
func Run(ctx context.Context, st store.Store, h *format.Header, o Options) (*Report, error) {
	size, err := st.Size()
	if err != nil {
		return nil, err
	}
	w := &walker{
		ctx: ctx, st: st, h: h, g: h.Geometry(), o: o, size: size,
		r:      &Report{Used: new(clusters.Set), Meta: new(clusters.Set), leaked: new(clusters.Set), refs: newCounts()},
		pieces: map[int64][]byte{},
		over:   new(clusters.Set),
	}
	w.r.TotalClusters = w.g.Clusters(int64(min(h.Size, math.MaxInt64)))
	if err := w.run(); err != nil {
		return nil, err
	}
	return w.r, nil
}

// walker is a check in progress.
type walker struct {
	ctx  context.Context
	st   store.Store
	h    *format.Header
	g    format.Geometry
	o    Options
	size int64 // of the file in bytes
	r    *Report

	tables tables           // L2 tables in the file
	blocks []block          // refcount blocks, by index
	over   *clusters.Set    // metadata that something else points into
	pieces map[int64][]byte // of refcount blocks, by offset
	last   []byte           // the piece that was looked at last
	lastAt int64            // its offset, where there is one
	seen   stretch          // of the file
	l1Read int64            // bytes of L1 tables
	bmRead int64            // bytes of bitmap tables
	done   int64            // bytes for Progress
	total  int64            // bytes for Progress
	wrong  error            // what ends the check, by Options.Sound
	buf    [limits.CheckPiece]byte
}

// stretch is [from, to) of the file, a hole or data.
type stretch struct {
	from, to int64
	hole     bool
}

func (w *walker) run() error {
	steps := []func() error{
		w.refTable, w.header, w.refMeta, w.activeL1, w.snapshots, w.bitmaps, w.plan, w.l2Tables, w.refBlocks, w.compare,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
		if err := w.halted(); err != nil {
			return err
		}
	}
	return nil
}

// halted says why the check does not go on.
func (w *walker) halted() error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	return w.wrong
}

func (w *walker) header() error {
	w.claim(0, w.g.ClusterSize, "the header")
	w.ref(0, w.g.ClusterSize, 1, "the header")
	return nil
}

// plan adds up the work to come.
func (w *walker) plan() error {
	w.tables.merge()
	n := int64(len(w.tables.list))
	for _, b := range w.blocks {
		if b.off != 0 {
			n++
		}
	}
	w.total = n * w.g.ClusterSize
	return nil
}

func (w *walker) progress(n int64) {
	w.done += n
	if w.o.Progress != nil {
		w.o.Progress(min(w.done, w.total), w.total)
	}
}

// corrupt counts a corruption n times.
func (w *walker) corrupt(n uint64, text string, args ...any) {
	if n == 0 {
		return
	}
	w.r.Corruptions += int64(min(n, uint64(math.MaxInt64-w.r.Corruptions)))
	w.note(false, text, args...)
}

func (w *walker) note(leak bool, text string, args ...any) {
	if w.o.Sound && !leak && w.wrong == nil {
		w.wrong = format.Corrupt(fmt.Sprintf(text, args...))
	}
	if len(w.r.Problems) < limits.CheckProblems {
		w.r.Problems = append(w.r.Problems, Problem{leak, fmt.Sprintf(text, args...)})
	}
}

// read fills p from off; what lies beyond the end of the file is zero. It
// reports whether p has what the file has.
func (w *walker) read(p []byte, off int64) bool {
	n := 0
	if off < w.size {
		var err error
		if n, err = w.st.ReadAt(w.ctx, p, off); err != nil {
			clear(p)
			w.r.Errors++
			w.note(false, "%d bytes at %#x cannot be read: %v", len(p), off, err)
			return false
		}
	}
	clear(p[n:])
	return true
}

// hole reports whether the n bytes at off are a hole, as far as they lie in the
// file: they are zero and need not be read.
func (w *walker) hole(off, n int64) bool {
	if off < w.seen.from || off >= w.seen.to {
		length, hole, err := store.Stretch(w.ctx, w.st, off, w.size-off)
		if err != nil { // whoever reads it finds out
			length, hole = n, false
		}
		w.seen = stretch{off, off + length, hole}
	}
	return w.seen.hole && min(off+n, w.size) <= w.seen.to
}

// eachPiece calls f for the n bytes at off, at most limits.CheckPiece at a time,
// as far as they lie in the file and are no hole: an entry that is zero says
// nothing.
func (w *walker) eachPiece(off, n int64, f func(at int64, p []byte)) error {
	end := off + min(n, max(0, w.size-off))
	for off < end {
		if err := w.halted(); err != nil {
			return err
		}
		p := w.buf[:min(limits.CheckPiece, end-off)]
		if !w.hole(off, int64(len(p))) && w.read(p, off) {
			f(off, p)
		}
		off += int64(len(p))
	}
	return nil
}

// ref counts times references to the n bytes at off, which may end less than
// a cluster behind the end of the file. It reports whether they do.
func (w *walker) ref(off, n int64, times uint64, what string) bool {
	if n <= 0 {
		return true
	}
	if off < 0 || off > math.MaxInt64-n || off+n-w.size >= w.g.ClusterSize {
		w.corrupt(times, "%s at %#x lies beyond the end of the file", what, off)
		return false
	}
	limit := w.g.MaxRefcount()
	for c := off >> w.g.ClusterBits; c <= (off+n-1)>>w.g.ClusterBits; c++ {
		if !w.counted(c, times) {
			return false
		}
		if over := w.r.refs.add(c, times, limit); over > 0 {
			w.corrupt(over, "cluster %d has more references than its refcount can tell", c)
		}
	}
	return true
}

// counted reports whether the refcount of c has room for n more references than
// are known. That it has not is found in the end, of all clusters: only a check
// for a sound image ends here, before it takes memory for them.
func (w *walker) counted(c int64, n uint64) bool {
	if !w.o.Sound {
		return true
	}
	stored, known := w.stored(c), w.r.refs.get(c)
	if known <= stored && n <= stored-known {
		return true
	}
	w.corrupt(1, "cluster %d: refcount is %d, and there are more references", c, stored)
	return false
}

// claim notes that the n bytes at off hold metadata. It is false where they
// lie beyond the file or there is other metadata already.
func (w *walker) claim(off, n int64, what string) bool {
	if n <= 0 || off < 0 || off > math.MaxInt64-n || off+n-w.size >= w.g.ClusterSize {
		return false
	}
	free := true
	for c := off >> w.g.ClusterBits; c <= (off+n-1)>>w.g.ClusterBits; c++ {
		if !w.r.Meta.Add(c) {
			free = false
			if w.over.Add(c) {
				w.note(false, "%s at %#x overlaps other metadata", what, off)
			}
		}
	}
	return free
}

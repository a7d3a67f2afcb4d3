package qcow2

import (
	"context"
	"fmt"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// tableBuffers are free buffers for pieces of tables.
var tableBuffers = sync.Pool{New: func() any { return new(tableBuffer) }}

// merger puts neighbours together that are one span.
type merger struct {
	yield   func(Span) bool
	pending Span
	done    bool // yield wants no more
}

// add appends a span and reports whether more is wanted.
func (m *merger) add(s Span) bool {
	if m.pending.Len > 0 && continues(&m.pending, &s) {
		m.pending.Len += s.Len
		return true
	}
	m.flush()
	m.pending = s
	return !m.done
}

// flush yields what is left.
func (m *merger) flush() {
	if m.pending.Len > 0 && !m.done {
		m.done = !m.yield(m.pending)
	}
	m.pending = Span{}
}

// continues reports whether b goes on where a ends. Of damaged neighbours the
// first says what is wrong.
func continues(a, b *Span) bool {
	switch {
	case a.Kind != b.Kind || a.Kind == Compressed:
		return false
	case a.Kind == Data:
		return a.Store == b.Store && a.Off+a.Len == b.Off
	case a.Kind == Zero:
		return a.Store == b.Store && (a.Store == nil || a.Off+a.Len == b.Off)
	}
	return true
}

// checkRange refuses a range that does not lie in a layer of size bytes.
func checkRange(op, path string, off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return &backing.Error{Op: op, Path: path, Off: off, Len: n, Kind: backing.ErrOutOfRange}
	}
	return nil
}

// walk is one call of Spans.
type walk struct {
	*Image
	merger
	off, end int64     // guest range that is still to come
	free     hostRange // known to have no metadata
}

// Spans reads the L2 tables of the range as they are in the file: nothing is
// kept between calls. What an entry says against the format, or a place where
// no cluster can be, is a Damaged span; an error means that a table could not
// be read, and spans yielded before it hold.
func (m *Image) Spans(ctx context.Context, off, n int64, yield func(Span) bool) error {
	if err := checkRange("map", m.path, off, n, m.size); err != nil {
		return err
	}
	w := walk{Image: m, merger: merger{yield: yield}, off: off, end: off + n}
	for w.off < w.end && !w.done {
		err := ctx.Err()
		if err == nil {
			err = w.table(ctx)
		}
		if err != nil {
			w.flush()
			return backing.WithPath(m.path, err)
		}
	}
	w.flush()
	return nil
}

// table does what remains of the range of one L2 table.
func (w *walk) table(ctx context.Context) error {
	g := &w.g
	i, inside := w.off/g.L2Coverage, w.off%g.L2Coverage
	n := min(w.end-w.off, g.L2Coverage-inside)
	table, err := w.tableAt(be64(w.l1[i*8:]))
	switch {
	case err != nil:
		w.damaged(n, err)
		return nil
	case table == 0:
		w.emit(Span{Kind: Absent, Len: n})
		return nil
	}
	b := tableBuffers.Get().(*tableBuffer)
	defer tableBuffers.Put(b)
	for end := w.off + n; w.off < end && !w.done; {
		first := w.off % g.L2Coverage >> g.ClusterBits
		last := (w.off%g.L2Coverage + end - w.off - 1) >> g.ClusterBits
		count := min(last-first+1, int64(len(b))/g.EntrySize)
		p := b[:count*g.EntrySize]
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := store.ReadPadded(ctx, w.st, p, table+first*g.EntrySize); err != nil {
			return err
		}
		w.entries(p, end)
	}
	return nil
}

// tableAt is where the L2 table of an L1 entry lies, 0 for none.
func (w *walk) tableAt(e uint64) (int64, error) {
	if w.lenient {
		e &^= format.L1Reserved
	}
	off, _, err := w.g.DecodeL1(e)
	if err == nil && off != 0 && !w.lenient {
		err = w.checkTable(off)
	}
	return off, err
}

// checkTable says why no L2 table can be at off. The last one of a file may be
// missing in part.
func (w *walk) checkTable(off int64) error {
	switch free := w.fixed.gap(off); {
	case off >= w.stSize:
		return format.Corrupt(fmt.Sprintf("L2 table at %#x lies beyond the end of the file", off))
	case off+w.g.ClusterSize > free.to:
		return format.Corrupt(fmt.Sprintf("L2 table at %#x lies in other metadata", off))
	}
	return nil
}

// entries does the clusters of some neighbouring entries, up to end.
func (w *walk) entries(p []byte, end int64) {
	g := &w.g
	for ; len(p) > 0 && !w.done; p = p[g.EntrySize:] {
		var bitmap uint64
		if g.Extended {
			bitmap = be64(p[8:])
		}
		skip := w.off & (g.ClusterSize - 1)
		n := min(end-w.off, g.ClusterSize-skip)
		word := be64(p)
		if w.lenient {
			word = w.leniently(word)
		}
		c, err := g.DecodeL2(word, bitmap)
		switch {
		case err != nil:
			w.damaged(n, err)
		case c.Compressed:
			w.compressed(&c, skip, n)
		default:
			w.cluster(&c, skip, n)
		}
	}
}

// leniently is an L2 entry without the bits that QEMU does not look at: the
// reserved ones, and the copied flag where there is no cluster.
func (w *walk) leniently(word uint64) uint64 {
	if word&format.FlagCompressed != 0 {
		return word
	}
	word &^= format.L2Reserved
	if word&format.OffsetMask == 0 && !w.g.DataFile {
		word &^= format.FlagCopied
	}
	return word
}

// emit yields a span of the range.
func (w *walk) emit(s Span) {
	w.off += s.Len
	w.add(s)
}

// damaged yields a span with what is wrong with it.
func (w *walk) damaged(n int64, err error) {
	s := Span{Kind: Damaged, Len: n}
	if w.pending.Len == 0 || w.pending.Kind != Damaged {
		s.Err = &backing.Error{Op: "map", Path: w.path, Off: w.off, Len: n, Kind: backing.ErrIO, Err: err}
	}
	w.emit(s)
}

// compressed yields n bytes of a compressed cluster. Its data may be cut by the
// end of the file.
func (w *walk) compressed(c *format.Cluster, skip, n int64) {
	length := min(c.Length, w.stSize-c.Host)
	switch {
	case length <= 0:
		w.damaged(n, format.Corrupt(fmt.Sprintf("compressed data at %#x lie beyond the end of the file", c.Host)))
	case !w.lenient && !w.isFree(c.Host, length):
		w.damaged(n, format.Corrupt(fmt.Sprintf("compressed data at %#x lie in metadata", c.Host)))
	default:
		w.emit(Span{
			Kind: Compressed, Len: n, Store: w.st, Off: c.Host, InLen: length, Skip: skip,
			Cluster: w.g.ClusterSize, Codec: w.header.Compression,
		})
	}
}

// cluster yields n bytes of a cluster that is not compressed.
func (w *walk) cluster(c *format.Cluster, skip, n int64) {
	if err := w.checkHost(c, w.off-skip); err != nil {
		w.damaged(n, err)
		return
	}
	for end := skip + n; skip < end && !w.done; {
		sub := skip / w.g.SubSize
		step := min(end, (sub+1)*w.g.SubSize) - skip
		switch bit := uint32(1) << sub; {
		case c.Data&bit != 0:
			w.hostData(c.Host+skip, step)
		case c.Zero&bit != 0 && c.HasHost():
			w.emit(Span{Kind: Zero, Len: step, Store: w.data, Off: c.Host + skip})
		case c.Zero&bit != 0:
			w.emit(Span{Kind: Zero, Len: step})
		default:
			w.emit(Span{Kind: Absent, Len: step})
		}
		skip += step
	}
}

// checkHost says why the cluster at guest offset off cannot be where c says.
// The last cluster of a file may be missing in part, or just not be there yet.
func (w *walk) checkHost(c *format.Cluster, off int64) error {
	switch {
	case !c.HasHost():
		return nil
	case w.g.DataFile && c.Host != off:
		return format.Corrupt(fmt.Sprintf("cluster at %#x of the data file has guest offset %#x", c.Host, off))
	case c.Data == 0, w.lenient: // nothing is read from it, or what is there
		return nil
	case c.Host > w.dataSize:
		return format.Corrupt(fmt.Sprintf("cluster at %#x lies beyond the end of the file", c.Host))
	case !w.g.DataFile && !w.isFree(c.Host, w.g.ClusterSize):
		return format.Corrupt(fmt.Sprintf("cluster at %#x lies in metadata", c.Host))
	}
	return nil
}

// isFree reports whether a range of the image has no metadata.
func (w *walk) isFree(off, n int64) bool {
	if off < w.free.from || off >= w.free.to {
		a, b := w.fixed.gap(off), w.tables.gap(off)
		w.free = hostRange{max(a.from, b.from), min(a.to, b.to)}
	}
	return off >= w.free.from && off+n <= w.free.to
}

// hostData yields data, and zeroes for what lies beyond the end of the file.
func (w *walk) hostData(host, n int64) {
	if have := min(n, w.dataSize-host); have > 0 {
		w.emit(Span{Kind: Data, Len: have, Store: w.data, Off: host})
		host, n = host+have, n-have
	}
	if n > 0 && !w.done {
		w.emit(Span{Kind: Zero, Len: n, Store: w.data, Off: host})
	}
}

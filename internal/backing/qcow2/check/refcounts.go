package check

import (
	"encoding/binary"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// block is an entry of the refcount table.
type block struct {
	off   int64 // 0 for none that is aligned and lies in the file
	again bool  // it overlaps other metadata
	empty bool  // it is known to be zero
}

// refTable reads the refcount table.
func (w *walker) refTable() error {
	off, n := w.refArea()
	if off < 0 || off >= w.size {
		return nil
	}
	w.blocks = make([]block, min(n, w.size-off)/8)
	return w.eachPiece(off, n, func(at int64, p []byte) {
		for i := int(at-off) / 8; len(p) >= 8; p = p[8:] {
			w.blocks[i].off = w.decodeBlock(i, binary.BigEndian.Uint64(p))
			i++
		}
	})
}

// refArea is where the refcount table lies.
func (w *walker) refArea() (off, n int64) {
	return int64(w.h.RefTableOffset), int64(w.h.RefTableClusters) << w.g.ClusterBits
}

func (w *walker) decodeBlock(i int, e uint64) int64 {
	off, err := w.g.DecodeRefTable(e)
	switch {
	case err != nil:
		w.corrupt(1, "refcount table entry %d: %v", i, err)
		return 0
	case off >= w.size:
		w.corrupt(1, "refcount table entry %d: block at %#x lies beyond the end of the file", i, off)
		return 0
	}
	return off
}

// refMeta claims the refcount table and its blocks.
func (w *walker) refMeta() error {
	off, n := w.refArea()
	w.ref(off, n, 1, "the refcount table")
	w.claim(off, n, "the refcount table")
	for i := range w.blocks {
		b := &w.blocks[i]
		if b.off == 0 {
			continue
		}
		w.counted(b.off>>w.g.ClusterBits, 1)
		if err := w.halted(); err != nil {
			return err
		}
		b.again = !w.claim(b.off, w.g.ClusterSize, "refcount block")
	}
	return nil
}

// refBlocks counts the references to the refcount blocks, after all others:
// each must be the only one.
func (w *walker) refBlocks() error {
	for i, b := range w.blocks {
		if b.off == 0 {
			continue
		}
		w.ref(b.off, w.g.ClusterSize, 1, "refcount block")
		if n := w.r.refs.get(b.off >> w.g.ClusterBits); n != 1 {
			w.corrupt(1, "refcount block %d at %#x has %d references", i, b.off, n)
		}
	}
	return nil
}

// stored is the refcount of cluster c.
func (w *walker) stored(c int64) uint64 {
	i := c / w.g.BlockEntries
	if i >= int64(len(w.blocks)) || w.blocks[i].off == 0 {
		return 0
	}
	per := w.pieceEntries()
	in := c % w.g.BlockEntries
	return w.g.Refcount(w.piece(w.blocks[i].off+in/per*w.pieceSize()), in%per)
}

// pieceSize is how much of a refcount block is read at once, in bytes.
func (w *walker) pieceSize() int64 { return min(w.g.ClusterSize, limits.CheckPiece) }

func (w *walker) pieceEntries() int64 { return w.pieceSize() * 8 >> w.g.RefcountOrder }

// piece reads a piece of a refcount block, or has it still. What cannot be
// read counts as zeroes, and once as an error.
func (w *walker) piece(off int64) []byte {
	if w.last != nil && w.lastAt == off {
		return w.last
	}
	p := w.pieces[off]
	if p != nil {
		w.last, w.lastAt = p, off
		return p
	}
	for old, b := range w.pieces {
		if len(w.pieces) < limits.CheckPieces {
			break
		}
		delete(w.pieces, old)
		p = b
	}
	if p == nil {
		p = make([]byte, w.pieceSize())
	}
	w.read(p, off)
	w.pieces[off], w.last, w.lastAt = p, p, off
	return p
}

// compare holds what was counted against the refcounts. Clusters behind the
// end of the file that nothing refers to are no leak: there is no storage.
func (w *walker) compare() error {
	end := max(w.g.Clusters(w.size), w.r.refs.end())
	last := int64(-1)
	judge := func(c int64, stored, counted uint64) {
		if stored > 0 || counted > 0 {
			last = max(last, c)
			w.judge(c, stored, counted)
		}
	}
	per := w.pieceEntries()
	for i := range w.blocks {
		b, first := &w.blocks[i], int64(i)*w.g.BlockEntries
		if b.off == 0 || b.again && first >= end {
			continue
		}
		if b.empty = w.hole(b.off, w.g.ClusterSize); b.empty {
			w.progress(w.g.ClusterSize)
			continue
		}
		for in := int64(0); in < w.g.BlockEntries; in += per {
			if err := w.halted(); err != nil {
				return err
			}
			p := w.piece(b.off + in/per*w.pieceSize())
			for k := range per {
				c, n := first+in+k, w.g.Refcount(p, k)
				if n > 0 {
					w.r.Used.Add(c)
				}
				if c < end {
					judge(c, n, w.r.refs.get(c))
				}
			}
		}
		w.progress(w.g.ClusterSize)
	}
	w.r.refs.each(func(c int64, n uint64) {
		if i := c / w.g.BlockEntries; i >= int64(len(w.blocks)) || w.blocks[i].off == 0 || w.blocks[i].empty {
			judge(c, 0, n)
		}
	})
	w.r.ImageEnd = (last + 1) << w.g.ClusterBits
	return nil
}

// judge compares one cluster. Metadata that something else points into are
// corrupt even where the refcount tells so.
func (w *walker) judge(c int64, stored, counted uint64) {
	switch {
	case stored < counted:
		w.corrupt(1, "cluster %d: refcount is %d, references are %d", c, stored, counted)
		return
	case stored > counted:
		w.r.Leaks++
		w.r.leaked.Add(c)
		w.note(true, "cluster %d: refcount is %d, references are %d", c, stored, counted)
	}
	if w.over.Has(c) {
		w.corrupt(1, "cluster %d: metadata overlap", c)
	}
}

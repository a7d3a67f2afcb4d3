package qcow2

import (
	"encoding/binary"
	"math"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// hollow is a Layer that knows without I/O where it has nothing.
type hollow interface {
	// hole is a range of [lo, hi) around off in which everything is absent;
	// it is empty where the layer cannot tell. off lies in [lo, hi), and that
	// in the layer. Every offset in a hole has the same one, but for lo and hi.
	hole(off, lo, hi int64) (from, to int64)
}

var _ hollow = (*Image)(nil)

// hole looks for entries of the L1 table that name no L2 table.
func (m *Image) hole(off, lo, hi int64) (from, to int64) {
	// One block of the table is looked at, and always the same for an offset.
	span := m.g.L2Coverage
	i := off / span
	first := i &^ (limits.MapHoleScan - 1)
	last := min(first+limits.MapHoleScan, int64(len(m.l1))/8, (hi-1)/span+1)
	first = max(first, lo/span)
	end := i
	for end < last && m.noTable(end) {
		end++
	}
	if end == i {
		return off, off
	}
	for i > first && m.noTable(i-1) {
		i--
	}
	return max(lo, i*span), min(hi, end*span)
}

// noTable tells whether an entry of the L1 table is all zero.
func (m *Image) noTable(i int64) bool { return binary.NativeEndian.Uint64(m.l1[i*8:]) == 0 }

// holeMap keeps pages that are one hole each, of any length from
// limits.MapPage on: what a page for each limits.MapPage of a huge sparse disk
// would not fit. Safe for concurrent use.
type holeMap struct {
	hits atomic.Int64

	mu    sync.RWMutex
	list  []*page      // guarded by mu; sorted and apart
	clock clock[*page] // guarded by mu; of list
}

// find returns the hole around off that is in memory, or nil.
func (h *holeMap) find(off int64) *page {
	h.mu.RLock()
	defer h.mu.RUnlock()
	i := h.searchLocked(off + 1)
	if i == 0 {
		return nil
	}
	p := h.list[i-1]
	if off-p.off >= p.n {
		return nil
	}
	p.touch()
	h.hits.Add(1)
	return p
}

// searchLocked is the number of holes that begin before off.
func (h *holeMap) searchLocked(off int64) int {
	return sort.Search(len(h.list), func(i int) bool { return h.list[i].off >= off })
}

// keep takes p in, unless it is there already, and drops others for it.
func (h *holeMap) keep(p *page) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.searchLocked(p.off)
	if i < len(h.list) && h.list[i].off == p.off {
		return
	}
	cost := p.cost()
	for old := range h.clock.evict(cost) {
		at := h.searchLocked(old.off)
		h.list = append(h.list[:at], h.list[at+1:]...)
	}
	i = h.searchLocked(p.off)
	h.list = append(h.list, nil)
	copy(h.list[i+1:], h.list[i:])
	h.list[i] = p
	h.clock.add(p, cost)
}

// hole returns a page for the hole around off, which lies in the disk, or nil
// if there is none that is worth one. It does no I/O.
func (c *chain) hole(off int64) *page {
	// Most offsets are in no hole: one byte of each layer tells.
	if _, from, to := c.hollow(off, off, off+1); from == to {
		return nil
	}
	x, from, to := c.hollow(off, 0, c.size)
	if to-from < limits.MapPage {
		return nil
	}
	p := &page{off: from, n: to - from, extents: []extent{x}}
	c.holes.keep(p)
	return p
}

// hollow is the part of [lo, hi) around off that all layers agree on to have
// nothing of, and what is read there. It is empty if they do not.
func (c *chain) hollow(off, lo, hi int64) (x extent, from, to int64) {
	for l, depth := c.top, 0; l != nil; l, depth = l.Below(), depth+1 {
		size := l.Size()
		if off >= size {
			return extent{kind: Zero, depth: uint16(min(depth, math.MaxUint16))}, max(lo, size), hi
		}
		h, ok := l.(hollow)
		if !ok {
			return x, off, off
		}
		if lo, hi = h.hole(off, lo, min(hi, size)); lo == hi {
			return x, off, off
		}
	}
	return extent{kind: Absent}, lo, hi
}

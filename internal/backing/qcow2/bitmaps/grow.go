package bitmaps

import (
	"context"
	"math"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// CanGrow says why a disk of size bytes, larger than this one, cannot have the
// bitmaps.
func (s *Set) CanGrow(size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.canGrow(size)
}

func (s *Set) canGrow(size int64) error {
	left := s.memory.limit - s.memory.used
	for _, m := range s.all() {
		if m.bits == nil {
			return invalid("bitmap %q is inconsistent and has to be removed first", m.name)
		}
		n := bitsOf(size, m.granularity)
		if s.g.Clusters(bytesOf(n))<<s.g.ClusterBits > format.MaxBitmapData {
			return invalid("bitmap %q: more than %d bytes of bits", m.name, format.MaxBitmapData)
		}
		fixed, pages := m.growth(n)
		if left -= fixed + pages; left < 0 {
			return invalid("the bitmaps take more than %d bytes of memory", s.memory.limit)
		}
	}
	return nil
}

// growth is the memory that m takes more when it has n bits.
func (m *bitmap) growth(n int64) (fixed, pages int64) {
	fixed = fixedCost(n) - fixedCost(m.bits.n)
	if m.full {
		return fixed, (pagesOf(n) - pagesOf(m.bits.n)) * pageBytes
	}
	return fixed, pageBytes // the last one may be one of its own now
}

// BeginGrowth is Begin for a growth of the disk to size bytes: all bitmaps are
// marked, for a table of the old length does not suit the new disk. It has to
// have returned without an error before the size changes in the file; Grown
// comes after. Errors: those of CanGrow and of Begin.
func (s *Set) BeginGrowth(ctx context.Context, size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if err := s.canGrow(size); err != nil {
		return err
	}
	return backing.Wrap("bitmaps", -1, 0, s.begin(ctx, s.toMark(true)))
}

// Grown makes the bitmaps those of a disk of size bytes, which the file says
// already. As in QEMU, what is new is clean.
func (s *Set) Grown(size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sizeMu.Lock()
	defer s.sizeMu.Unlock()
	for _, m := range s.all() {
		if m.bits == nil {
			continue
		}
		n := bitsOf(size, m.granularity)
		fixed, pages := m.growth(n)
		m.fixed, m.pages, s.memory.used = m.fixed+fixed, m.pages+pages, s.memory.used+fixed+pages
		m.bits.grow(n)
	}
	s.size = size
}

// grow makes b have n bits, not fewer than before, of which the new ones are
// clear. Nobody else may use b.
func (b *bitset) grow(n int64) {
	if rest := b.n % pageBits; rest > 0 && n > b.n {
		b.cutPage(b.n/pageBits, rest)
	}
	pages := make([]atomic.Pointer[page], pagesOf(n))
	for i := range b.pages {
		pages[i].Store(b.pages[i].Load())
	}
	b.n, b.pages = n, pages
	b.changed.Store(true)
}

// cutPage clears the bits of page i from bit from on.
func (b *bitset) cutPage(i, from int64) {
	old := b.pages[i].Load()
	if old == nil {
		return
	}
	p := new(page)
	for w := range (from + 63) / 64 {
		keep := uint64(math.MaxUint64)
		if rest := from - w*64; rest < 64 {
			keep = 1<<rest - 1
		}
		p[w].Store(old[w].Load() & keep)
	}
	b.pages[i].Store(p)
}

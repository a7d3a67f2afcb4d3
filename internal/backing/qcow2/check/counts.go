package check

import (
	"maps"
	"slices"
)

const (
	countBits  = 8 // clusters per chunk, as a power of two
	countMask  = 1<<countBits - 1
	countLarge = 255 // the number is in large
)

// counts has a number of references for each cluster. Memory is taken for 256
// neighbours at a time where one of them is referenced. Not safe for
// concurrent use.
type counts struct {
	chunks map[int64]*[1 << countBits]uint8
	large  map[int64]uint64

	// last is the chunk that was looked at last: neighbours come in turn.
	lastKey int64
	last    *[1 << countBits]uint8
}

func newCounts() *counts {
	return &counts{chunks: map[int64]*[1 << countBits]uint8{}, large: map[int64]uint64{}, lastKey: -1}
}

func (s *counts) chunk(c int64) *[1 << countBits]uint8 {
	if key := c >> countBits; key != s.lastKey {
		s.lastKey, s.last = key, s.chunks[key]
	}
	return s.last
}

// get is the number of references to c.
func (s *counts) get(c int64) uint64 {
	k := s.chunk(c)
	if k == nil {
		return 0
	}
	if n := k[c&countMask]; n != countLarge {
		return uint64(n)
	}
	return s.large[c]
}

// add counts n more references to c, but stops at limit; over is how many of
// them did not fit.
func (s *counts) add(c int64, n, limit uint64) (over uint64) {
	have := s.get(c)
	fit := min(n, limit-min(limit, have))
	if fit == 0 {
		return n
	}
	k := s.chunk(c)
	if k == nil {
		k = new([1 << countBits]uint8)
		s.chunks[c>>countBits], s.last = k, k
	}
	if have+fit < countLarge {
		k[c&countMask] = uint8(have + fit)
	} else {
		k[c&countMask] = countLarge
		s.large[c] = have + fit
	}
	return n - fit
}

// each calls f for all clusters that have references, in order.
func (s *counts) each(f func(c int64, n uint64)) {
	for _, key := range slices.Sorted(maps.Keys(s.chunks)) {
		k := s.chunks[key]
		for i, n := range k {
			if n != 0 {
				c := key<<countBits | int64(i)
				f(c, s.get(c))
			}
		}
	}
}

// end is the cluster after the last one that has references.
func (s *counts) end() int64 {
	end := int64(0)
	for key, k := range s.chunks {
		for i := len(k) - 1; i >= 0 && key<<countBits+int64(i) >= end; i-- {
			if k[i] != 0 {
				end = key<<countBits + int64(i) + 1
			}
		}
	}
	return end
}

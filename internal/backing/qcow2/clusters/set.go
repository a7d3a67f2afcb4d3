// Package clusters holds sets of cluster numbers.
package clusters

import "math/bits"

const (
	chunkBits  = 15 // numbers per chunk: 4 KiB of memory
	chunkWords = 1 << chunkBits / 64
)

// chunk is the part of a set with the same upper bits.
type chunk [chunkWords]uint64

// Set is a set of cluster numbers ≥ 0. Memory is taken for 32768 neighbours
// at a time, where there is one: 4 KiB for each such stretch. The zero value
// is the empty set. A Set is not safe for concurrent use.
type Set struct {
	chunks map[int64]*chunk
	n      int64
}

// Len is the number of clusters in the set.
func (s *Set) Len() int64 { return s.n }

// Has reports whether c is in the set.
func (s *Set) Has(c int64) bool {
	k := s.chunks[c>>chunkBits]
	return k != nil && k[c>>6&(chunkWords-1)]&(1<<(c&63)) != 0
}

// Add puts c into the set and reports whether it was not there.
func (s *Set) Add(c int64) bool {
	k := s.chunks[c>>chunkBits]
	if k == nil {
		if s.chunks == nil {
			s.chunks = make(map[int64]*chunk)
		}
		k = new(chunk)
		s.chunks[c>>chunkBits] = k
	}
	w, bit := &k[c>>6&(chunkWords-1)], uint64(1)<<(c&63)
	if *w&bit != 0 {
		return false
	}
	*w |= bit
	s.n++
	return true
}

// Remove takes c out and reports whether it was there.
func (s *Set) Remove(c int64) bool {
	k := s.chunks[c>>chunkBits]
	if k == nil {
		return false
	}
	w, bit := &k[c>>6&(chunkWords-1)], uint64(1)<<(c&63)
	if *w&bit == 0 {
		return false
	}
	*w &^= bit
	s.n--
	return true
}

// HasAny reports whether one of the n clusters from c on is in the set.
func (s *Set) HasAny(c, n int64) bool { return s.Next(c, c+n) < c+n }

// Next is the first cluster of the set in [from, to), or to.
func (s *Set) Next(from, to int64) int64 { return s.scan(from, to, 0) }

// NextAbsent is the first cluster in [from, to) that is not in the set, or to.
func (s *Set) NextAbsent(from, to int64) int64 { return s.scan(from, to, ^uint64(0)) }

// scan finds the first bit that is set after flip was applied.
func (s *Set) scan(from, to int64, flip uint64) int64 {
	for c := from; c < to; {
		k := s.chunks[c>>chunkBits]
		if k == nil {
			if flip != 0 {
				return c
			}
			c = (c>>chunkBits + 1) << chunkBits
			continue
		}
		if w := (k[c>>6&(chunkWords-1)] ^ flip) >> (c & 63); w != 0 {
			return min(to, c+int64(bits.TrailingZeros64(w)))
		}
		c = (c>>6 + 1) << 6
	}
	return to
}

// Last is the last cluster of the set below to, or -1. It takes a step for
// each stretch that has memory.
func (s *Set) Last(to int64) int64 {
	last := int64(-1)
	for i, k := range s.chunks {
		base := i << chunkBits
		for w := min(to-base+63, 1<<chunkBits)>>6 - 1; w >= 0 && base+w<<6+63 > last; w-- {
			over := max(0, base+(w+1)<<6-to)
			if word := k[w] << over >> over; word != 0 {
				last = base + w<<6 + int64(bits.Len64(word)) - 1
			}
		}
	}
	return last
}

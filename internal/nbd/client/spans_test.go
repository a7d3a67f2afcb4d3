package client

import (
	"math/rand/v2"
	"testing"
)

func TestSpansAgreeWithAMapOfBytes(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for round := range 500 {
		var s spans
		var seen [64]bool
		total := uint64(0)
		for range 40 {
			start := rnd.Uint64N(64)
			n := 1 + rnd.Uint64N(min(8, 64-start))
			overlap := false
			for i := start; i < start+n; i++ {
				overlap = overlap || seen[i]
			}
			if err := s.add(start, n); (err != nil) != overlap {
				t.Fatalf("seed %d round %d: add(%d, %d) to %v: %v, overlap %v", seed, round, start, n, s.list, err, overlap)
			}
			if overlap {
				continue
			}
			total += n
			for i := start; i < start+n; i++ {
				seen[i] = true
			}
		}
		if s.n != total {
			t.Fatalf("seed %d round %d: %d bytes, want %d", seed, round, s.n, total)
		}
		last := uint64(0)
		for i, e := range s.list {
			if e.start >= e.end || i > 0 && e.start <= last {
				t.Fatalf("seed %d round %d: %v is not sorted and apart", seed, round, s.list)
			}
			last = e.end
		}
	}
}

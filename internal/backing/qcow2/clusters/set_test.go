package clusters

import (
	"math/rand/v2"
	"testing"
)

// TestSetAgreesWithMap runs random operations on a Set and on a map.
func TestSetAgreesWithMap(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	const span = 3 << chunkBits
	var s Set
	model := map[int64]bool{}
	scan := func(from, to int64, want bool) int64 {
		for ; from < to && model[from] != want; from++ {
		}
		return from
	}
	for i := range 20000 {
		c := r.Int64N(span)
		if i%3 == 0 {
			c = chunkWords*64 - 40 + r.Int64N(80) // around a chunk's end
		}
		switch r.IntN(6) {
		case 0, 1:
			if got, want := s.Add(c), !model[c]; got != want {
				t.Fatalf("seed %d: Add(%d) = %v, want %v", seed, c, got, want)
			}
			model[c] = true
		case 2:
			if got, want := s.Remove(c), model[c]; got != want {
				t.Fatalf("seed %d: Remove(%d) = %v, want %v", seed, c, got, want)
			}
			delete(model, c)
		case 3:
			to := c + r.Int64N(2000)
			if got, want := s.Next(c, to), scan(c, to, true); got != want {
				t.Fatalf("seed %d: Next(%d, %d) = %d, want %d", seed, c, to, got, want)
			}
			if got, want := s.HasAny(c, to-c), scan(c, to, true) < to; got != want {
				t.Fatalf("seed %d: HasAny(%d, %d) = %v, want %v", seed, c, to-c, got, want)
			}
		case 4:
			to := c + r.Int64N(2000)
			if got, want := s.NextAbsent(c, to), scan(c, to, false); got != want {
				t.Fatalf("seed %d: NextAbsent(%d, %d) = %d, want %d", seed, c, to, got, want)
			}
		case 5:
			want := c - 1
			for ; want >= 0 && !model[want]; want-- {
			}
			if got := s.Last(c); got != want {
				t.Fatalf("seed %d: Last(%d) = %d, want %d", seed, c, got, want)
			}
		}
		if s.Has(c) != model[c] || s.Len() != int64(len(model)) {
			t.Fatalf("seed %d: Has(%d) = %v, Len %d; want %v, %d", seed, c, s.Has(c), s.Len(), model[c], len(model))
		}
	}
}

func TestEmptySetHasNothing(t *testing.T) {
	var s Set
	if s.Has(1<<60) || s.Remove(5) || s.Len() != 0 || s.Next(0, 1<<40) != 1<<40 ||
		s.NextAbsent(7, 9) != 7 || s.Last(1<<40) != -1 {
		t.Error("the zero Set is not empty")
	}
}

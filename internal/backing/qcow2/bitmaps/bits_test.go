package bitmaps

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// model is bits one by one.
type model []bool

func (m model) mark(from, to int64) {
	for i := from; i < to; i++ {
		m[i] = true
	}
}

func (m model) run(from, to int64) (int64, bool) {
	end := from + 1
	for end < to && m[end] == m[from] {
		end++
	}
	return end, m[from]
}

// agree compares b with m in all runs, and as bytes.
func (m model) agree(t *testing.T, b *bitset) {
	t.Helper()
	for at := int64(0); at < b.n; {
		end, set := b.run(at, b.n)
		if wantEnd, want := m.run(at, b.n); end != wantEnd || set != want {
			t.Fatalf("run from %d: got %v up to %d, want %v up to %d", at, set, end, want, wantEnd)
		}
		at = end
	}
	p := make([]byte, bytesOf(b.n)+24) // and what lies behind
	p = p[:len(p)&^7]
	for i := range p {
		p[i] = 0xaa
	}
	b.get(0, p)
	for i := range int64(len(p)) * 8 {
		if got := p[i/8]>>(i%8)&1 != 0; got != (i < b.n && m[i]) {
			t.Fatalf("bit %d of %d: got %v", i, b.n, got)
		}
	}
	again := newBitset(b.n)
	for off := int64(0); off < int64(len(p)); off += 512 {
		again.put(off, p[off:min(off+512, int64(len(p)))])
	}
	if q := make([]byte, len(p)); true {
		again.get(0, q)
		if !slices.Equal(p, q) {
			t.Fatal("put and get again: got other bits")
		}
	}
}

func TestBitsetAgreesWithModel(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	for _, n := range []int64{1, 63, 64, 65, pageBits - 1, pageBits, pageBits + 1, 3*pageBits + 777} {
		b, m := newBitset(n), make(model, n)
		for range 30 {
			from := r.Int64N(n)
			to := from + 1 + r.Int64N(n-from)
			if r.IntN(2) == 0 {
				to = min(to, from+1+r.Int64N(200))
			}
			if r.IntN(12) == 0 {
				from, to = 0, n
			}
			before := slices.Clone(m)
			m.mark(from, to)
			b.changed.Store(false)
			b.mark(from, to)
			if got := b.changed.Load(); got != !slices.Equal(before, m) {
				t.Fatalf("mark %d to %d: changed is %v", from, to, got)
			}
			m.agree(t, b)
			if r.IntN(8) == 0 {
				b.clear()
				clear(m)
				m.agree(t, b)
			}
		}
	}
}

// TestBitsBehindTheLastAreIgnored: a file may have any there.
func TestBitsBehindTheLastAreIgnored(t *testing.T) {
	b, p := newBitset(70), []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
	b.put(0, p)
	b.get(0, p)
	if want := "\xff\xff\xff\xff\xff\xff\xff\xff\x3f\x00\x00\x00\x00\x00\x00\x00"; string(p) != want {
		t.Errorf("got %x, want %x", p, want)
	}
	if end, set := b.run(0, 70); end != 70 || !set {
		t.Errorf("got %v up to %d", set, end)
	}
}

// TestMarkOfWholePagesTakesNoMemory: only a page with some bits set and some
// not does.
func TestMarkOfWholePagesTakesNoMemory(t *testing.T) {
	b := newBitset(4*pageBits + 1)
	b.mark(0, 3*pageBits+1)
	for i, want := range []bool{true, true, true, false} {
		if got := b.pages[i].Load() == allOnes; got != want {
			t.Errorf("page %d: shared %v, want %v", i, got, want)
		}
	}
	b.mark(0, 10) // writes nothing to the page that all share
	if allOnes[0].Load()+1 != 0 {
		t.Error("the page of ones has a zero")
	}
	if n := testing.AllocsPerRun(100, func() { b.mark(5, 3*pageBits+1) }); n != 0 {
		t.Errorf("mark what is marked: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { b.mark(3*pageBits+70, 3*pageBits+90) }); n != 0 {
		t.Errorf("mark in a page that exists: %v allocations", n)
	}
}

// TestMarkIsNotLostToClear marks and clears at the same time: what is marked
// after the last clear stays, whatever page it was in before.
func TestMarkIsNotLostToClear(t *testing.T) {
	const n = 2*pageBits + 100
	b := newBitset(n)
	for round := range int64(200) {
		var wg sync.WaitGroup
		done := make(chan struct{})
		for k := range int64(2) {
			wg.Go(func() {
				for i := range int64(50) {
					b.mark((k*97+i*round)%n, (k*97+i*round)%n+1)
					b.run(0, n)
				}
				if k == 0 {
					b.mark(0, n)
				}
			})
		}
		wg.Go(func() { b.clear(); close(done) })
		<-done
		b.mark(round, round+1)
		wg.Wait()
		if end, set := b.run(round, round+1); !set || end != round+1 {
			t.Fatalf("round %d: the bit is lost", round)
		}
	}
}

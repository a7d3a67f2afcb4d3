package bitmaps

import (
	"encoding/binary"
	"math"
	"math/bits"
	"sync/atomic"
)

const (
	pageBytes = 4096
	pageWords = pageBytes / 8
	pageBits  = pageBytes * 8
)

// page is a piece of the bits of a bitmap.
type page [pageWords]atomic.Uint64

// allOnes stands for every page whose bits are all set. Nothing writes to it:
// a bit is set only where it is not.
var allOnes = newOnes()

func newOnes() *page {
	p := new(page)
	for i := range p {
		p[i].Store(math.MaxUint64)
	}
	return p
}

// bitset is the bits of one bitmap. A page that is nil has no bit set. Bits
// behind the last may be set; nobody looks at them. Safe for concurrent use
// but for put and fill.
type bitset struct {
	n       int64 // bits
	pages   []atomic.Pointer[page]
	changed atomic.Bool // since it was loaded or saved
}

func newBitset(n int64) *bitset {
	return &bitset{n: n, pages: make([]atomic.Pointer[page], pagesOf(n))}
}

// pagesOf is the number of pages that n bits take.
func pagesOf(n int64) int64 { return n/pageBits + min(1, n%pageBits) }

// bytesOf is the number of bytes that n bits take in the file.
func bytesOf(n int64) int64 { return n/8 + min(1, n%8) }

// mark sets the bits [from, to), which exist.
func (b *bitset) mark(from, to int64) {
	for from < to {
		i := from / pageBits
		end := min(to, (i+1)*pageBits)
		b.markPage(i, from-i*pageBits, end-i*pageBits)
		from = end
	}
}

// markPage sets the bits [from, to) of page i.
func (b *bitset) markPage(i, from, to int64) {
	p := b.pages[i].Load()
	for p == nil {
		fresh := allOnes
		if to-from < pageBits {
			fresh = new(page)
		}
		if b.pages[i].CompareAndSwap(nil, fresh) && fresh == allOnes {
			b.touch()
		}
		p = b.pages[i].Load()
	}
	if p == allOnes {
		return
	}
	for from < to {
		w := &p[from/64]
		end := min(to, (from/64+1)*64)
		mask := uint64(math.MaxUint64) >> (64 - (end - from)) << (from % 64)
		if w.Load()&mask != mask {
			w.Or(mask)
			b.touch()
		}
		from = end
	}
}

func (b *bitset) touch() {
	if !b.changed.Load() {
		b.changed.Store(true)
	}
}

// clear takes all bits away. A bit that mark sets at the same time is either
// cleared or stays: it is never set in a page that is gone.
func (b *bitset) clear() {
	for i := range b.pages {
		p := b.pages[i].Load()
		switch {
		case p == nil:
		case p == allOnes:
			b.pages[i].CompareAndSwap(allOnes, nil)
		default:
			for j := range p {
				p[j].Store(0)
			}
		}
	}
	b.changed.Store(true)
}

// run says where the bits from on, up to to, stop being equal, and what they
// are. from < to.
func (b *bitset) run(from, to int64) (end int64, set bool) {
	set = b.scan(from, from+1, 0) == from
	flip := uint64(0)
	if set {
		flip = math.MaxUint64
	}
	// A bit that is set meanwhile must not stop the caller.
	return max(from+1, b.scan(from, to, flip)), set
}

// scan finds the first bit of [from, to) that is set after flip was applied,
// or to.
func (b *bitset) scan(from, to int64, flip uint64) int64 {
	for c := from; c < to; {
		p := b.pages[c/pageBits].Load()
		if p == nil || p == allOnes {
			if (p == allOnes) == (flip == 0) {
				return c
			}
			c = (c/pageBits + 1) * pageBits
			continue
		}
		if w := (p[c%pageBits/64].Load() ^ flip) >> (c % 64); w != 0 {
			return min(to, c+int64(bits.TrailingZeros64(w)))
		}
		c = (c/64 + 1) * 64
	}
	return to
}

// put takes bytes of the file that begin at byte off of the bits. Both are
// multiples of 8. What lies behind the last page is ignored.
func (b *bitset) put(off int64, p []byte) {
	for len(p) > 0 && off/pageBytes < int64(len(b.pages)) {
		at := off % pageBytes
		n := min(pageBytes-at, int64(len(p)))
		b.putPage(off/pageBytes, at/8, p[:n])
		p, off = p[n:], off+n
	}
}

// putPage takes words of page i; zeroes alone do not make one.
func (b *bitset) putPage(i, word int64, p []byte) {
	at := b.pages[i].Load()
	for ; len(p) >= 8; p, word = p[8:], word+1 {
		w := binary.LittleEndian.Uint64(p)
		if w == 0 {
			continue
		}
		if at == nil {
			at = new(page)
			b.pages[i].Store(at)
		}
		at[word].Store(w)
	}
}

// get is the reverse of put; bits behind the last are 0.
func (b *bitset) get(off int64, p []byte) {
	clear(p)
	for ; len(p) >= 8 && off/pageBytes < int64(len(b.pages)); p, off = p[8:], off+8 {
		at := b.pages[off/pageBytes].Load()
		if at == nil {
			continue
		}
		w := at[off%pageBytes/8].Load()
		if rest := b.n - off*8; rest < 64 {
			w &= 1<<max(0, rest) - 1
		}
		binary.LittleEndian.PutUint64(p, w)
	}
}

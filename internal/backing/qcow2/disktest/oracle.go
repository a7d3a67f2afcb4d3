// Package disktest runs random operations and power cuts against disks that
// are being written, and tells whether what they answer can be right.
//
// Each sector that is written names itself and the operation that wrote it, so
// that any byte from another place or another time is found and explained.
package disktest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync"
)

// Sector is the unit of what is written, in bytes.
const Sector = 512

// Fill writes into p what version leaves at [off, off+len(p)).
func Fill(p []byte, off int64, version uint32) {
	var buf [Sector]byte
	for len(p) > 0 {
		at := off % Sector
		n := min(Sector-at, int64(len(p)))
		fillSector(&buf, off/Sector, version)
		copy(p[:n], buf[at:])
		p, off = p[n:], off+n
	}
}

// fillSector alternates words that name the sector and the version with words
// that nothing else has. The race detector need not look at each byte of buf.
//
//go:norace
func fillSector(buf *[Sector]byte, sector int64, version uint32) {
	name := uint64(sector)<<32 | uint64(version)
	x := name
	for i := 0; i < Sector; i += 16 {
		x = (x ^ x>>31 ^ 0x5bd1e995) * 0x9e3779b97f4a7c15
		binary.BigEndian.PutUint64(buf[i:], name)
		binary.BigEndian.PutUint64(buf[i+8:], x|1)
	}
}

// describe says what a sector holds, for people.
func describe(p []byte) string {
	zero := true
	for i := 0; i+16 <= len(p); i += 16 {
		name := binary.BigEndian.Uint64(p[i:])
		var want [Sector]byte
		fillSector(&want, int64(name>>32), uint32(name))
		if name != 0 && bytes.Equal(want[i:i+16], p[i:i+16]) {
			return fmt.Sprintf("sector %d of version %d", name>>32, uint32(name))
		}
		zero = zero && name == 0 && binary.BigEndian.Uint64(p[i+8:]) == 0
	}
	if zero {
		return "zeroes"
	}
	return fmt.Sprintf("%x...", p[:min(16, len(p))])
}

// The contents that are not those of a version.
const (
	initial = -1
	zeroes  = -2
)

// Change is an operation that changes a range, as the oracle knows it.
type Change struct {
	lo, hi  int64 // bytes
	content int64 // a version, or zeroes
	start   int64 // by the clock of the oracle
	end     int64 // MaxInt64 while it goes on
	durable bool  // from its end on, without a flush
	weak    bool  // it may have done nothing
	void    bool  // it has done nothing
}

// Moment is what was settled when a read began or the power went.
type Moment struct{ now, flushed int64 }

// settled tells whether the disk must show c, or something later.
func (m Moment) settled(c *Change) bool {
	return c.end < m.flushed || c.durable && c.end < m.now
}

// Oracle knows what may be read from a disk: of overlapping changes at the
// same time either, after a power cut anything since the last flush. Safe for
// concurrent use.
type Oracle struct {
	size int64

	mu      sync.Mutex
	first   []byte              // guarded by mu
	clock   int64               // guarded by mu
	flushed int64               // guarded by mu: when the last flush to complete began
	history map[int64][]*Change // guarded by mu: by sector, in order of start
}

// NewOracle knows a disk that has the contents first, which it takes over.
func NewOracle(first []byte) *Oracle {
	return &Oracle{size: int64(len(first)), first: first, clock: 1, history: map[int64][]*Change{}}
}

func (o *Oracle) tickLocked() int64 {
	o.clock++
	return o.clock
}

// Begin notes that a change of n bytes at off begins: with content version or,
// if that is 0, zeroes. A weak one may do nothing, a durable one is durable
// when it ends.
func (o *Oracle) Begin(off, n int64, version uint32, weak, durable bool) *Change {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := &Change{lo: off, hi: off + n, content: int64(version), weak: weak, durable: durable,
		start: o.tickLocked(), end: math.MaxInt64}
	if version == 0 {
		c.content = zeroes
	}
	for s := off / Sector; s*Sector < off+n; s++ {
		o.history[s] = append(o.history[s], c)
	}
	return c
}

// End notes that c returned.
func (o *Oracle) End(c *Change) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.end = o.tickLocked()
}

// Fail notes that c returned an error: it may have done anything of what it
// should.
func (o *Oracle) Fail(c *Change) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.weak, c.end = true, o.tickLocked()
}

// Void notes that c was refused and has touched nothing.
func (o *Oracle) Void(c *Change) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.void, c.end = true, o.tickLocked()
}

// BeginFlush is to be called before a flush, and its result after success.
func (o *Oracle) BeginFlush() (done func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	start := o.tickLocked()
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.flushed = max(o.flushed, start)
	}
}

// Now is the moment for a read that begins now.
func (o *Oracle) Now() Moment {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.tickLocked()
	return Moment{now, now}
}

// Crash is the moment for a power cut now.
func (o *Oracle) Crash() Moment {
	o.mu.Lock()
	defer o.mu.Unlock()
	return Moment{o.tickLocked(), o.flushed}
}

// Verify tells whether p may be what was read at off at moment m.
func (o *Oracle) Verify(p []byte, off int64, m Moment) error {
	return o.look(p, off, m, nil)
}

// Resolve verifies what a whole disk without operations in flight reads as,
// and from now on asks for just that where there was a choice.
func (o *Oracle) Resolve(p []byte, off int64) error {
	return o.look(p, off, o.Now(), func(lo, hi, content int64) {
		c := &Change{lo: lo, hi: hi, content: content, start: o.tickLocked()}
		c.end = o.tickLocked()
		o.history[lo/Sector] = append(o.history[lo/Sector], c)
	})
}

// Prune forgets what no read and no power cut from now on can show. No
// operation may be in flight.
func (o *Oracle) Prune() {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := Moment{o.tickLocked(), o.flushed}
	for s, list := range o.history {
		if len(list) > 8 {
			o.history[s] = slices.DeleteFunc(slices.Clone(list), func(c *Change) bool {
				return c.void || slices.ContainsFunc(list, func(w *Change) bool {
					return w.covers(max(c.lo, s*Sector), min(c.hi, (s+1)*Sector)) && w.supersedes(c.end, m)
				})
			})
		}
	}
}

func (c *Change) covers(lo, hi int64) bool { return c.lo <= lo && hi <= c.hi }

// supersedes tells whether nothing that ended at end is visible under c.
func (c *Change) supersedes(end int64, m Moment) bool {
	return !c.weak && !c.void && c.start > end && m.settled(c)
}

// look verifies p and calls resolve, if there is one, where several contents
// were possible.
func (o *Oracle) look(p []byte, off int64, m Moment, resolve func(lo, hi, content int64)) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for at := off; at < off+int64(len(p)); {
		s := at / Sector
		hi := min(off+int64(len(p)), (s+1)*Sector)
		for _, c := range o.history[s] {
			for _, edge := range []int64{c.lo, c.hi} {
				if at < edge && edge < hi {
					hi = edge
				}
			}
		}
		choice := o.choiceLocked(at, hi, m)
		if !o.matchLocked(p[at-off:hi-off], at, choice, resolve) {
			return o.wrongLocked(p, off, at, hi, choice)
		}
		at = hi
	}
	return nil
}

// matchLocked tells whether p, in one sector from off, is one of choice, and
// calls resolve if there was a choice. Requests that end within sectors may be
// carried out in parts that do, too: there, and only there, contents mix.
func (o *Oracle) matchLocked(p []byte, off int64, choice []int64, resolve func(lo, hi, content int64)) bool {
	var buf [Sector]byte
	s := off / Sector
	mixed := slices.ContainsFunc(o.history[s], func(c *Change) bool { return c.lo%Sector+c.hi%Sector > 0 })
	longest := func(p []byte, off int64) (best, n int64) {
		for _, content := range choice {
			o.contentLocked(&buf, s, content)
			if bytes.Equal(p, buf[off-s*Sector:off-s*Sector+int64(len(p))]) {
				return content, int64(len(p))
			}
			if !mixed {
				continue
			}
			k := int64(0)
			for p[k] == buf[off-s*Sector+k] {
				k++
			}
			if k > n {
				best, n = content, k
			}
		}
		return best, n
	}
	for end := off + int64(len(p)); off < end; {
		content, n := longest(p, off)
		if n == 0 {
			return false
		}
		if resolve != nil && len(choice) > 1 {
			resolve(off, off+n, content)
		}
		p, off = p[n:], off+n
	}
	return true
}

// choiceLocked are the contents that [lo, hi), in one sector, may have.
func (o *Oracle) choiceLocked(lo, hi int64, m Moment) (list []int64) {
	history := o.history[lo/Sector]
	possible := func(end int64) bool {
		return !slices.ContainsFunc(history, func(w *Change) bool {
			return w.covers(lo, hi) && w.supersedes(end, m)
		})
	}
	for _, c := range slices.Backward(history) {
		if c.covers(lo, hi) && !c.void && !slices.Contains(list, c.content) && possible(c.end) {
			list = append(list, c.content)
		}
	}
	if possible(0) {
		list = append(list, initial)
	}
	return list
}

// contentLocked makes a whole sector of a content.
func (o *Oracle) contentLocked(buf *[Sector]byte, sector, content int64) {
	switch content {
	case zeroes:
		clear(buf[:])
	case initial:
		clear(buf[copy(buf[:], o.first[sector*Sector:]):])
	default:
		fillSector(buf, sector, uint32(content))
	}
}

// wrongLocked says what is wrong with [lo, hi) of p, which was read at off.
func (o *Oracle) wrongLocked(p []byte, off, lo, hi int64, choice []int64) error {
	s := lo / Sector
	from, to := max(off, s*Sector), min(off+int64(len(p)), (s+1)*Sector)
	var want []string
	for _, content := range choice {
		var buf [Sector]byte
		o.contentLocked(&buf, s, content)
		switch content {
		case initial:
			want = append(want, "what it was at first: "+describe(buf[:]))
		default:
			want = append(want, describe(buf[:]))
		}
	}
	return fmt.Errorf("sector %d, bytes %d to %d: got %s, want %q", s, lo%Sector, hi-s*Sector,
		describe(p[from-off:to-off]), want)
}

// Package bufpool lends page-aligned I/O buffers under one byte budget.
//
// Buffers are mapped, not taken from the Go heap: direct I/O needs their
// alignment, guest data stays out of the garbage collector's sight and out of
// core dumps (MADV_DONTDUMP), and the first few MiB lie in one region that an
// io_uring can register (Arena).
//
// Sizes are rounded up to powers of two; the budget is charged with the
// rounded size, because that is what a buffer can come to occupy.
//
// Large buffers, above limits.TurnBuffer, leave an eighth of a large budget to
// small ones, and wait in a line of their own: whoever holds many of them for long
// keeps no one from small requests.
package bufpool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

const (
	minShift = 12 // 4 KiB, a page
	classes  = 15 // 4 KiB << 14 = 64 MiB

	// slabBytes is the unit in which small classes get memory from the
	// system. From this size on each buffer is a mapping of its own.
	slabBytes = 1 << 20

	poison = 0xDB

	// maxBudget is half of what charges can count.
	maxBudget = 1 << (31 + minShift)

	// closedMark in Pool.charged leaves no room for any charge.
	closedMark charges = math.MaxUint32
)

// The largest class holds the largest request.
var _ [1<<(minShift+classes-1) - limits.MaxIO]struct{}

// ErrTooLarge is returned for a request that no wait could satisfy: above
// limits.MaxIO or above the whole budget.
var ErrTooLarge = errors.New("buffer larger than the budget allows")

// ErrClosed is returned by Get after Close.
var ErrClosed = errors.New("buffer pool is closed")

// Pool is safe for concurrent use.
type Pool struct {
	budget  int64
	spare   int64         // of budget, for small buffers
	charged atomic.Uint64 // charges for lent buffers; never above budget but for closedMark
	lent    atomic.Int64  // number of lent buffers
	idle    atomic.Int64  // bytes on the arena and hot stacks
	poison  atomic.Bool
	locked  atomic.Bool // memory of slabs cannot be given back
	kept    atomic.Bool // no memory is given back, see Keep

	classes [classes]class
	arena   []byte

	// mu comes before any class.mu.
	mu     sync.Mutex
	lines  [2]line
	slabs  [][]byte // guarded by mu; unmapped by Close
	closed bool     // guarded by mu
}

// line is who waits for small buffers, or for large ones.
type line struct {
	queued  atomic.Int32 // len(waiters)
	waiters []*waiter    // guarded by Pool.mu; in order of arrival
}

// lineOf is where to wait for size bytes.
func (p *Pool) lineOf(size int64) *line {
	if isLarge(size) {
		return &p.lines[1]
	}
	return &p.lines[0]
}

func isLarge(size int64) bool { return size > limits.TurnBuffer }

// charges counts pages: all that are charged for in the low half, those of large
// buffers among them in the high half. It is one word, so that nobody sees one
// half of a charge, or one that is taken back: who finds no room was refused for
// buffers that are lent, and the release of one looks for those who wait.
type charges uint64

func chargesOf(size int64) charges {
	c := charges(size >> minShift)
	if isLarge(size) {
		c |= c << 32
	}
	return c
}

func (c charges) used() int64  { return int64(c&math.MaxUint32) << minShift }
func (c charges) large() int64 { return int64(c>>32) << minShift }

// class is the free list of one size: three stacks linked by Buf.next, which
// are tried in this order.
type class struct {
	size int64

	mu    sync.Mutex
	arena *Buf     // guarded by mu; in the arena
	hot   *Buf     // guarded by mu; resident
	cold  *Buf     // guarded by mu; without memory, large ones without an address
	_     [64]byte // keeps neighbours off this cache line
}

// waiter is one blocked Get.
type waiter struct {
	size  int64
	since time.Time
	got   chan struct{} // closed after the budget was charged for it
}

// Buf is one lent buffer. It belongs to whoever got it until Release.
type Buf struct {
	pool   *Pool
	mem    []byte // the whole class size
	n      int
	class  uint8
	arena  bool // its pages may be pinned and are never given back
	filled bool // with poison, when it was released

	// Guarded by class.mu.
	lent bool
	next *Buf
}

// New makes a pool that lends at most budgetBytes at a time, or 8 TiB. Memory is
// taken from the system as it is used.
func New(budgetBytes int64) *Pool {
	p := &Pool{budget: min(budgetBytes, maxBudget)}
	if budgetBytes >= 8*limits.MaxIO {
		p.spare = budgetBytes / 8
	}
	for i := range p.classes {
		p.classes[i].size = 1 << (minShift + i)
	}
	if budgetBytes >= limits.RingArena {
		p.carveArena()
	}
	return p
}

// SetPoison makes the pool fill buffers with 0xDB when they are lent and when
// they come back, and panic when a released buffer was written to. For tests.
func (p *Pool) SetPoison(on bool) { p.poison.Store(on) }

// Outstanding reports the buffers lent and not yet released, and the bytes of
// budget that they hold.
func (p *Pool) Outstanding() (bufs int, bytes int64) {
	if c := charges(p.charged.Load()); c != closedMark {
		bytes = c.used()
	}
	return int(p.lent.Load()), bytes
}

// Keep makes sure that count buffers of n bytes are there at the same time, with
// their memory, and that no memory is given back to the system from now on. It
// is for those who cannot wait for the system's memory later. The buffers
// count against the budget while Keep runs.
func (p *Pool) Keep(n, count int) error {
	p.kept.Store(true)
	var bufs []*Buf
	defer func() {
		for _, b := range bufs {
			b.Release()
		}
	}()
	for range count {
		b := p.TryGet(n)
		if b == nil {
			return fmt.Errorf("keep %d buffers of %d bytes: there is memory for %d", count, n, len(bufs))
		}
		bufs = append(bufs, b)
		clear(b.mem) // each page is there once it was written to
	}
	return nil
}

// Charge is what a buffer of n bytes takes of the budget.
func Charge(n int) int { return 1 << (minShift + classOf(n)) }

// classOf is the index of the smallest class that holds n bytes.
func classOf(n int) int {
	if n <= 1<<minShift {
		return 0
	}
	return bits.Len(uint(n-1)) - minShift
}

// fits tells why n bytes can never be lent, or nil.
func (p *Pool) fits(n int) error {
	if n < 0 || n > limits.MaxIO {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, n, limits.MaxIO)
	}
	if size := p.classes[classOf(n)].size; size > p.budget-p.spare {
		return fmt.Errorf("%w: %d bytes take %d of %d", ErrTooLarge, n, size, p.budget)
	}
	return nil
}

// charge takes size bytes out of the budget if they are there.
func (p *Pool) charge(size int64) bool {
	for {
		c := charges(p.charged.Load())
		if size > p.room(c, isLarge(size)) {
			return false
		}
		if p.charged.CompareAndSwap(uint64(c), uint64(c+chargesOf(size))) {
			return true
		}
	}
}

// room is what may be charged beside c. While somebody waits for a large buffer
// small ones have no more than what large ones leave.
func (p *Pool) room(c charges, large bool) int64 {
	free := p.budget - c.used()
	switch {
	case large:
		free = min(free, p.budget-p.spare-c.large())
	case p.spare > 0 && p.lines[1].queued.Load() > 0:
		free = min(free, p.spare-(c.used()-c.large()))
	}
	return free
}

// TryGet lends n bytes, or returns nil when the budget is used up right now,
// when a Get waits for it already, or when the system has no memory.
func (p *Pool) TryGet(n int) *Buf {
	if uint(n) > limits.MaxIO {
		return nil
	}
	c := &p.classes[classOf(n)]
	if p.lineOf(c.size).queued.Load() != 0 || !p.charge(c.size) {
		return nil
	}
	b, err := p.take(c, n)
	if err != nil {
		p.refund(c.size)
		return nil
	}
	return b
}

// Get lends n bytes, waiting in order of arrival until the budget has room or
// ctx ends. The contents are undefined: the caller overwrites all of it before
// showing any of it to anyone.
func (p *Pool) Get(ctx context.Context, n int) (*Buf, error) {
	if b := p.TryGet(n); b != nil {
		return b, nil
	}
	if err := p.fits(n); err != nil {
		return nil, err
	}
	c := &p.classes[classOf(n)]
	if err := p.wait(ctx, c.size); err != nil {
		return nil, err
	}
	b, err := p.take(c, n)
	if err != nil {
		p.refund(c.size)
		return nil, err
	}
	return b, nil
}

// wait charges size bytes, in order of arrival.
func (p *Pool) wait(ctx context.Context, size int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w := &waiter{size: size, since: time.Now(), got: make(chan struct{})}
	l := p.lineOf(size)
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return ErrClosed
	}
	l.waiters = append(l.waiters, w)
	l.queued.Store(int32(len(l.waiters)))
	p.grantLocked() // room may have come between TryGet and now
	p.mu.Unlock()

	select {
	case <-w.got:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, o := range l.waiters {
		if o == w {
			l.waiters = append(l.waiters[:i], l.waiters[i+1:]...)
			l.queued.Store(int32(len(l.waiters)))
			p.grantLocked() // a large one in front no longer holds back the rest
			return ctx.Err()
		}
	}
	return nil // granted meanwhile: the caller has its buffer
}

// grantLocked charges the budget for those waiters that now fit, until nobody
// does: whoever is granted may be the one that held back the other line.
func (p *Pool) grantLocked() {
	for p.grantLineLocked(&p.lines[0]) || p.grantLineLocked(&p.lines[1]) {
	}
}

// grantLineLocked charges for those in front of a line, and tells whether there
// was room for any.
func (p *Pool) grantLineLocked(l *line) bool {
	n := 0
	for n < len(l.waiters) && p.charge(l.waiters[n].size) {
		close(l.waiters[n].got)
		n++
	}
	if n == 0 {
		return false
	}
	l.waiters = append(l.waiters[:0], l.waiters[n:]...)
	l.queued.Store(int32(len(l.waiters)))
	return true
}

// Waiting is for how long somebody waits for memory by now, 0 if nobody does.
func (p *Pool) Waiting() (longest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.lines {
		if w := p.lines[i].waiters; len(w) > 0 {
			longest = max(longest, time.Since(w[0].since))
		}
	}
	return longest
}

// refund gives budget back and wakes whoever waits for it.
func (p *Pool) refund(size int64) {
	p.charged.Add(-uint64(chargesOf(size)))
	if p.lines[0].queued.Load() != 0 || p.lines[1].queued.Load() != 0 {
		p.mu.Lock()
		p.grantLocked()
		p.mu.Unlock()
	}
}

// take finds a free buffer of class c, whose size is charged already.
func (p *Pool) take(c *class, n int) (*Buf, error) {
	c.mu.Lock()
	b, resident := c.popLocked()
	if b == nil {
		c.mu.Unlock()
		var err error
		if b, err = p.grow(c); err != nil {
			return nil, err
		}
		c.mu.Lock()
	}
	b.lent, b.n = true, n
	c.mu.Unlock()
	if resident {
		p.idle.Add(-c.size)
	}
	p.lent.Add(1)
	if p.poison.Load() {
		b.checkPoison(resident)
	}
	return b, nil
}

// popLocked takes the best free buffer off its stack, or returns nil.
// resident says that its size is counted in Pool.idle.
func (c *class) popLocked() (b *Buf, resident bool) {
	switch {
	case c.arena != nil:
		b, c.arena = c.arena, c.arena.next
	case c.hot != nil:
		b, c.hot = c.hot, c.hot.next
	default:
		return nil, false
	}
	b.next = nil
	return b, true
}

// popColdLocked takes a buffer that needs memory, or returns nil.
func (c *class) popColdLocked() *Buf {
	b := c.cold
	if b != nil {
		c.cold, b.next = b.next, nil
	}
	return b
}

// Bytes is the buffer, exactly as long as was asked for and page-aligned.
func (b *Buf) Bytes() []byte { return b.mem[:b.n] }

// Cap is the number of bytes the buffer holds and the budget is charged with.
func (b *Buf) Cap() int { return len(b.mem) }

// Release gives the buffer back. Neither b nor its bytes may be used any
// more; a second Release panics, because by then the buffer may be somebody
// else's.
func (b *Buf) Release() {
	p, c := b.pool, &b.pool.classes[b.class]
	if b.filled = p.poison.Load() && b.lent; b.filled {
		fill(b.mem)
	}
	c.mu.Lock()
	if !b.lent {
		c.mu.Unlock()
		panic("bufpool: buffer released twice")
	}
	b.lent = false
	full := false
	switch idle := p.idle.Add(c.size); {
	case b.arena:
		b.next, c.arena = c.arena, b
	case idle <= limits.BufferCache || p.kept.Load():
		b.next, c.hot = c.hot, b
	default:
		full = true
	}
	c.mu.Unlock()
	if full {
		p.shed(b, c)
	}
	p.lent.Add(-1)
	p.refund(c.size)
}

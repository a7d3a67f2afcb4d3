package layer

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrResumed is what Resume returns when the disk went on by itself before.
var ErrResumed = errors.New("the pause had ended")

// pausedBit is set in Pause.state while requests have to stand in line; the lower
// bits count those that are in flight.
const pausedBit = 1 << 62

// Pause can hold a disk still: for a snapshot of the storage below, say. It
// counts every request between its beginning and its end, a mapped one until
// its lease is released.
type Pause struct {
	backing.Passthrough

	// Changed, if not nil, is called when a pause has begun and when it has
	// ended, with no lock of the Pause. It is set before the first call.
	Changed func()

	// state counts the requests in flight, plus pausedBit. A request that
	// finds the bit takes itself back.
	state atomic.Int64

	// idle has a token when the last request of a paused disk ended.
	idle chan struct{}

	mu   sync.Mutex
	hold *Hold     // guarded by mu; nil while the disk runs
	line list.List // guarded by mu; the waiters, by order of arrival
	turn *waiter   // guarded by mu; who is in, and has not handed its turn on
	came uint64    // guarded by mu; number of the last waiter
	held uint64    // guarded by mu; number of the last one that a pause has held

	settling sync.WaitGroup // Add is called with mu and a hold, so not when Close waits
}

// NewPause stands on dev.
func NewPause(dev backing.Device) *Pause {
	return &Pause{Passthrough: backing.Passthrough{Next: dev}, idle: make(chan struct{}, 1)}
}

// Hold is one pause of a disk.
type Hold struct {
	p     *Pause
	timer *time.Timer
	ended chan struct{}
}

// Ended is closed when the disk goes on.
func (h *Hold) Ended() <-chan struct{} { return h.ended }

// Resume lets the disk go on. ErrResumed says that it did so before: what was
// done meanwhile may have seen writes.
func (h *Hold) Resume() error {
	if !h.p.end(h) {
		return ErrResumed
	}
	return nil
}

// Pause is Begin and Settle.
func (p *Pause) Pause(ctx context.Context, limit time.Duration) (*Hold, error) {
	h, err := p.Begin(limit)
	if err != nil {
		return nil, err
	}
	if err := h.Settle(ctx); err != nil {
		return nil, err
	}
	return h, nil
}

// Begin makes new requests wait. The disk goes on by itself limit after the call,
// whatever became of the caller; limit is more than 0 and at most
// limits.PauseLongest. ErrInvalid is for a pause within a pause or a wrong limit.
func (p *Pause) Begin(limit time.Duration) (*Hold, error) {
	if limit <= 0 || limit > limits.PauseLongest {
		return nil, invalid("pause", "limit %v is not between 0 and %v", limit, limits.PauseLongest)
	}
	h, err := p.begin(limit)
	if err == nil {
		p.changed()
	}
	return h, err
}

func (p *Pause) begin(limit time.Duration) (*Hold, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold != nil {
		return nil, invalid("pause", "the disk is paused")
	}
	h := &Hold{p: p, ended: make(chan struct{})}
	p.hold = h
	select {
	case <-p.idle: // left by an earlier pause
	default:
	}
	p.state.Or(pausedBit)
	h.timer = time.AfterFunc(limit, func() { p.end(h) })
	return h, nil
}

// Settle waits until nothing is in flight, and flushes. It gives up when ctx ends.
// After an error the disk goes on: ErrResumed when the pause ended before the flush
// was done, or the error of the flush.
func (h *Hold) Settle(ctx context.Context) error {
	p := h.p
	p.mu.Lock()
	if p.hold != h {
		p.mu.Unlock()
		return ErrResumed
	}
	p.settling.Add(1)
	p.mu.Unlock()
	defer p.settling.Done()
	err := p.settle(ctx, h)
	if err != nil {
		p.end(h)
	}
	return err
}

func (p *Pause) settle(ctx context.Context, h *Hold) error {
	for p.state.Load() != pausedBit {
		select {
		case <-p.idle:
		case <-h.ended:
			return ErrResumed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := p.Next.Flush(ctx); err != nil {
		return err
	}
	select {
	case <-h.ended:
		return ErrResumed
	default:
		return nil
	}
}

// end lets requests go on, if h is the pause that they wait for: those that it has
// held one by one, and then everybody.
func (p *Pause) end(h *Hold) bool {
	p.mu.Lock()
	if p.hold != h {
		p.mu.Unlock()
		return false
	}
	p.hold = nil
	h.timer.Stop()
	p.held = p.came
	if p.turn == nil {
		p.passLocked()
	}
	close(h.ended)
	p.mu.Unlock()
	p.changed()
	return true
}

func (p *Pause) changed() {
	if p.Changed != nil {
		p.Changed()
	}
}

// Paused tells whether the disk is held.
func (p *Pause) Paused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hold != nil
}

// InFlight counts the requests that have begun and not ended.
func (p *Pause) InFlight() int64 { return p.state.Load() &^ pausedBit }

// tryEnter counts a request, unless the disk is paused or others stand in line.
func (p *Pause) tryEnter() bool {
	if p.state.Add(1)&pausedBit == 0 {
		return true
	}
	p.leave()
	return false
}

// waiter is a request that stands in line.
type waiter struct {
	number uint64
	place  *list.Element
	in     chan struct{} // closed when it is in flight
}

// enter counts a request, after the pause if there is one and after those that
// waited for its end, unless ctx ends before.
func (p *Pause) enter(ctx context.Context) error {
	if p.tryEnter() {
		return nil
	}
	w := p.lineUp()
	if w == nil {
		return nil
	}
	select {
	case <-w.in:
	case <-ctx.Done():
	}
	err := ctx.Err() // both may have come at the same time
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-w.in:
		if err != nil {
			p.leave()
		}
		if p.turn == w {
			p.passLocked()
		}
	default:
		p.line.Remove(w.place)
	}
	return err
}

// lineUp puts a request at the end of the line. It is nil when there is nothing to
// wait for any more: the request is counted.
func (p *Pause) lineUp() *waiter {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tryEnter() {
		return nil
	}
	p.came++
	w := &waiter{number: p.came, in: make(chan struct{})}
	w.place = p.line.PushBack(w)
	return w
}

// passLocked hands the turn on while the disk runs. Who was held has it until it
// runs: the next one enters after it. Those that came later are let in together, or
// a busy disk would have a line for ever.
func (p *Pause) passLocked() {
	p.turn = nil
	for p.hold == nil && p.turn == nil {
		first := p.line.Front()
		if first == nil {
			p.state.And(^int64(pausedBit))
			return
		}
		w := p.line.Remove(first).(*waiter)
		p.state.Add(1)
		close(w.in)
		if w.number <= p.held {
			p.turn = w
		}
	}
}

// leave ends a request.
func (p *Pause) leave() {
	if p.state.Add(-1) != pausedBit {
		return
	}
	select {
	case p.idle <- struct{}{}:
	default:
	}
}

// in runs one request.
func (p *Pause) in(ctx context.Context, do func() error) error {
	if err := p.enter(ctx); err != nil {
		return err
	}
	defer p.leave()
	return do()
}

func (p *Pause) ReadAt(ctx context.Context, b []byte, off int64) error {
	return p.in(ctx, func() error { return p.Next.ReadAt(ctx, b, off) })
}

func (p *Pause) WriteAt(ctx context.Context, b []byte, off int64, f backing.Flags) error {
	return p.in(ctx, func() error { return p.Next.WriteAt(ctx, b, off, f) })
}

func (p *Pause) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return p.in(ctx, func() error { return p.Next.Zero(ctx, off, n, f) })
}

func (p *Pause) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return p.in(ctx, func() error { return p.Next.Trim(ctx, off, n, f) })
}

func (p *Pause) Flush(ctx context.Context) error {
	return p.in(ctx, func() error { return p.Next.Flush(ctx) })
}

func (p *Pause) Cache(ctx context.Context, off, n int64) error {
	return p.in(ctx, func() error { return p.Next.Cache(ctx, off, n) })
}

func (p *Pause) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	return p.in(ctx, func() error { return p.Next.Extents(ctx, off, n, f, yield) })
}

func (p *Pause) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return p.in(ctx, func() error { return p.Passthrough.Describe(ctx, name, off, n, f, yield) })
}

func (p *Pause) Resize(ctx context.Context, size int64) error {
	return p.in(ctx, func() error { return p.Passthrough.Resize(ctx, size) })
}

// Map forwards while the disk runs; the request counts until the lease is
// released.
func (p *Pause) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if !p.tryEnter() {
		return backing.ErrNotMappable
	}
	if err := p.Next.Map(op, off, n, m); err != nil {
		p.leave()
		return err
	}
	if m.Lease == nil {
		m.Lease = (*single)(p)
		return nil
	}
	l := counts.Get().(*counted)
	l.p, l.inner = p, m.Lease
	m.Lease = l
	return nil
}

// single is the lease of a request in flight that has no lease of the device
// below: the disk itself, so that none has to be found.
type single Pause

// Release ends the request.
func (p *single) Release() { (*Pause)(p).leave() }

// Close ends a pause, and closes the disk below when nothing flushes it any more.
func (p *Pause) Close() error {
	p.mu.Lock()
	h := p.hold
	p.mu.Unlock()
	if h != nil {
		p.end(h)
	}
	p.settling.Wait()
	return p.Next.Close()
}

// counted is the lease of a request in flight with that of the device below.
type counted struct {
	p     *Pause
	inner backing.Lease
}

var counts = sync.Pool{New: func() any { return new(counted) }}

// Release ends the inner lease first: the request is over only then.
func (l *counted) Release() {
	l.inner.Release()
	p := l.p
	*l = counted{}
	counts.Put(l)
	p.leave()
}

package layer

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Rate bounds one kind of request. 0 is no bound.
type Rate struct {
	Bytes int64 // in a second
	Ops   int64 // requests in a second

	// Burst is how much time's worth may come at once after a rest. It is
	// raised to limits.RateSlack.
	Burst time.Duration
}

// Rates are the bounds of a Limiter. A read counts for Read and for Total,
// anything that changes or flushes for Write and for Total.
type Rates struct{ Read, Write, Total Rate }

func (r Rate) valid() bool {
	return r.Bytes >= 0 && r.Ops >= 0 && r.Burst >= 0 && r.Burst <= limits.RateBurst
}

func (r Rate) any() bool { return r.Bytes > 0 || r.Ops > 0 }

// Limiter enforces Rates on one disk, or on all that share it.
type Limiter struct {
	mu    sync.Mutex
	rates Rates // guarded by mu

	// bounds is set while there is any, changed under mu. Without it nobody
	// looks at the buckets: that is what a disk without limits pays.
	bounds atomic.Bool

	// The buckets have locks of their own.
	read, write, total pairOfBuckets
}

type pairOfBuckets struct{ bytes, ops bucket }

// NewLimiter makes a limiter; bad rates are ErrInvalid.
func NewLimiter(r Rates) (*Limiter, error) {
	l := &Limiter{}
	for _, p := range []*pairOfBuckets{&l.read, &l.write, &l.total} {
		p.bytes.init()
		p.ops.init()
	}
	return l, l.Set(r)
}

// Set changes the rates from now on, for requests that wait, too. A negative
// rate, or a burst beyond limits.RateBurst, is ErrInvalid and changes nothing.
func (l *Limiter) Set(r Rates) error {
	if !r.Read.valid() || !r.Write.valid() || !r.Total.valid() {
		return invalid("set rate", "a rate is negative, or a burst not between 0 and %v", limits.RateBurst)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rates = r
	l.read.set(r.Read)
	l.write.set(r.Write)
	l.total.set(r.Total)
	l.bounds.Store(r.Read.any() || r.Write.any() || r.Total.any())
	return nil
}

// Rates are those of the last Set.
func (l *Limiter) Rates() Rates {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rates
}

func (p *pairOfBuckets) set(r Rate) {
	p.bytes.set(r.Bytes, r.Burst)
	p.ops.set(r.Ops, r.Burst)
}

// cost is what a request takes from limiters.
type cost struct {
	write      bool
	ops, bytes int64
}

// effect is the cost of a request without payload whose bytes do not count.
func effect(n int64) cost {
	return cost{write: true, ops: (n-1)/limits.RateEffect + 1}
}

// buckets are those that a request takes from, and how much.
func (l *Limiter) buckets(c cost) [4]share {
	own := &l.read
	if c.write {
		own = &l.write
	}
	return [4]share{{&own.ops, c.ops, true}, {&l.total.ops, c.ops, true}, {&own.bytes, c.bytes, false}, {&l.total.bytes, c.bytes, false}}
}

type share struct {
	b    *bucket
	n    int64
	each bool // one by one: what counts as many requests waits as those do
}

func (s share) take(ctx context.Context) error {
	if s.each {
		return s.b.takeEach(ctx, s.n)
	}
	return s.b.take(ctx, s.n)
}

// RateOptions name the limiters of a disk.
type RateOptions struct {
	// Limiters all apply: that of the disk itself, and those of the groups
	// that it belongs to.
	Limiters []*Limiter
}

// limiters of a disk at one time: what a request takes from them it puts back
// into them, whatever limits the disk then.
type limiters []*Limiter

// RateLimit makes requests wait until all limiters have tokens for them. A
// read or a write counts with its bytes; so does zeroing where the disk has to
// write the zeroes. All others count as requests only, those without payload as
// one for each limits.RateEffect that they begin.
//
// A read or a write that is larger than a burst goes as a whole, and what
// follows waits the longer. What counts as many requests, of which a client may
// send any number at no cost, takes its turns among those of others.
type RateLimit struct {
	backing.Passthrough
	limiters atomic.Pointer[limiters]
}

// NewRateLimit stands on dev. No more than limits.RateGroups limiters, else
// ErrInvalid.
func NewRateLimit(dev backing.Device, o RateOptions) (*RateLimit, error) {
	l := &RateLimit{Passthrough: backing.Passthrough{Next: dev}}
	if err := l.Set(o); err != nil {
		return nil, err
	}
	return l, nil
}

// Set changes the limiters for requests that come. Those that wait do so where
// they are. Too many are ErrInvalid, as for NewRateLimit, and change nothing.
func (l *RateLimit) Set(o RateOptions) error {
	if len(o.Limiters) > 1+limits.RateGroups {
		return invalid("limit rate", "more than %d groups", limits.RateGroups)
	}
	all := limiters(slices.Clone(o.Limiters))
	l.limiters.Store(&all)
	return nil
}

// try takes all tokens of a request, or none.
func (l limiters) try(c cost) bool {
	for i, lim := range l {
		if !lim.bounds.Load() {
			continue
		}
		shares := lim.buckets(c)
		for j, s := range shares {
			if !s.b.try(s.n) {
				putBack(shares[:j])
				l[:i].putBack(c)
				return false
			}
		}
	}
	return true
}

// take waits for the tokens of a request.
func (l limiters) take(ctx context.Context, c cost) error {
	for i, lim := range l {
		if !lim.bounds.Load() {
			continue
		}
		shares := lim.buckets(c)
		for j, s := range shares {
			if err := s.take(ctx); err != nil {
				putBack(shares[:j])
				l[:i].putBack(c)
				return err
			}
		}
	}
	return nil
}

// putBack returns what a request took.
func (l limiters) putBack(c cost) {
	for _, lim := range l {
		if !lim.bounds.Load() {
			continue
		}
		shares := lim.buckets(c)
		putBack(shares[:])
	}
}

func putBack(shares []share) {
	for _, s := range shares {
		s.b.putBack(s.n)
	}
}

// bounded reports whether any of them has a rate.
func (l limiters) bounded() bool {
	return slices.ContainsFunc(l, func(lim *Limiter) bool { return lim.bounds.Load() })
}

// take waits for the tokens of one request of n bytes.
func (l *RateLimit) take(ctx context.Context, write bool, n int64) error {
	return l.limiters.Load().take(ctx, cost{write, 1, n})
}

func (l *RateLimit) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := l.take(ctx, false, int64(len(p))); err != nil {
		return err
	}
	return l.Next.ReadAt(ctx, p, off)
}

func (l *RateLimit) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if err := l.take(ctx, true, int64(len(p))); err != nil {
		return err
	}
	return l.Next.WriteAt(ctx, p, off, f)
}

// Zero goes in pieces where its bytes count: where the disk, as it is now, says
// that it cannot make these zeroes faster than by writing them.
func (l *RateLimit) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	all := *l.limiters.Load()
	if !all.bounded() {
		return l.Next.Zero(ctx, off, n, f)
	}
	asked := f&backing.FastZero != 0
	if asked || l.Next.Info().Caps.Has(backing.CanFastZero) {
		c := effect(n)
		if err := all.take(ctx, c); err != nil {
			return err
		}
		err := l.Next.Zero(ctx, off, n, f|backing.FastZero)
		if asked || !errors.Is(err, backing.ErrNotSupported) {
			return err
		}
		all.putBack(c) // its pieces take it
	}
	return l.pieces(ctx, true, off, n, func(off, n int64) error { return l.Next.Zero(ctx, off, n, f) })
}

// pieces does a request that has no payload, and may so be of any length, in
// pieces of limits.RatePiece. What it has not begun when ctx ends is not done.
func (l *RateLimit) pieces(ctx context.Context, write bool, off, n int64, do func(off, n int64) error) error {
	for n > 0 {
		if err := ctx.Err(); err != nil { // who finds tokens does not look
			return err
		}
		step := min(n, limits.RatePiece-off%limits.RatePiece)
		if err := l.take(ctx, write, step); err != nil {
			return err
		}
		if err := do(off, step); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

func (l *RateLimit) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	if err := l.limiters.Load().take(ctx, effect(n)); err != nil {
		return err
	}
	return l.Next.Trim(ctx, off, n, f)
}

func (l *RateLimit) Flush(ctx context.Context) error {
	if err := l.take(ctx, true, 0); err != nil {
		return err
	}
	return l.Next.Flush(ctx)
}

// Cache goes in pieces where there are bounds: it makes the storage read.
func (l *RateLimit) Cache(ctx context.Context, off, n int64) error {
	if !l.limiters.Load().bounded() {
		return l.Next.Cache(ctx, off, n)
	}
	return l.pieces(ctx, false, off, n, func(off, n int64) error { return l.Next.Cache(ctx, off, n) })
}

func (l *RateLimit) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	if f&backing.AsRead != 0 {
		return l.askForRead(ctx, off, n, f, yield)
	}
	if err := l.take(ctx, false, 0); err != nil {
		return err
	}
	return l.Next.Extents(ctx, off, n, f, yield)
}

// Describe counts as Extents does: a block status is as many requests as it asks for
// descriptions.
func (l *RateLimit) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	if err := l.take(ctx, false, 0); err != nil {
		return err
	}
	return l.Passthrough.Describe(ctx, name, off, n, f, yield)
}

// askForRead takes what a read does, if there will be none because the answer
// is one.
func (l *RateLimit) askForRead(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	isRead := false
	err := l.Next.Extents(ctx, off, n, f, func(x backing.Extent) bool {
		isRead = x.Zero && x.Len == n
		return yield(x)
	})
	if err != nil || !isRead {
		return err
	}
	return l.take(ctx, false, n)
}

// Map forwards while there are tokens.
func (l *RateLimit) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	c := cost{op != engine.OpRead, 1, n}
	all := *l.limiters.Load()
	if !all.try(c) {
		return backing.ErrNotMappable
	}
	if err := l.Next.Map(op, off, n, m); err != nil {
		all.putBack(c)
		return err
	}
	return nil
}

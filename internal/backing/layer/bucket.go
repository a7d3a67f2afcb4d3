package layer

import (
	"context"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// bucket holds tokens that come in at a steady rate. Who takes more than a
// burst waits for a burst and leaves a debt, so that the rate holds for
// requests of any size.
//
// Those that wait do so in order of arrival: the one that has the turn sleeps,
// the others wait for the turn.
type bucket struct {
	turn chan struct{} // has a token while nobody waits

	mu      sync.Mutex
	rate    float64       // guarded by mu; tokens in a second, 0 is no bound
	burst   float64       // guarded by mu; most that is taken without a debt
	slack   float64       // guarded by mu; held on top of burst for those who wake late
	tokens  float64       // guarded by mu; below 0 it is a debt
	last    time.Time     // guarded by mu; when tokens was right
	changed chan struct{} // guarded by mu; closed when the rate changes, or tokens come back
}

// init makes a bucket without a bound.
func (b *bucket) init() {
	b.turn = make(chan struct{}, 1)
	b.turn <- struct{}{}
	b.changed = make(chan struct{})
	b.last = time.Now()
}

// set changes the rate for those that wait, too. burst is raised to
// limits.RateSlack. A debt is cut to a burst, unless nothing changes.
func (b *bucket) set(rate int64, burst time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	most := float64(rate) * max(burst, limits.RateSlack).Seconds()
	if b.rate == float64(rate) && b.burst == most {
		return
	}
	b.fillLocked(time.Now())
	old := b.burst
	b.rate, b.burst = float64(rate), most
	b.slack = b.rate * limits.RateSlack.Seconds()
	if old == 0 {
		b.tokens = b.burst
	}
	b.tokens = max(min(b.tokens, b.burst), -b.burst)
	b.wakeLocked()
}

// fillLocked adds what came in since the last call.
func (b *bucket) fillLocked(now time.Time) {
	if d := now.Sub(b.last); d > 0 {
		b.tokens = min(b.burst+b.slack, b.tokens+b.rate*d.Seconds())
		b.last = now
	}
}

// takeLocked takes n tokens, or tells how long it will be until they are there.
func (b *bucket) takeLocked(n float64) (wait time.Duration) {
	if b.rate == 0 {
		return 0
	}
	b.fillLocked(time.Now())
	if missing := min(n, b.burst) - b.tokens; missing > 0 {
		return waitFor(missing / b.rate)
	}
	b.tokens -= n
	return 0
}

// waitFor is at least a nanosecond and at most an hour: then the taker looks
// again.
func waitFor(seconds float64) time.Duration {
	return max(time.Duration(min(seconds, time.Hour.Seconds())*float64(time.Second)), 1)
}

// try takes n tokens if they are there and nobody waits for any. Who takes none
// waits for nobody.
func (b *bucket) try(n int64) bool {
	if n == 0 {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate == 0 {
		return true
	}
	return len(b.turn) == 1 && b.takeLocked(float64(n)) == 0
}

// bounded tells whether there is a rate.
func (b *bucket) bounded() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rate != 0
}

// take waits for n tokens until ctx ends. Who had to wait takes none after that.
func (b *bucket) take(ctx context.Context, n int64) error {
	if b.try(n) {
		return nil
	}
	select {
	case <-b.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { b.turn <- struct{}{} }()
	err := ctx.Err() // the turn may have come at the same time
	for err == nil {
		b.mu.Lock()
		d, changed := b.takeLocked(float64(n)), b.changed
		b.mu.Unlock()
		if d == 0 {
			return nil
		}
		err = sleep(ctx, d, changed)
	}
	return err
}

// takeEach takes n tokens as n that want one each do: in turn with all others, and
// with no debt that is larger than theirs.
func (b *bucket) takeEach(ctx context.Context, n int64) error {
	for taken := int64(0); taken < n && b.bounded(); taken++ {
		err := ctx.Err()
		if err == nil {
			err = b.take(ctx, 1)
		}
		if err != nil {
			b.putBack(taken)
			return err
		}
	}
	return nil
}

// sleep waits for d, or until wake is closed. It ends with an error when ctx
// does.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// putBack returns n tokens that were not used, also to who has begun to wait for others.
func (b *bucket) putBack(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate != 0 {
		b.tokens = min(b.tokens+float64(n), b.burst+b.slack)
	}
	if len(b.turn) == 0 {
		b.wakeLocked()
	}
}

// wakeLocked has who waits look again.
func (b *bucket) wakeLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

package bufpool

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestRefusedTryTakesNothing: a TryGet that gets nothing is not seen by others
// meanwhile: one that fits is served, and nobody is left asleep for its sake.
func TestRefusedTryTakesNothing(t *testing.T) {
	p := New(1 << 20)
	held := mustGet(t, p, limits.TurnBuffer)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if b := p.TryGet(1 << 20); b != nil {
					t.Error("the whole budget was lent beside a part of it")
					return
				}
			}
		})
	}
	for i := range 300_000 {
		b := p.TryGet(512 << 10)
		if b == nil {
			t.Errorf("try %d: no room for 512 KiB beside 256 KiB of 1 MiB", i)
			break
		}
		b.Release()
	}
	close(stop)
	wg.Wait()
	held.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// TestSmallOnesFollowTheLastLargeOne: once nobody waits for a large buffer, the
// small ones that it held back are served.
func TestSmallOnesFollowTheLastLargeOne(t *testing.T) {
	p := New(8 * limits.MaxIO)
	held := tryAll(p, limits.MaxIO)
	held[0].Release()
	held = held[1:]
	for range limits.MaxIO/limits.TurnBuffer + 1 {
		held = append(held, mustGet(t, p, limits.TurnBuffer))
	}
	large, small := waitForLarge(t, p), make(chan *Buf)
	go func() { small <- mustGet(t, p, limits.TurnBuffer) }()
	for p.lines[0].queued.Load() != 1 {
	}
	held[0].Release()
	held[0] = <-large
	if n := p.lines[0].queued.Load(); n != 0 {
		_, bytes := p.Outstanding()
		t.Fatalf("%d wait for a small buffer, with %d bytes lent of %d and no large one awaited", n, bytes, 8*limits.MaxIO)
	}
	for _, b := range append(held, <-small) {
		b.Release()
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// crowd uses a pool at random, from many goroutines at a time. It runs in a
// bubble of synctest, which tells when all of them wait.
type crowd struct {
	*testing.T
	p   *Pool
	rnd *rand.Rand

	mu   sync.Mutex
	held []*Buf // guarded by mu

	waits []*wait
}

// wait is one Get that may still be under way.
type wait struct {
	cancel context.CancelFunc
	over   chan struct{}
}

func (c *crowd) keep(b *Buf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b != nil {
		c.held = append(c.held, b)
	}
}

// drop takes away a buffer that is held, or returns nil.
func (c *crowd) drop(i int) *Buf {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.held) == 0 {
		return nil
	}
	i %= len(c.held)
	b := c.held[i]
	c.held = slices.Delete(c.held, i, i+1)
	return b
}

// size is small or large, at even odds.
func (c *crowd) size() int {
	return [...]int{4 << 10, 64 << 10, 200 << 10, limits.TurnBuffer, 300 << 10, 1 << 20, 2 << 20, 4 << 20}[c.rnd.IntN(8)]
}

// get has somebody wait for a buffer.
func (c *crowd) get(n int) {
	ctx, cancel := context.WithCancel(c.Context())
	w := &wait{cancel: cancel, over: make(chan struct{})}
	c.waits = append(c.waits, w)
	go func() {
		defer close(w.over)
		b, err := c.p.Get(ctx, n)
		if err != nil && ctx.Err() == nil {
			c.Errorf("Get(%d): %v", n, err)
		}
		c.keep(b)
	}()
}

// step does one thing in a goroutine of its own.
func (c *crowd) step() {
	switch i := c.rnd.IntN(100); {
	case i < 30:
		c.get(c.size())
	case i < 60:
		n := c.size()
		go func() { c.keep(c.p.TryGet(n)) }()
	case i < 90:
		if b := c.drop(c.rnd.IntN(1 << 10)); b != nil {
			go b.Release()
		}
	case len(c.waits) > 0:
		go c.waits[c.rnd.IntN(len(c.waits))].cancel()
	}
}

// settle waits until everybody waits, and forgets the Gets that are over.
func (c *crowd) settle() {
	synctest.Wait()
	c.waits = slices.DeleteFunc(c.waits, func(w *wait) bool {
		select {
		case <-w.over:
			w.cancel()
			return true
		default:
			return false
		}
	})
}

// check compares the pool, in which nothing happens, with what is held.
func (c *crowd) check() {
	var used, large int64
	for _, b := range c.held {
		n := int64(Charge(len(b.Bytes())))
		if used += n; isLarge(n) {
			large += n
		}
	}
	if bufs, bytes := c.p.Outstanding(); bufs != len(c.held) || bytes != used {
		c.Fatalf("Outstanding() = %d, %d, want %d, %d", bufs, bytes, len(c.held), used)
	}
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	small, big := c.p.lines[0].waiters, c.p.lines[1].waiters
	if n := len(small) + len(big); n != len(c.waits) {
		c.Fatalf("%d wait in line, want %d", n, len(c.waits))
	}
	room := c.p.budget - used
	if most := min(room, c.p.budget-c.p.spare-large); len(big) > 0 && big[0].size <= most {
		c.Fatalf("somebody waits for %d with room for %d large bytes", big[0].size, most)
	}
	if len(big) > 0 && c.p.spare > 0 {
		room = min(room, large+c.p.spare-used)
	}
	if len(small) > 0 && small[0].size <= room {
		c.Fatalf("somebody waits for %d with room for %d small bytes", small[0].size, room)
	}
}

// TestNobodyWaitsForWhatIsThere: whatever is asked for, given up and given back at
// a time, whoever waits then does so for something, and at the end for nothing.
func TestNobodyWaitsForWhatIsThere(t *testing.T) {
	for _, spare := range []int64{0, 1 << 20} {
		seed := rand.Uint64()
		synctest.Test(t, func(t *testing.T) {
			t.Logf("seed %d, %d bytes spare", seed, spare)
			c := &crowd{T: t, p: New(8 << 20), rnd: rand.New(rand.NewPCG(seed, 0))}
			c.p.spare = spare
			for range 2000 {
				for range 1 + c.rnd.IntN(8) {
					c.step()
				}
				c.settle()
				c.check()
			}
			for b := c.drop(0); b != nil; b = c.drop(0) {
				b.Release()
				c.settle()
				c.check()
			}
			if len(c.waits) != 0 {
				t.Errorf("%d wait although all was given back", len(c.waits))
			}
			if err := c.p.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

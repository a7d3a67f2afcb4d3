package layer_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func limited(d backing.Device, list ...layer.Rates) *layer.RateLimit {
	var o layer.RateOptions
	for _, r := range list {
		o.Limiters = append(o.Limiters, must(layer.NewLimiter(r)))
	}
	return must(layer.NewRateLimit(d, o))
}

func TestRateLimitConforms(t *testing.T) {
	conform(t, 0, func(_ testing.TB, d backing.Device) backing.Device {
		return limited(d, layer.Rates{Read: layer.Rate{Bytes: 4 << 30}, Write: layer.Rate{Ops: 1e6}}, layer.Rates{Total: layer.Rate{Bytes: 2 << 30}})
	})
}

// trace notes how many bytes and requests go through in each 10 ms.
type trace struct {
	backing.Device
	lag time.Duration // what each request takes

	mu    sync.Mutex
	begin time.Time
	bytes map[int64]int64 // by window
	ops   map[int64]int64
}

func newTrace(lag time.Duration) *trace {
	return &trace{Device: mem.Null(1 << 40), lag: lag, begin: time.Now(), bytes: map[int64]int64{}, ops: map[int64]int64{}}
}

const window = 10 * time.Millisecond

func (c *trace) note(n int) {
	c.mu.Lock()
	at := int64(time.Since(c.begin) / window)
	c.bytes[at] += int64(n)
	c.ops[at]++
	c.mu.Unlock()
	time.Sleep(c.lag)
}

func (c *trace) ReadAt(_ context.Context, p []byte, _ int64) error {
	c.note(len(p))
	return nil
}

func (c *trace) WriteAt(_ context.Context, p []byte, _ int64, _ backing.Flags) error {
	c.note(len(p))
	return nil
}

// load keeps clients busy for a time, with requests of n bytes that they map if
// they can, and else write.
func load(t *testing.T, d backing.Device, c *trace, clients, n int, whole time.Duration) {
	ctx, cancel := context.WithTimeout(t.Context(), whole)
	defer cancel()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			var m backing.Mapping
			p := make([]byte, n)
			for ctx.Err() == nil {
				if d.Map(engine.OpRead, 0, int64(n), &m) == nil {
					m.Release()
					c.note(n)
				} else if err := d.ReadAt(ctx, p, 0); err != nil && ctx.Err() == nil {
					t.Errorf("read: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func within(got, want, percent float64) bool { return math.Abs(got-want) <= want*percent/100 }

func TestRateHoldsInEveryWindow(t *testing.T) {
	for _, tt := range []struct {
		clients, n int
		lag        time.Duration
	}{{1, 512, 0}, {1, 4096, 0}, {8, 4096, 0}, {200, 4096, 3 * time.Millisecond}, {4, 10000, 0}} {
		t.Run(fmt.Sprintf("%dx%d+%v", tt.clients, tt.n, tt.lag), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const rate = 100e6
				c := newTrace(tt.lag)
				load(t, limited(c, layer.Rates{Read: layer.Rate{Bytes: rate}}), c, tt.clients, tt.n, 300*time.Millisecond)
				for at := int64(5); at < 29; at++ {
					want := rate * window.Seconds()
					if got := float64(c.bytes[at]); !within(got, want, 3) {
						t.Errorf("window %d: got %.0f bytes, want %.0f within 3 %%", at, got, want)
					}
				}
			})
		})
	}
}

func total(m map[int64]int64) (sum int64) {
	for _, n := range m {
		sum += n
	}
	return sum
}

func TestRateHoldsForRequestsOfAnySize(t *testing.T) {
	for _, n := range []int{512, 64 << 10, 1 << 20, 32 << 20} {
		synctest.Test(t, func(t *testing.T) {
			const rate = 50e6
			lag, whole := 7*time.Millisecond, 20*time.Second
			if n < 1<<20 {
				lag, whole = 0, time.Second/2
			}
			c := newTrace(lag)
			load(t, limited(c, layer.Rates{Total: layer.Rate{Bytes: rate}}), c, 16, n, whole)
			if got := float64(total(c.bytes)) / whole.Seconds(); !within(got, rate, 5) {
				t.Errorf("requests of %d bytes: got %.0f bytes in a second, want %.0f and the burst", n, got, rate)
			}
		})
	}
}

// Who is late by less than limits.RateSlack makes up for it: timers are.
func TestLateRequestsCostNoRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate = 100e6
		d := limited(mem.Null(1<<30), layer.Rates{Read: layer.Rate{Bytes: rate}})
		p := make([]byte, 1e6) // 10 ms
		begin := time.Now()
		for range 100 {
			for _, late := range []time.Duration{18 * time.Millisecond, 0} {
				time.Sleep(late)
				if err := d.ReadAt(t.Context(), p, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got := 200e6 / time.Since(begin).Seconds(); !within(got, rate, 3) {
			t.Errorf("got %.0f bytes in a second, want %.0f within 3 %%", got, rate)
		}
	})
}

func TestOpsAreCountedWhateverTheirSize(t *testing.T) {
	for _, rate := range []int64{10, 1000} {
		synctest.Test(t, func(t *testing.T) {
			c := newTrace(0)
			load(t, limited(c, layer.Rates{Read: layer.Rate{Ops: rate}}), c, 4, 100000, 20*time.Second)
			if got := float64(total(c.ops)) / 20; !within(got, float64(rate), 3) {
				t.Errorf("got %v requests in a second, want %d within 3 %%", got, rate)
			}
		})
	}
}

// TestDescriptionsAreRequests: what a disk is asked beyond its extents counts, is
// written down and fails as those are.
func TestDescriptionsAreRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := func(d backing.Describer) error {
			return d.Describe(t.Context(), "x", 1, 10, backing.ReqOne, func(backing.Status) bool { return true })
		}
		d := &growing{Device: mem.New(4096, nil)}
		slow := limited(d, layer.Rates{Read: layer.Rate{Ops: 10}})
		if got := elapsed(t, func() (err error) {
			for range 10 {
				err = errors.Join(err, ask(slow))
			}
			return err
		}); got < 850*time.Millisecond {
			t.Errorf("ten at 10 in a second took %v", got)
		}
		l, b := logOf(d)
		l.Set(true)
		if err := ask(l); err != nil || b.String() != "op=\"describe x\" off=1 len=10 flags=req-one took=0s\n" {
			t.Errorf("log: got %q, %v", b, err)
		}
		broken := faulty(d, 0, layer.Fault{Ops: layer.FaultExtents, Probability: 1, Error: backing.ErrIO})
		isKind(t, "describe", ask(broken), backing.ErrIO)
	})
}

// elapsed is how long one call takes on the clock of the bubble.
func elapsed(t *testing.T, do func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := do(); err != nil {
		t.Fatal(err)
	}
	return time.Since(begin)
}

func TestBurstGoesAtOnceAfterARest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := limited(mem.Null(1<<30), layer.Rates{Write: layer.Rate{Bytes: 1e6, Burst: 5 * time.Second}})
		for range 2 {
			write := func(n int) func() error {
				return func() error { return d.WriteAt(t.Context(), make([]byte, n), 0, 0) }
			}
			if got := elapsed(t, write(5e6)); got != 0 {
				t.Errorf("burst: took %v, want nothing", got)
			}
			if got := elapsed(t, write(1e6)); got < 980*time.Millisecond || got > time.Second {
				t.Errorf("after the burst: a second's bytes took %v", got)
			}
			time.Sleep(10 * time.Second)
		}
	})
}

func TestReadsAndWritesAreSeparate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := limited(mem.Null(1<<30), layer.Rates{Write: layer.Rate{Bytes: 1000}})
		if err := d.WriteAt(t.Context(), make([]byte, 5000), 0, 0); err != nil {
			t.Fatal(err)
		}
		if got := elapsed(t, func() error { return d.ReadAt(t.Context(), make([]byte, 1<<20), 0) }); got != 0 {
			t.Errorf("a read without a bound took %v", got)
		}
		if got := elapsed(t, func() error { return d.WriteAt(t.Context(), make([]byte, 10), 0, 0) }); got < 4900*time.Millisecond {
			t.Errorf("a write behind a debt of 5 s took %v", got)
		}
	})
}

// TestSameRateForgivesNoDebt: whoever sets something else of an export sets
// its rate again.
func TestSameRateForgivesNoDebt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rate := layer.Rates{Write: layer.Rate{Bytes: 1000, Ops: 7}}
		lim := must(layer.NewLimiter(rate))
		d := must(layer.NewRateLimit(mem.Null(1<<30), layer.RateOptions{Limiters: []*layer.Limiter{lim}}))
		if err := d.WriteAt(t.Context(), make([]byte, 5000), 0, 0); err != nil {
			t.Fatal(err)
		}
		for _, ops := range []int64{7, 8} {
			rate.Write.Ops = ops
			if err := lim.Set(rate); err != nil {
				t.Fatal(err)
			}
		}
		if got := elapsed(t, func() error { return d.WriteAt(t.Context(), make([]byte, 10), 0, 0) }); got < 4900*time.Millisecond {
			t.Errorf("a write behind a debt of 5 s took %v", got)
		}
	})
}

// TestHoleThatIsAskedForCountsAsItsRead: what the server asks for itself before
// a read is no request, and is the read where there is nothing to be read.
func TestHoleThatIsAskedForCountsAsItsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100000
		data, hole := mem.New(1<<20, nil), mem.New(1<<20, nil)
		if err := data.WriteAt(t.Context(), make([]byte, n), 0, 0); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name  string
			dev   backing.Device
			rates layer.Rates
			want  time.Duration // of ten reads
		}{
			{"data, requests", data, layer.Rates{Read: layer.Rate{Ops: 10}}, time.Second},
			{"hole, requests", hole, layer.Rates{Read: layer.Rate{Ops: 10}}, time.Second},
			{"data, bytes", data, layer.Rates{Read: layer.Rate{Bytes: n}}, 10 * time.Second},
			{"hole, bytes", hole, layer.Rates{Total: layer.Rate{Bytes: n}}, 10 * time.Second},
		} {
			d := limited(backing.NewEmulate(tt.dev), tt.rates)
			got := elapsed(t, func() (err error) {
				for range 10 {
					zero := false
					err = errors.Join(err, d.Extents(t.Context(), 0, n, backing.ReqOne|backing.AsRead, func(x backing.Extent) bool {
						zero = x.Zero && x.Len == n
						return false
					}))
					if !zero {
						err = errors.Join(err, d.ReadAt(t.Context(), make([]byte, n), 0))
					}
				}
				return err
			})
			if got > tt.want || got < tt.want*85/100 {
				t.Errorf("%s: took %v, want %v", tt.name, got, tt.want)
			}
		}
	})
}

func TestNewRateIsForThoseThatWaitToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lim := must(layer.NewLimiter(layer.Rates{Total: layer.Rate{Bytes: 1}}))
		d := must(layer.NewRateLimit(mem.Null(1<<30), layer.RateOptions{Limiters: []*layer.Limiter{lim}}))
		if err := d.WriteAt(t.Context(), make([]byte, 1<<20), 0, 0); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(time.Second)
			if err := lim.Set(layer.Rates{Total: layer.Rate{Bytes: 1e6}}); err != nil {
				t.Error(err)
			}
		}()
		if got := elapsed(t, func() error { return d.WriteAt(t.Context(), make([]byte, 1000), 0, 0) }); got > 1100*time.Millisecond {
			t.Errorf("after a million times the rate: waited %v, want little more than 1s", got)
		}
		if r := lim.Rates(); r.Total.Bytes != 1e6 {
			t.Errorf("rates: got %+v", r)
		}
		for _, r := range []layer.Rate{{Ops: -1}, {Bytes: -1}, {Burst: -1}, {Burst: limits.RateBurst + 1}} {
			isKind(t, "bad rate", lim.Set(layer.Rates{Read: r}), backing.ErrInvalid)
		}
		if err := lim.Set(layer.Rates{}); err != nil {
			t.Fatal(err)
		}
		if got := elapsed(t, func() error { return d.WriteAt(t.Context(), make([]byte, 1<<26), 0, 0) }); got != 0 {
			t.Errorf("without a bound: waited %v", got)
		}
	})
}

func TestGroupSharesOneRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		group := must(layer.NewLimiter(layer.Rates{Total: layer.Rate{Bytes: 10e6}}))
		c := newTrace(0)
		var wg sync.WaitGroup
		for range 3 {
			own := must(layer.NewLimiter(layer.Rates{Total: layer.Rate{Bytes: 8e6}}))
			d := must(layer.NewRateLimit(c, layer.RateOptions{Limiters: []*layer.Limiter{own, group}}))
			wg.Go(func() { load(t, d, c, 2, 4096, 10*time.Second) })
		}
		wg.Wait()
		if got := float64(total(c.bytes)) / 10; !within(got, 10e6, 3) {
			t.Errorf("three disks: got %.0f bytes in a second, want 10 million within 3 %%", got)
		}
	})
}

func TestWaitEndsWithItsContextAndTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := limited(mem.Null(1<<30), layer.Rates{Write: layer.Rate{Ops: 1e6}}, layer.Rates{Write: layer.Rate{Bytes: 1000}})
		if err := d.WriteAt(t.Context(), make([]byte, 10000), 0, 0); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for range 10 {
			wg.Go(func() {
				if err := d.WriteAt(ctx, make([]byte, 10000), 0, 0); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("write: got %v, want %v", err, context.DeadlineExceeded)
				}
			})
		}
		wg.Wait()
		if got := elapsed(t, func() error { return d.WriteAt(t.Context(), make([]byte, 10), 0, 0) }); got > 9*time.Second {
			t.Errorf("those that gave up have cost %v", got-9*time.Second)
		}
	})
}

func TestMapYieldsToThoseThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := limited(mem.Null(1<<30), layer.Rates{Read: layer.Rate{Bytes: 1000, Burst: time.Second}})
		var m backing.Mapping
		if err := d.Map(engine.OpRead, 0, 1000, &m); err != nil {
			t.Fatal(err)
		}
		go func() { _ = d.ReadAt(t.Context(), make([]byte, 1000), 0) }()
		time.Sleep(900 * time.Millisecond)
		isKind(t, "map of what is there while another waits", d.Map(engine.OpRead, 0, 10, &m), backing.ErrNotMappable)
		time.Sleep(200 * time.Millisecond)
		if err := d.Map(engine.OpRead, 0, 10, &m); err != nil {
			t.Errorf("map when nobody waits: %v", err)
		}
	})
}

func TestWhatCannotBeMappedCostsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := limited(mem.New(1<<20, nil), layer.Rates{Total: layer.Rate{Ops: 1, Burst: 3 * time.Second}})
		var m backing.Mapping
		for range 10 {
			isKind(t, "map", d.Map(engine.OpRead, 0, 10, &m), backing.ErrNotMappable)
		}
		got := elapsed(t, func() error {
			for range 3 {
				if err := d.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
					return err
				}
			}
			return nil
		})
		if got != 0 {
			t.Errorf("a burst of 3 after 10 refused maps: waited %v", got)
		}
	})
}

// keeper refuses to zero fast where no hole may be left, as block devices do.
type keeper struct{ backing.Device }

func (k keeper) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if f&(backing.FastZero|backing.NoHole) == backing.FastZero|backing.NoHole {
		return backing.ErrNotSupported
	}
	return k.Device.Zero(ctx, off, n, f)
}

// plodder zeroes by writing.
type plodder struct{ backing.Device }

func (p plodder) Info() backing.Info {
	i := p.Device.Info()
	i.Caps &^= backing.CanFastZero
	return i
}

func TestZeroesThatAreWrittenCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := layer.Rates{Write: layer.Rate{Bytes: 1 << 20}}
		fast := mem.Null(1 << 40)
		for _, tt := range []struct {
			name string
			dev  backing.Device
			f    backing.Flags
			want time.Duration
		}{
			{"zeroes fast", fast, 0, 0},
			{"zeroes by writing", plodder{fast}, 0, 64 * time.Second},
			{"zeroes fast with holes only", keeper{fast}, 0, 0},
			{"zeroes fast with holes only, and may leave none", keeper{fast}, backing.NoHole, 64 * time.Second},
			{"has the zeroes written for it", backing.NewEmulate(keeper{fast}), backing.NoHole | backing.FUA, 64 * time.Second},
		} {
			d := limited(tt.dev, r)
			got := elapsed(t, func() error { return d.Zero(t.Context(), 0, 64<<20, tt.f) })
			if got > tt.want || got < tt.want*95/100 {
				t.Errorf("zero 64 MiB at 1 MiB/s on a disk that %s: took %v, want %v", tt.name, got, tt.want)
			}
			if got := elapsed(t, func() error { return d.Trim(t.Context(), 0, 1<<40, 0) }); got != 0 {
				t.Errorf("trim: took %v", got)
			}
		}
	})
}

// TestZeroesAreThoseOfTheDiskNow: an image above the one that was there when the limits
// were put on it may zero in another way.
func TestZeroesAreThoseOfTheDiskNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fast, slow := mem.Null(1<<40), plodder{mem.Null(1 << 40)}
		swap := layer.NewSwap(fast)
		d := limited(swap, layer.Rates{Total: layer.Rate{Bytes: 1 << 20}})
		for i, tt := range []struct {
			dev  backing.Device
			want time.Duration
		}{{slow, 64 * time.Second}, {fast, 0}, {slow, 64 * time.Second}} {
			swap.To(tt.dev)
			got := elapsed(t, func() error { return d.Zero(t.Context(), 0, 64<<20, 0) })
			if got > tt.want || got < tt.want*95/100 {
				t.Errorf("disk %d: zero 64 MiB at 1 MiB/s took %v, want %v", i, got, tt.want)
			}
		}
	})
}

// TestFastZeroIsRefusedAtOnce: a client that asked for nothing slow gets it neither
// written nor delayed, however little may be written.
func TestFastZeroIsRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, caps := range []backing.Device{mem.Null(1 << 40), plodder{mem.Null(1 << 40)}} {
			d := limited(backing.NewEmulate(keeper{caps}), layer.Rates{Write: layer.Rate{Bytes: 1}})
			got := elapsed(t, func() error {
				isKind(t, "fast zero", d.Zero(t.Context(), 0, 64<<20, backing.FastZero|backing.NoHole), backing.ErrNotSupported)
				return nil
			})
			if got != 0 {
				t.Errorf("fast zero on a disk of caps %#x: took %v", caps.Info().Caps, got)
			}
		}
	})
}

// TestZeroesCountAsRequests: once, whichever way they are made, and a long one for
// each limits.RateEffect.
func TestZeroesCountAsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fast := mem.Null(1 << 44)
		for _, tt := range []struct {
			name string
			dev  backing.Device
			n    int64
			want time.Duration // of ten
		}{
			{"fast", fast, 4096, time.Second},
			{"refused to be fast", keeper{fast}, 4096, time.Second},
			{"long", fast, 5 * limits.RateEffect, 5 * time.Second},
			{"of the whole disk", fast, 1 << 44, 1 << 44 / limits.RateEffect * time.Second},
		} {
			f := backing.NoHole
			d := limited(tt.dev, layer.Rates{Write: layer.Rate{Ops: 10}})
			for i, do := range []func() error{
				func() error { return d.Zero(t.Context(), 0, tt.n, f) },
				func() error { return d.Trim(t.Context(), 0, tt.n, 0) },
			} {
				got := elapsed(t, func() (err error) {
					for range 10 {
						err = errors.Join(err, do())
					}
					return err
				})
				if got > tt.want || got < tt.want*85/100 {
					t.Errorf("%s: ten of kind %d at 10 in a second took %v, want %v", tt.name, i, got, tt.want)
				}
			}
		}
	})
}

// TestLongRequestsHoldUpNoNeighbour: a client of one disk asks for what counts as many
// requests, again and again, and leaves. Those of another disk of its group wait for
// one request of each at most, and then for nothing.
func TestLongRequestsHoldUpNoNeighbour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const trims, rate = 100, 1000
		group := must(layer.NewLimiter(layer.Rates{Total: layer.Rate{Ops: rate}}))
		disk := func() backing.Device {
			return must(layer.NewRateLimit(mem.Null(1<<43), layer.RateOptions{Limiters: []*layer.Limiter{group}}))
		}
		a, b := disk(), disk()
		ctx, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range trims {
			wg.Go(func() {
				if err := a.Trim(ctx, 0, 1<<43, 0); !errors.Is(err, context.Canceled) {
					t.Errorf("trim whose client left: got %v, want %v", err, context.Canceled)
				}
			})
		}
		synctest.Wait()
		time.Sleep(time.Second)
		read := func() error { return b.ReadAt(t.Context(), make([]byte, 4096), 0) }
		if got, most := elapsed(t, read), (trims+1)*time.Second/rate; got > most {
			t.Errorf("a neighbour's read waits %v, want no more than %v", got, most)
		}
		leave()
		wg.Wait()
		if got := elapsed(t, read); got > time.Second/rate {
			t.Errorf("with the client gone: waits %v, want what one request does", got)
		}
	})
}

func TestTooManyGroupsAreRefused(t *testing.T) {
	_, err := layer.NewRateLimit(mem.New(1, nil), layer.RateOptions{Limiters: make([]*layer.Limiter, limits.RateGroups+2)})
	isKind(t, "groups", err, backing.ErrInvalid)
}

func TestRateLimitMapsWithoutAllocating(t *testing.T) {
	rates := layer.Rates{Total: layer.Rate{Bytes: 1 << 40, Ops: 1 << 30}}
	if n := mapAllocates(t, closing(t, limited(newRaw(t, "pool", 1<<20, 0), rates, rates))); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

// TestLimitersChangeInUse: what comes is limited by the new ones; what waits does
// so where it is.
func TestLimitersChangeInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := must(layer.NewLimiter(layer.Rates{Write: layer.Rate{Bytes: 1000}}))
		slower := must(layer.NewLimiter(layer.Rates{Write: layer.Rate{Bytes: 100}}))
		d := limited(mem.Null(1 << 30))
		write := func() error { return d.WriteAt(t.Context(), make([]byte, 10000), 0, 0) }
		for _, tt := range []struct {
			limiters []*layer.Limiter
			want     time.Duration // of what waits behind a write
		}{{[]*layer.Limiter{slow}, 10 * time.Second}, {[]*layer.Limiter{slow, slower}, 100 * time.Second}, {nil, 0}} {
			if err := d.Set(layer.RateOptions{Limiters: tt.limiters}); err != nil {
				t.Fatal(err)
			}
			if err := write(); err != nil {
				t.Fatal(err)
			}
			if got := elapsed(t, write); got < tt.want*9/10 || got > tt.want*11/10 {
				t.Errorf("with %d limiters a write waits %v, want %v", len(tt.limiters), got, tt.want)
			}
		}
		isKind(t, "groups", d.Set(layer.RateOptions{Limiters: make([]*layer.Limiter, limits.RateGroups+2)}), backing.ErrInvalid)
		if got := elapsed(t, write); got != 0 {
			t.Errorf("after limiters that were refused a write waits %v", got)
		}
	})
}

// changing has its limiters changed by each Map, which it refuses.
type changing struct {
	backing.Device
	change func()
}

func (c *changing) Map(engine.Op, int64, int64, *backing.Mapping) error {
	c.change()
	return backing.ErrNotMappable
}

func TestTokensGoBackWhereTheyCameFrom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lim := must(layer.NewLimiter(layer.Rates{Total: layer.Rate{Ops: 1, Burst: 3 * time.Second}}))
		all := layer.RateOptions{Limiters: []*layer.Limiter{lim}}
		dev := &changing{Device: mem.Null(1 << 20)}
		d := must(layer.NewRateLimit(dev, all))
		dev.change = func() { must(0, d.Set(layer.RateOptions{})) }
		isKind(t, "map", d.Map(engine.OpRead, 0, 10, new(backing.Mapping)), backing.ErrNotMappable)
		must(0, d.Set(all))
		for range 3 {
			if got := elapsed(t, func() error { return d.ReadAt(t.Context(), make([]byte, 10), 0) }); got != 0 {
				t.Errorf("a read of a burst of 3 waited %v", got)
			}
		}
	})
}

// TestWhatHasNoBytesWaitsForNone: a flush covers what is written, not what waits
// to be written. Where requests count it has its turn among them.
func TestWhatHasNoBytesWaitsForNone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		rates layer.Rates
		want  time.Duration
	}{
		{"bytes", layer.Rates{Write: layer.Rate{Bytes: 1000}}, 0},
		{"bytes of all", layer.Rates{Total: layer.Rate{Bytes: 1000}}, 0},
		{"requests", layer.Rates{Total: layer.Rate{Ops: 1}}, 2 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := limited(mem.Null(1<<30), tt.rates)
				write := func() error { return d.WriteAt(t.Context(), make([]byte, 10000), 0, 0) }
				if err := write(); err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					if err := write(); err != nil {
						t.Errorf("write that waits: %v", err)
					}
				})
				synctest.Wait()
				got := elapsed(t, func() error { return d.Flush(t.Context()) })
				if got < tt.want*95/100 || got > tt.want {
					t.Errorf("flush beside a write that waits: took %v, want %v", got, tt.want)
				}
				wg.Wait()
			})
		})
	}
}

// leaving is a disk without fast zeroes whose client leaves while a piece runs.
type leaving struct {
	backing.Device
	leave  context.CancelFunc
	pieces int
	most   int64
}

func (d *leaving) Info() backing.Info { return plodder{d.Device}.Info() }

func (d *leaving) piece(n int64) error {
	if d.pieces++; d.pieces == 3 {
		d.leave()
	}
	d.most = max(d.most, n)
	return nil
}

func (d *leaving) Cache(_ context.Context, _, n int64) error                 { return d.piece(n) }
func (d *leaving) Zero(_ context.Context, _, n int64, _ backing.Flags) error { return d.piece(n) }

// TestPiecesEndWithTheirContext: also while there are tokens, so that nothing waits.
func TestPiecesEndWithTheirContext(t *testing.T) {
	rates := layer.Rates{Total: layer.Rate{Bytes: 1 << 50}}
	for name, do := range map[string]func(context.Context, backing.Device) error{
		"cache": func(ctx context.Context, d backing.Device) error { return d.Cache(ctx, 0, 1<<30) },
		"zero":  func(ctx context.Context, d backing.Device) error { return d.Zero(ctx, 0, 1<<30, 0) },
	} {
		ctx, leave := context.WithCancel(t.Context())
		defer leave()
		d := &leaving{Device: mem.Null(1 << 40), leave: leave}
		if err := do(ctx, limited(d, rates)); !errors.Is(err, context.Canceled) || d.pieces != 3 || d.most != limits.RatePiece {
			t.Errorf("%s: got %v after %d pieces of at most %d bytes, want %v after 3 of %d",
				name, err, d.pieces, d.most, context.Canceled, limits.RatePiece)
		}
	}
}

func TestCacheWithoutBoundsGoesAsAWhole(t *testing.T) {
	d := &leaving{Device: mem.Null(1 << 40), leave: func() {}}
	if err := limited(d, layer.Rates{}).Cache(t.Context(), 0, 1<<30); err != nil || d.pieces != 1 {
		t.Errorf("got %v in %d pieces, want one", err, d.pieces)
	}
}

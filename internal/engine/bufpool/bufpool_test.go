package bufpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// newPool is a poisoned pool that must end with nothing lent.
func newPool(t testing.TB, budget int64) *Pool {
	t.Helper()
	p := New(budget)
	p.SetPoison(true)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func mustGet(t testing.TB, p *Pool, n int) *Buf {
	t.Helper()
	b, err := p.Get(context.Background(), n)
	if err != nil {
		t.Fatalf("Get(%d): %v", n, err)
	}
	return b
}

func TestBufferIsExactAndPageAligned(t *testing.T) {
	p := newPool(t, limits.BufferBudget)
	for _, tt := range []struct{ n, capacity int }{
		{0, 4 << 10},
		{1, 4 << 10},
		{4096, 4 << 10},
		{4097, 8 << 10},
		{64 << 10, 64 << 10},
		{64<<10 + 1, 128 << 10},
		{512 << 10, 512 << 10},
		{1 << 20, 1 << 20},
		{limits.AdvertisedIO, 32 << 20},
		{limits.AdvertisedIO + 1, 64 << 20},
		{limits.MaxIO, 64 << 20},
	} {
		t.Run(strconv.Itoa(tt.n), func(t *testing.T) {
			b := mustGet(t, p, tt.n)
			defer b.Release()
			if got := len(b.Bytes()); got != tt.n {
				t.Errorf("len(Bytes()) = %d, want %d", got, tt.n)
			}
			if b.Cap() != tt.capacity {
				t.Errorf("Cap() = %d, want %d", b.Cap(), tt.capacity)
			}
			addr := uintptr(unsafe.Pointer(unsafe.SliceData(b.Bytes())))
			if addr%uintptr(os.Getpagesize()) != 0 {
				t.Errorf("buffer at %#x, want a page boundary", addr)
			}
			bufs, bytes := p.Outstanding()
			if bufs != 1 || bytes != int64(tt.capacity) {
				t.Errorf("Outstanding() = %d, %d, want 1, %d", bufs, bytes, tt.capacity)
			}
		})
	}
}

func TestBuffersLentTogetherDoNotOverlap(t *testing.T) {
	p := newPool(t, 64<<20)
	var bufs []*Buf
	for i := range 700 { // past the arena and several slabs
		b := mustGet(t, p, 4096<<(i%3))
		for j := range b.Bytes() {
			b.Bytes()[j] = byte(i)
		}
		bufs = append(bufs, b)
	}
	for i, b := range bufs {
		want := bytes.Repeat([]byte{byte(i)}, len(b.Bytes()))
		if !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("buffer %d was written to by another one", i)
		}
		b.Release()
	}
}

func TestRequestsThatNoWaitCanServeAreRefused(t *testing.T) {
	p := newPool(t, 1<<20)
	for _, n := range []int{-1, 1<<20 + 1, limits.MaxIO + 1} {
		if b := p.TryGet(n); b != nil {
			t.Errorf("TryGet(%d) gave a buffer", n)
		}
		if _, err := p.Get(context.Background(), n); !errors.Is(err, ErrTooLarge) {
			t.Errorf("Get(%d): %v, want ErrTooLarge", n, err)
		}
	}
}

func TestTryGetIsNilWhenTheBudgetIsUsedUp(t *testing.T) {
	p := newPool(t, 16<<10)
	a, b := p.TryGet(8192), p.TryGet(8192)
	if a == nil || b == nil {
		t.Fatal("the budget does not serve its own size")
	}
	if p.TryGet(1) != nil {
		t.Error("TryGet lent more than the budget")
	}
	a.Release()
	if a = p.TryGet(8192); a == nil {
		t.Fatal("released budget is not lent again")
	}
	a.Release()
	b.Release()
}

func TestGetGivesUpWhenItsContextEnds(t *testing.T) {
	p := newPool(t, 4096)
	b := mustGet(t, p, 4096)
	ctx, cancel := context.WithCancel(context.Background())
	errc := make(chan error)
	go func() {
		_, err := p.Get(ctx, 1)
		errc <- err
	}()
	for p.lines[0].queued.Load() == 0 {
	}
	cancel()
	if err := <-errc; !errors.Is(err, context.Canceled) {
		t.Errorf("Get after cancel: %v, want context.Canceled", err)
	}
	b.Release()
	mustGet(t, p, 4096).Release()
}

func TestWaitersAreServedInOrderOfArrival(t *testing.T) {
	p := newPool(t, 64<<10)
	held := mustGet(t, p, 64<<10)
	order := make(chan int, 8)
	var wg sync.WaitGroup
	for i := range 8 {
		size := 4096
		if i == 0 {
			size = 64 << 10 // a large one must not starve behind small ones
		}
		wg.Go(func() {
			b, err := p.Get(context.Background(), size)
			if err != nil {
				t.Error(err)
				return
			}
			order <- i
			b.Release()
		})
		for int(p.lines[0].queued.Load()) != i+1 {
		}
	}
	if p.TryGet(1) != nil {
		t.Error("TryGet overtook a waiting Get")
	}
	held.Release()
	wg.Wait()
	if first := <-order; first != 0 {
		t.Errorf("waiter %d was served first, want the large one", first)
	}
}

func TestCancelledLargeWaiterLetsSmallOnesPass(t *testing.T) {
	p := newPool(t, 8192)
	b := mustGet(t, p, 4096)
	ctx, cancel := context.WithCancel(context.Background())
	errc, got := make(chan error), make(chan *Buf)
	go func() {
		_, err := p.Get(ctx, 8192)
		errc <- err
	}()
	for p.lines[0].queued.Load() != 1 {
	}
	go func() {
		b, err := p.Get(context.Background(), 4096)
		if err != nil {
			t.Error(err)
		}
		got <- b
	}()
	for p.lines[0].queued.Load() != 2 {
	}
	cancel()
	if err := <-errc; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Get: %v", err)
	}
	(<-got).Release()
	b.Release()
}

func TestManyBorrowersKeepWithinTheBudget(t *testing.T) {
	const budget = 2 << 20
	p := newPool(t, budget)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			for range 300 {
				n := 1 << (r.IntN(9) + 12)
				b, err := p.Get(context.Background(), n)
				if err != nil {
					t.Error(err)
					return
				}
				b.Bytes()[0], b.Bytes()[n-1] = byte(g), byte(g)
				if _, used := p.Outstanding(); used > budget {
					t.Errorf("%d bytes lent, budget %d", used, budget)
				}
				if b.Bytes()[0] != byte(g) || b.Bytes()[n-1] != byte(g) {
					t.Error("buffer has two owners")
				}
				b.Release()
			}
		})
	}
	wg.Wait()
	if bufs, used := p.Outstanding(); bufs != 0 || used != 0 {
		t.Errorf("Outstanding() = %d, %d after all were released", bufs, used)
	}
}

func mustPanic(t *testing.T, want string, f func()) {
	t.Helper()
	defer func() {
		if got := fmt.Sprint(recover()); !strings.Contains(got, want) {
			t.Errorf("panic %q, want %q", got, want)
		}
	}()
	f()
}

func TestSecondReleasePanics(t *testing.T) {
	for _, on := range []bool{false, true} {
		p := New(1 << 20)
		p.SetPoison(on)
		b := mustGet(t, p, 100)
		b.Release()
		mustPanic(t, "released twice", b.Release)
		if bufs, used := p.Outstanding(); bufs != 0 || used != 0 {
			t.Errorf("Outstanding() = %d, %d after the refused release", bufs, used)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestPoisonShowsUseAfterRelease(t *testing.T) {
	for _, at := range []int{0, 1, 2500, 4998, 4999} {
		p := New(1 << 20)
		p.SetPoison(true)
		b := mustGet(t, p, 5000)
		stale := b.Bytes()
		clear(stale)
		b.Release()
		if want := bytes.Repeat([]byte{poison}, len(stale)); !bytes.Equal(stale, want) {
			t.Error("released buffer still shows its data")
		}
		stale[at] = 1
		mustPanic(t, "after it was released", func() { p.TryGet(5000) })
	}
}

func TestCloseRefusesWhileBuffersAreLent(t *testing.T) {
	p := New(1 << 20)
	b := mustGet(t, p, 4096)
	if err := p.Close(); err == nil {
		t.Fatal("Close unmapped a lent buffer")
	}
	b.Bytes()[0] = 1 // still mapped
	b.Release()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if p.TryGet(1) != nil {
		t.Error("TryGet lent from a closed pool")
	}
	if _, err := p.Get(context.Background(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("Get from a closed pool: %v, want ErrClosed", err)
	}
	if bufs, bytes := p.Outstanding(); bufs != 0 || bytes != 0 {
		t.Errorf("Outstanding() of a closed pool = %d, %d", bufs, bytes)
	}
}

func TestFreeMemoryStaysWithinTheCacheBound(t *testing.T) {
	p := New(256 << 20)
	defer p.Close()
	for _, size := range []int{4 << 10, 128 << 10, 1 << 20, 16 << 20} {
		var bufs []*Buf
		for range min(2000, (64<<20)/size) {
			b := mustGet(t, p, size)
			clear(b.Bytes())
			bufs = append(bufs, b)
		}
		for _, b := range bufs {
			b.Release()
		}
		if idle := p.idle.Load(); idle > limits.BufferCache {
			t.Errorf("after buffers of %d: %d bytes kept, bound %d", size, idle, limits.BufferCache)
		}
		if rss := poolResident(t, p); rss > limits.BufferCache {
			t.Errorf("after buffers of %d: %d bytes resident, bound %d", size, rss, limits.BufferCache)
		}
	}
}

func TestClassInUseStaysWarm(t *testing.T) {
	p := New(256 << 20)
	defer p.Close()
	var small []*Buf
	for range (6 << 20) / 4096 {
		small = append(small, mustGet(t, p, 4096))
	}
	for _, b := range small {
		b.Release()
	}
	large := []*Buf{mustGet(t, p, 1<<20), mustGet(t, p, 1<<20), mustGet(t, p, 1<<20)}
	for _, b := range large {
		b.Release()
	}
	c := &p.classes[classOf(1<<20)]
	n := 0
	for b := c.hot; b != nil; b = b.next {
		n++
	}
	if n != len(large) {
		t.Errorf("%d of %d large buffers kept, want all: the idle small ones go first", n, len(large))
	}
}

// Locked memory cannot be given back piecewise: it stays, and is lent again.
func TestLockedMemoryIsKept(t *testing.T) {
	p := New(64 << 20)
	defer p.Close()
	const size = 128 << 10
	bufs := make([]*Buf, 2*limits.BufferCache/size)
	for i := range bufs {
		bufs[i] = mustGet(t, p, size)
	}
	if err := unix.Mlock(p.slabs[len(p.slabs)-1]); err != nil {
		t.Fatalf("lock %d bytes: %v", slabBytes, err)
	}
	for _, b := range bufs {
		b.Release()
	}
	slabs := len(p.slabs)
	for i := range bufs {
		bufs[i] = mustGet(t, p, size)
	}
	for _, b := range bufs {
		b.Release()
	}
	if len(p.slabs) != slabs || !p.locked.Load() {
		t.Errorf("%d slabs, locked %v; want %d that are lent again, locked", len(p.slabs), p.locked.Load(), slabs)
	}
}

// poolResident sums the resident pages of the pool's mappings with mincore.
func poolResident(t *testing.T, p *Pool) int64 {
	t.Helper()
	var n int64
	for _, mem := range append([][]byte{p.arena}, p.slabs...) {
		n += resident(t, mem)
	}
	for i := range p.classes {
		c := &p.classes[i]
		for b := c.hot; b != nil && c.size >= slabBytes; b = b.next {
			n += resident(t, b.mem)
		}
	}
	return n
}

func TestArenaServesSmallBuffersFirst(t *testing.T) {
	p := newPool(t, 64<<20)
	arena := p.Arena()
	if len(arena) != limits.RingArena {
		t.Fatalf("arena of %d bytes, want %d", len(arena), limits.RingArena)
	}
	lo := uintptr(unsafe.Pointer(unsafe.SliceData(arena)))
	inArena := func(b *Buf) bool {
		a := uintptr(unsafe.Pointer(unsafe.SliceData(b.mem)))
		return a >= lo && a+uintptr(len(b.mem)) <= lo+uintptr(len(arena))
	}
	for i, count := range arenaBufs {
		var bufs []*Buf
		for j := range count + 1 {
			b := mustGet(t, p, 4096<<i)
			if got, want := inArena(b), j < count; got != want {
				t.Errorf("buffer %d of %d KiB in arena: %v, want %v", j, 4<<i, got, want)
			}
			bufs = append(bufs, b)
		}
		for _, b := range bufs {
			b.Release()
		}
		b := mustGet(t, p, 4096<<i)
		if !inArena(b) {
			t.Errorf("free arena buffers of %d KiB are not lent first", 4<<i)
		}
		b.Release()
	}
}

func TestBudgetBelowTheArenaWorksWithoutIt(t *testing.T) {
	p := newPool(t, limits.RingArena-1)
	if p.Arena() != nil {
		t.Error("an arena larger than the budget")
	}
	mustGet(t, p, 4096).Release()
}

func TestBuffersStayOutOfCoreDumps(t *testing.T) {
	p := newPool(t, 64<<20)
	small, slab, large := mustGet(t, p, 4096), mustGet(t, p, 128<<10), mustGet(t, p, 2<<20)
	defer small.Release()
	defer slab.Release()
	defer large.Release()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []*Buf{small, slab, large} {
		addr := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b.mem))))
		if flags := vmFlags(string(maps), addr); !strings.Contains(flags, " dd") {
			t.Errorf("buffer of %d bytes has flags %q, want dd (MADV_DONTDUMP)", b.Cap(), flags)
		}
	}
}

// vmFlags is the VmFlags line of the mapping that holds addr.
func vmFlags(smaps string, addr uint64) string {
	inside := false
	for line := range strings.Lines(smaps) {
		var lo, hi uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &lo, &hi); n == 2 {
			inside = lo <= addr && addr < hi
		} else if inside && strings.HasPrefix(line, "VmFlags:") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	p := New(64 << 20)
	defer p.Close()
	for _, n := range []int{4096, 64 << 10, 256 << 10, 2 << 20, 16 << 20} {
		avg := testing.AllocsPerRun(200, func() {
			b, err := p.Get(context.Background(), n)
			if err != nil {
				t.Fatal(err)
			}
			b.Release()
		})
		if avg != 0 {
			t.Errorf("Get(%d) and Release allocate %v times", n, avg)
		}
	}
}

func BenchmarkGetRelease(b *testing.B) {
	for _, n := range []int{4096, 128 << 10, 1 << 20} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			p := New(256 << 20)
			defer p.Close()
			b.ReportAllocs()
			for b.Loop() {
				p.TryGet(n).Release()
			}
		})
	}
}

func BenchmarkGetReleaseParallel(b *testing.B) {
	p := New(256 << 20)
	defer p.Close()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			p.TryGet(4096).Release()
		}
	})
}

// TestKeptBuffersStay: what Keep made is lent again and again, above what the
// pool keeps otherwise, from the same memory.
func TestKeptBuffersStay(t *testing.T) {
	const n, count = 2 << 20, limits.BufferCache/(2<<20) + 4
	p := New(2 * n * count)
	if err := p.Keep(n, count); err != nil {
		t.Fatal(err)
	}
	lend := func() (at []uintptr) {
		var bufs []*Buf
		for range count {
			b := p.TryGet(n)
			if b == nil {
				t.Fatal("no buffer")
			}
			at = append(at, uintptr(unsafe.Pointer(&b.Bytes()[0])))
			bufs = append(bufs, b)
		}
		for _, b := range bufs {
			b.Release()
		}
		slices.Sort(at)
		return at
	}
	first := lend()
	for range 3 {
		if again := lend(); !slices.Equal(again, first) {
			t.Fatalf("lent from %x, then from %x", first, again)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestKeepTellsThatTheBudgetIsTooSmall(t *testing.T) {
	p := New(8 << 20)
	if err := p.Keep(1<<20, 9); err == nil || !strings.Contains(err.Error(), "there is memory for 8") {
		t.Errorf("got %v", err)
	}
	if bufs, bytes := p.Outstanding(); bufs != 0 || bytes != 0 {
		t.Errorf("%d buffers of %d bytes are still lent", bufs, bytes)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// tryAll takes buffers of n bytes until there are none.
func tryAll(p *Pool, n int) (held []*Buf) {
	for b := p.TryGet(n); b != nil; b = p.TryGet(n) {
		held = append(held, b)
	}
	return held
}

// waitForLarge has somebody wait for the largest buffer, who sends it.
func waitForLarge(t *testing.T, p *Pool) <-chan *Buf {
	got := make(chan *Buf)
	go func() {
		b, err := p.Get(context.Background(), limits.MaxIO)
		if err != nil {
			t.Error(err)
		}
		got <- b
	}()
	for p.lines[1].queued.Load() != 1 {
	}
	return got
}

// TestLargeBuffersLeaveRoomForSmallOnes: who holds all that can be had of large
// ones, or waits for more of them, keeps nobody from small ones.
func TestLargeBuffersLeaveRoomForSmallOnes(t *testing.T) {
	p := newPool(t, 8*limits.MaxIO)
	held := tryAll(p, limits.MaxIO)
	if len(held) != 7 {
		t.Errorf("%d large buffers were lent, want 7 of 8", len(held))
	}
	got := waitForLarge(t, p)
	small := append([]*Buf{mustGet(t, p, 1)}, tryAll(p, limits.TurnBuffer)...)
	if _, bytes := p.Outstanding(); bytes <= 8*limits.MaxIO-limits.TurnBuffer {
		t.Errorf("%d bytes are lent, want all but less than a small buffer", bytes)
	}
	if p.Waiting() <= 0 {
		t.Error("nobody waits")
	}
	held[0].Release()
	held[0] = <-got
	if p.Waiting() != 0 {
		t.Error("somebody waits")
	}
	for _, b := range append(held, small...) {
		b.Release()
	}
	if bufs, bytes := p.Outstanding(); bufs != 0 || bytes != 0 || p.charged.Load() != 0 {
		t.Errorf("%d buffers of %d bytes are out, charged is %#x", bufs, bytes, p.charged.Load())
	}
}

// TestSmallBuffersLeaveRoomForAWaitingLargeOne: they cannot starve it.
func TestSmallBuffersLeaveRoomForAWaitingLargeOne(t *testing.T) {
	p := newPool(t, 8*limits.MaxIO)
	small := tryAll(p, limits.TurnBuffer)
	got := waitForLarge(t, p)
	for range limits.MaxIO / limits.TurnBuffer {
		small[0].Release()
		small = small[1:]
		if b := p.TryGet(limits.TurnBuffer); b != nil {
			t.Fatal("a small buffer was lent of what the large one waits for")
		}
	}
	(<-got).Release()
	for _, b := range small {
		b.Release()
	}
}

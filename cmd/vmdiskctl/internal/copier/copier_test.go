package copier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

// memory is a disk that notes what it is asked and fails on demand.
type memory struct {
	shape   Shape
	extents []Extent // nil: all is data

	mu       sync.Mutex
	p        []byte // guarded by mu
	requests int    // guarded by mu
	failAt   int    // the number of the request that fails; 0: none
	wrong    error  // guarded by mu; a request that broke the contract
	zeroed   int64  // guarded by mu; bytes given to Zero
	written  int64  // guarded by mu; bytes given to WriteAt
	flushed  bool   // guarded by mu
	lie      bool   // writes are acknowledged and dropped
}

func newMemory(n int) *memory {
	return &memory{p: make([]byte, n), shape: Shape{Align: 1, MaxIO: 1 << 20, Requests: 4}}
}

func random(n int) *memory {
	m := newMemory(n)
	for i := range m.p {
		m.p[i] = byte(rand.Uint32()) | 1
	}
	return m
}

// request notes a request and says whether it is to fail.
func (m *memory) request(off, n int64, limited bool) error {
	m.requests++
	switch {
	case off < 0 || n <= 0 || n > int64(len(m.p))-off, off%m.shape.Align != 0, n%m.shape.Align != 0,
		limited && n > m.shape.MaxIO:
		m.wrong = fmt.Errorf("request %d+%d of %d", off, n, len(m.p))
		return m.wrong
	case m.requests == m.failAt:
		return errBroken
	}
	return nil
}

func (m *memory) Size() int64  { return int64(len(m.p)) }
func (m *memory) Shape() Shape { return m.shape }
func (m *memory) Close() error { return nil }

func (m *memory) ReadAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.request(off, int64(len(p)), true); err != nil {
		return err
	}
	copy(p, m.p[off:])
	return nil
}

func (m *memory) WriteAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.request(off, int64(len(p)), true); err != nil {
		return err
	}
	m.written += int64(len(p))
	if !m.lie {
		copy(m.p[off:], p)
	}
	return nil
}

func (m *memory) Zero(_ context.Context, off, n int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.request(off, n, false); err != nil {
		return err
	}
	m.zeroed += n
	clear(m.p[off : off+n])
	return nil
}

func (m *memory) Flush(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushed = true
	m.requests++
	if m.requests == m.failAt {
		return errBroken
	}
	return nil
}

func (m *memory) Extents(_ context.Context, yield func(Extent) bool) error {
	if m.extents == nil && m.Size() > 0 {
		yield(Extent{Len: m.Size()})
		return nil
	}
	for _, e := range m.extents {
		if !yield(e) {
			return nil
		}
	}
	return nil
}

var whole = Options{RequestSize: 64 << 10, Flush: true, Verify: true}

func check(t *testing.T, src, dst *memory) {
	t.Helper()
	if src.wrong != nil || dst.wrong != nil {
		t.Errorf("requests against the contract: source %v, destination %v", src.wrong, dst.wrong)
	}
	if !bytes.Equal(src.p, dst.p[:len(src.p)]) {
		t.Error("destination differs from source")
	}
}

func TestCopyMakesEqual(t *testing.T) {
	for _, size := range []int{0, 1, 511, 64 << 10, 64<<10 + 1, 1<<20 - 1} {
		src, dst := random(size), random(size+100)
		tail := slices.Clone(dst.p[size:])
		if err := Copy(t.Context(), src, dst, whole); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
		check(t, src, dst)
		if !bytes.Equal(dst.p[size:], tail) {
			t.Errorf("size %d: bytes behind the source's end were touched", size)
		}
		if !dst.flushed {
			t.Errorf("size %d: not flushed", size)
		}
	}
}

func TestEveryFailedRequestFailsTheCopy(t *testing.T) {
	const size = 1 << 20
	build := func() (*memory, *memory) {
		src, dst := random(size), newMemory(size)
		src.extents = []Extent{{0, size / 2, false}, {size / 2, size / 4, true}, {size * 3 / 4, size / 4, false}}
		clear(src.p[size/2 : size*3/4])
		return src, dst
	}
	src, dst := build()
	if err := Copy(t.Context(), src, dst, whole); err != nil {
		t.Fatal(err)
	}
	check(t, src, dst)
	for end, n := range []int{src.requests, dst.requests} {
		for i := 1; i <= n; i++ {
			src, dst := build()
			[]*memory{src, dst}[end].failAt = i
			if err := Copy(t.Context(), src, dst, whole); !errors.Is(err, errBroken) {
				t.Errorf("request %d of %d to end %d fails: got %v", i, n, end, err)
			}
		}
	}
}

func TestVerifyCatchesALie(t *testing.T) {
	src, dst := random(1<<20), newMemory(1<<20)
	dst.lie = true
	if err := Copy(t.Context(), src, dst, whole); !errors.Is(err, ErrDiffers) {
		t.Errorf("got %v, want %v", err, ErrDiffers)
	}
	o := whole
	o.Verify = false
	if err := Copy(t.Context(), src, dst, o); err != nil {
		t.Errorf("without verification: %v", err)
	}
}

// changed is a destination that somebody writes to between copy and
// verification: at the flush.
type changed struct{ *memory }

func (c changed) Flush(ctx context.Context) error {
	c.mu.Lock()
	c.p[777777] ^= 1
	c.mu.Unlock()
	return c.memory.Flush(ctx)
}

func TestVerifyNamesTheByteThatChanged(t *testing.T) {
	err := Copy(t.Context(), random(1<<20), changed{newMemory(1 << 20)}, whole)
	if !errors.Is(err, ErrDiffers) || err.Error() != "verify: destination differs from source at 777777" {
		t.Errorf("got %v", err)
	}
}

func TestWhatCannotFitIsRefusedUntouched(t *testing.T) {
	for _, tt := range []struct {
		name     string
		src, dst int
		align    int64
		max      int64
	}{
		{"smaller destination", 1000, 999, 1, 1 << 20},
		{"source that is no multiple of the block size", 1000, 4096, 512, 1 << 20},
		{"block size above the other's maximum", 8192, 8192, 4096, 512},
	} {
		src, dst := random(tt.src), newMemory(tt.dst)
		src.shape.Align, dst.shape.MaxIO = tt.align, tt.max
		if err := Copy(t.Context(), src, dst, whole); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: got %v", tt.name, err)
		}
		if src.requests+dst.requests != 0 {
			t.Errorf("%s: the disks were touched", tt.name)
		}
	}
}

func TestZeroesAreNotWritten(t *testing.T) {
	const size = 1 << 20
	for _, tt := range []struct {
		name            string
		extents         bool
		options         Options
		written, zeroed int64
	}{
		{"extents of the source", true, Options{}, size / 2, size / 2},
		{"zeroes found in data", false, Options{}, size / 2, size / 2},
		{"destination is zero", true, Options{DestinationIsZero: true}, size / 2, 0},
		{"allocated", true, Options{Allocated: true}, size / 2, size / 2},
		{"allocated where zeroes are", true, Options{Allocated: true, DestinationIsZero: true}, size / 2, size / 2},
		{"allocated without extents", false, Options{Allocated: true}, size, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src, dst := random(size), newMemory(size)
			clear(src.p[size/4 : size*3/4])
			if tt.extents {
				src.extents = []Extent{{0, size / 4, false}, {size / 4, size / 2, true}, {size * 3 / 4, size / 4, false}}
			}
			tt.options.RequestSize = 128 << 10
			if err := Copy(t.Context(), src, dst, tt.options); err != nil {
				t.Fatal(err)
			}
			check(t, src, dst)
			if dst.written != tt.written || dst.zeroed != tt.zeroed {
				t.Errorf("%d bytes written and %d zeroed, want %d and %d", dst.written, dst.zeroed, tt.written, tt.zeroed)
			}
		})
	}
}

func TestAnyExtentsMeetAnyAlignment(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 1))
	for round := range 100 {
		align := int64(1) << rnd.IntN(13)
		size := align * (1 + rnd.Int64N(max(1, 100000/align)))
		src, dst := random(int(size)), random(int(size))
		src.shape = Shape{Align: 1 << rnd.IntN(13), MaxIO: 1 << 16, Requests: 3}
		src.shape.Align = min(src.shape.Align, align)
		dst.shape = Shape{Align: align, MaxIO: 1 << 15, Requests: 2}
		src.extents = []Extent{}
		for off := int64(0); off < size; {
			n := min(1+rnd.Int64N(20000), size-off)
			e := Extent{Off: off, Len: n, Zero: rnd.IntN(2) == 0}
			if e.Zero {
				clear(src.p[off : off+n])
			}
			src.extents = append(src.extents, e)
			off += n
		}
		if err := Copy(t.Context(), src, dst, whole); err != nil {
			t.Fatalf("seed %d round %d: %v", seed, round, err)
		}
		if check(t, src, dst); t.Failed() {
			t.Fatalf("seed %d round %d", seed, round)
		}
	}
}

func TestExtentsThatMakeNoSenseFail(t *testing.T) {
	for _, list := range [][]Extent{
		{{10, 90, true}},
		{{0, 50, true}, {60, 40, true}},
		{{0, 50, true}, {40, 60, true}},
		{{0, 0, true}},
		{{0, 101, true}},
		{{0, -1, false}},
	} {
		src := random(100)
		src.extents = list
		if err := Copy(t.Context(), src, newMemory(100), whole); err == nil {
			t.Errorf("extents %v were believed", list)
		}
	}
}

func TestExtentsThatEndEarlyAreFollowedByData(t *testing.T) {
	src, dst := random(1000), newMemory(1000)
	clear(src.p[:10])
	src.extents = []Extent{{0, 10, true}}
	if err := Copy(t.Context(), src, dst, Options{RequestSize: 100}); err != nil {
		t.Fatal(err)
	}
	check(t, src, dst)
}

func TestCancelEndsTheCopy(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	o := whole
	o.Progress = func(int64) { cancel() }
	if err := Copy(ctx, random(1<<20), newMemory(1<<20), o); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestProgressAddsUpToTheWork(t *testing.T) {
	for _, verify := range []bool{false, true} {
		src := random(1<<20 + 7)
		var done atomic.Int64
		o := Options{RequestSize: 4096, Verify: verify, Progress: func(n int64) { done.Add(n) }}
		if err := Copy(t.Context(), src, newMemory(1<<20+7), o); err != nil {
			t.Fatal(err)
		}
		if done.Load() != o.Work(src) {
			t.Errorf("verify %v: progress of %d, want %d", verify, done.Load(), o.Work(src))
		}
	}
}

func TestBuffersKeepToTheirBudget(t *testing.T) {
	src := newMemory(1 << 20)
	src.shape = Shape{Align: 1, MaxIO: 32 << 20, Requests: 1 << 20}
	c := &copying{src: src, dst: src, Options: Options{RequestSize: 32 << 20}}
	if err := c.plan(); err != nil || c.workers != 4 {
		t.Errorf("%d workers with %d bytes each, %v", c.workers, c.step, err)
	}
}

func TestPrefixFindsRunsOfZeroes(t *testing.T) {
	p := make([]byte, 100)
	p[25] = 1
	for _, tt := range []struct {
		from, g, n int
		zero       bool
	}{
		{0, 10, 20, true}, {20, 10, 10, false}, {30, 10, 70, true}, {30, 33, 70, true}, {0, 100, 100, false}, {0, 1000, 100, false},
	} {
		if n, zero := prefix(p[tt.from:], tt.g); n != tt.n || zero != tt.zero {
			t.Errorf("from %d by %d: %d, %v, want %d, %v", tt.from, tt.g, n, zero, tt.n, tt.zero)
		}
	}
}

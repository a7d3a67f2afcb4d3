package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/layertest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func memory(p []byte) store.Store { return storetest.New(p) }

// files makes stores of real files.
func files(t testing.TB) func([]byte) store.Store {
	t.Helper()
	e := engine.NewPool(2)
	t.Cleanup(func() { _ = e.Close() })
	n := 0
	dir := t.TempDir()
	return func(p []byte) store.Store {
		n++
		path := filepath.Join(dir, fmt.Sprint(n))
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		d, err := raw.Open(f, e, raw.Options{Path: path, ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.Close() })
		return store.NewFile(d)
	}
}

func random(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// randomChain makes layers of the sizes, the first of them the lowest, and
// what the guest reads.
func randomChain(r *rand.Rand, cluster int64, file func([]byte) store.Store, sizes ...int64) (qcow2.Layer, []byte) {
	var below qcow2.Layer
	var guest []byte
	for _, size := range sizes {
		below, guest = layertest.Random(r, size, cluster, below, guest, file)
	}
	return below, guest
}

func newDevice(t testing.TB, top qcow2.Layer, o qcow2.Options) backing.Device {
	t.Helper()
	d := qcow2.NewChainDevice(top, o)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func mustRead(t testing.TB, d backing.Device, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xee}, int(n))
	if err := d.ReadAt(t.Context(), p, off); err != nil {
		t.Fatalf("read at %d+%d: %v", off, n, err)
	}
	return p
}

func mustMatch(t testing.TB, d backing.Device, off int64, want []byte) {
	t.Helper()
	got := mustRead(t, d, off, int64(len(want)))
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("read at %d+%d: got %#x at %d, want %#x", off, len(want), got[i], off+int64(i), want[i])
		}
	}
}

// somewhere picks a range that likes boundaries.
func somewhere(r *rand.Rand, size int64) (off, n int64) {
	off = r.Int64N(size)
	if r.IntN(2) == 0 {
		off &^= 511
	}
	n = 1 + r.Int64N([]int64{16, 4096, 200 << 10, size}[r.IntN(4)])
	return off, min(n, size-off)
}

var deep = []int64{900<<10 + 512, 1500 << 10, 700<<10 + 1024, 2 << 20, 1800<<10 + 512}

func TestRandomChainsReadAsTheirModel(t *testing.T) {
	for _, tt := range []struct {
		cluster int64
		o       qcow2.Options
	}{
		{512, qcow2.Options{}},
		{4096, qcow2.Options{CacheBytes: 1, ClusterBytes: 8192}},
		{64 << 10, qcow2.Options{ClusterBytes: 1}},
		{256 << 10, qcow2.Options{}},
	} {
		t.Run(fmt.Sprint(tt.cluster), func(t *testing.T) {
			r := random(t)
			top, guest := randomChain(r, tt.cluster, memory, deep...)
			d := newDevice(t, top, tt.o)
			if got := d.Info().Size; got != int64(len(guest)) {
				t.Fatalf("size: got %d, want %d", got, len(guest))
			}
			for range 300 / thinner {
				off, n := somewhere(r, int64(len(guest)))
				mustMatch(t, d, off, guest[off:off+n])
			}
			mustMatch(t, d, 0, guest)
		})
	}
}

// TestWhatTheMiddleCutsOffIsZero: the bytes of a lower layer do not show
// beyond the end of a layer above it.
func TestWhatTheMiddleCutsOffIsZero(t *testing.T) {
	st := memory(bytes.Repeat([]byte{7}, 12<<10))
	base := layertest.New(nil, qcow2.Span{Kind: qcow2.Data, Len: 12 << 10, Store: st})
	mid := layertest.New(base, qcow2.Span{Kind: qcow2.Absent, Len: 5 << 10})
	d := newDevice(t, layertest.New(mid, qcow2.Span{Kind: qcow2.Absent, Len: 12 << 10}), qcow2.Options{})
	want := make([]byte, 12<<10)
	copy(want, bytes.Repeat([]byte{7}, 5<<10))
	mustMatch(t, d, 0, want)
}

func TestEndOfTheHostFileReadsAsZero(t *testing.T) {
	st := memory(bytes.Repeat([]byte{7}, 1000))
	d := newDevice(t, layertest.New(nil, qcow2.Span{Kind: qcow2.Data, Len: 4096, Store: st}), qcow2.Options{})
	want := make([]byte, 4096)
	copy(want, bytes.Repeat([]byte{7}, 1000))
	mustMatch(t, d, 0, want)
}

func TestDamageFailsOnlyWhoReadsIt(t *testing.T) {
	cause := errors.New("entry is nonsense")
	st := memory(bytes.Repeat([]byte{7}, 8192))
	bad := qcow2.Span{Kind: qcow2.Data, Len: 512, Store: st, Off: -1}
	long := qcow2.Span{Kind: qcow2.Compressed, Len: 512, Store: st, InLen: 1 << 40, Cluster: 512}
	d := newDevice(t, layertest.New(nil,
		qcow2.Span{Kind: qcow2.Data, Len: 4096, Store: st},
		qcow2.Span{Kind: qcow2.Damaged, Len: 4096, Err: cause},
		qcow2.Span{Kind: qcow2.Data, Len: 4096, Store: st, Off: 4096}, bad, long,
	), qcow2.Options{Path: "image"})
	mustMatch(t, d, 0, bytes.Repeat([]byte{7}, 4096))
	mustMatch(t, d, 8192, bytes.Repeat([]byte{7}, 4096))
	for _, off := range []int64{4000, 4096, 8000, 12288, 12800} {
		err := d.ReadAt(t.Context(), make([]byte, 200), off)
		if backing.KindOf(err) != backing.ErrIO || err == nil {
			t.Errorf("read at %d: got %v, want %v", off, err, backing.ErrIO)
		}
		if off < 8192 && !errors.Is(err, cause) {
			t.Errorf("read at %d: got %v, want the cause", off, err)
		}
		var m backing.Mapping
		if err := d.Map(engine.OpRead, off, 200, &m); err != backing.ErrNotMappable {
			t.Errorf("map at %d: got %v, want %v", off, err, backing.ErrNotMappable)
		}
	}
}

func TestCompressedRubbishIsAnError(t *testing.T) {
	st := memory(bytes.Repeat([]byte{0xff}, 4096))
	d := newDevice(t, layertest.New(nil, qcow2.Span{Kind: qcow2.Compressed, Len: 4096, Store: st, InLen: 512, Cluster: 4096}), qcow2.Options{})
	for _, n := range []int{4096, 100} {
		if err := d.ReadAt(t.Context(), make([]byte, n), 0); backing.KindOf(err) != backing.ErrIO || err == nil {
			t.Errorf("read of %d: got %v, want %v", n, err, backing.ErrIO)
		}
	}
}

func TestLayerThatLeavesAGapIsAnError(t *testing.T) {
	l := layertest.New(nil, qcow2.Span{Kind: qcow2.Zero, Len: 4096}, qcow2.Span{Kind: qcow2.Zero, Len: 4096})
	d := newDevice(t, short{l}, qcow2.Options{})
	if err := d.ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, backing.ErrIO) {
		t.Errorf("read: got %v, want %v", err, backing.ErrIO)
	}
}

// short yields only the first span.
type short struct{ *layertest.Layer }

func (s short) Spans(ctx context.Context, off, n int64, yield func(qcow2.Span) bool) error {
	return s.Layer.Spans(ctx, off, n, func(x qcow2.Span) bool { yield(x); return false })
}

func TestMapNamesWhatReadAtReads(t *testing.T) {
	r := random(t)
	top, guest := randomChain(r, 16<<10, files(t), deep...)
	d := newDevice(t, top, qcow2.Options{})
	var m backing.Mapping
	if err := d.Map(engine.OpRead, 0, 1, &m); err != backing.ErrNotMappable {
		t.Fatalf("map before the first read: got %v, want %v", err, backing.ErrNotMappable)
	}
	mustMatch(t, d, 0, guest)
	mapped := 0
	for range 2000 {
		off := r.Int64N(int64(len(guest)))
		n := min(1+r.Int64N(64<<10), int64(len(guest))-off)
		err := d.Map(engine.OpRead, off, n, &m)
		if err == backing.ErrNotMappable {
			continue
		}
		if err != nil {
			t.Fatalf("map at %d+%d: %v", off, n, err)
		}
		mapped++
		if m.Reused {
			t.Fatalf("map at %d+%d: the runs of an image that nobody writes to are said to be reused", off, n)
		}
		if got := readRuns(t, &m, n); !bytes.Equal(got, guest[off:off+n]) {
			t.Fatalf("map at %d+%d: wrong bytes in %+v", off, n, m.Runs[:m.N])
		}
		m.Release()
	}
	if mapped < 200 {
		t.Errorf("map: %d of 2000 ranges were mappable, want more", mapped)
	}
	if err := d.Map(engine.OpWrite, 0, 512, &m); err != backing.ErrReadOnly {
		t.Errorf("map for writing: got %v, want %v", err, backing.ErrReadOnly)
	}
	if err := d.Map(engine.OpRead, int64(len(guest))-1, 2, &m); err != backing.ErrNotMappable {
		t.Errorf("map beyond the end: got %v, want %v", err, backing.ErrNotMappable)
	}
}

func readRuns(t testing.TB, m *backing.Mapping, n int64) []byte {
	t.Helper()
	var got []byte
	for _, r := range m.Runs[:m.N] {
		p := make([]byte, r.Len)
		if r.File != nil {
			if _, err := r.File.OS.ReadAt(p, r.Off); err != nil {
				t.Fatalf("read of run %+v: %v", r, err)
			}
		}
		got = append(got, p...)
	}
	if int64(len(got)) != n {
		t.Fatalf("mapping: got %d bytes, want %d", len(got), n)
	}
	return got
}

func extents(t testing.TB, d backing.Device, off, n int64) []backing.Extent {
	t.Helper()
	var list []backing.Extent
	if err := d.Extents(t.Context(), off, n, 0, func(e backing.Extent) bool { list = append(list, e); return true }); err != nil {
		t.Fatalf("extents at %d+%d: %v", off, n, err)
	}
	return list
}

func TestExtentsSayWhatIsAllocatedAndZero(t *testing.T) {
	st := memory(bytes.Repeat([]byte{1}, 64<<10))
	base := layertest.New(nil, qcow2.Span{Kind: qcow2.Data, Len: 1000, Store: st}, qcow2.Span{Kind: qcow2.Absent, Len: 3096})
	d := newDevice(t, layertest.New(base,
		qcow2.Span{Kind: qcow2.Absent, Len: 8192},
		qcow2.Span{Kind: qcow2.Zero, Len: 4096},
		qcow2.Span{Kind: qcow2.Zero, Len: 4096, Store: st},
		qcow2.Span{Kind: qcow2.Compressed, Len: 512, Store: st, InLen: 10, Cluster: 512},
		qcow2.Span{Kind: qcow2.Damaged, Len: 512},
	), qcow2.Options{})
	hole, zero, data := backing.Extent{Hole: true, Zero: true}, backing.Extent{Zero: true}, backing.Extent{}
	of := func(e backing.Extent, n int64) backing.Extent { e.Len = n; return e }
	for _, tt := range []struct {
		off, n int64
		want   []backing.Extent
	}{
		{0, 17408, []backing.Extent{of(data, 1000), of(hole, 11288), of(zero, 4096), of(data, 1024)}},
		{999, 2, []backing.Extent{of(data, 1), of(hole, 1)}},
		{5000, 100, []backing.Extent{of(hole, 100)}},
	} {
		if got := extents(t, d, tt.off, tt.n); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("extents at %d+%d: got %v, want %v", tt.off, tt.n, got, tt.want)
		}
	}
	calls := 0
	once := func(backing.Extent) bool { calls++; return true }
	if err := d.Extents(t.Context(), 0, 17408, backing.ReqOne, once); err != nil || calls != 1 {
		t.Errorf("extents with ReqOne: got %d calls, %v, want 1", calls, err)
	}
}

func TestDepthSaysWhichLayerHasTheBytes(t *testing.T) {
	st := memory(make([]byte, 64<<10))
	base := layertest.New(nil, qcow2.Span{Kind: qcow2.Data, Len: 1000, Store: st}, qcow2.Span{Kind: qcow2.Absent, Len: 3096})
	middle := layertest.New(base, qcow2.Span{Kind: qcow2.Absent, Len: 8192}, qcow2.Span{Kind: qcow2.Zero, Len: 4096})
	d := newDevice(t, layertest.New(middle,
		qcow2.Span{Kind: qcow2.Data, Len: 500, Store: st, Off: 4096},
		qcow2.Span{Kind: qcow2.Absent, Len: 13500},
		qcow2.Span{Kind: qcow2.Damaged, Len: 100},
	), qcow2.Options{}).(backing.Describer)
	depth := func(f backing.Flags, off, n int64) (list []backing.Status) {
		err := d.Describe(t.Context(), "qemu:allocation-depth", off, n, f, func(s backing.Status) bool {
			list = append(list, s)
			return true
		})
		if err != nil {
			t.Fatalf("describe %d+%d: %v", off, n, err)
		}
		return list
	}
	// What a layer is too short for is zero there: it has those bytes.
	want := []backing.Status{{Len: 500, Value: 1}, {Len: 500, Value: 3}, {Len: 3096}, {Len: 4096, Value: 3}, {Len: 5808, Value: 2}, {Len: 100, Value: 1}}
	if got := depth(0, 0, 14100); !slices.Equal(got, want) {
		t.Errorf("depth: got %v, want %v", got, want)
	}
	if got := depth(backing.ReqOne, 400, 1000); !slices.Equal(got, []backing.Status{{Len: 100, Value: 1}}) {
		t.Errorf("depth with ReqOne: got %v, want 100 bytes of depth 1", got)
	}
	if !slices.Contains(d.Descriptions(), "qemu:allocation-depth") {
		t.Errorf("descriptions: got %q", d.Descriptions())
	}
	if err := d.Describe(t.Context(), "qemu:dirty-bitmap:b0", 0, 1, 0, nil); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("unknown name: got %v, want %v", err, backing.ErrInvalid)
	}
}

func TestEverythingAtOnce(t *testing.T) {
	r := random(t)
	top, guest := randomChain(r, 4096, memory, deep...)
	d := newDevice(t, top, qcow2.Options{CacheBytes: 1, ClusterBytes: 64 << 10})
	var wg sync.WaitGroup
	for range 8 {
		r := rand.New(rand.NewPCG(r.Uint64(), 1))
		wg.Go(func() {
			for range 60 {
				off, n := somewhere(r, int64(len(guest)))
				p := make([]byte, n)
				if err := d.ReadAt(t.Context(), p, off); err != nil || !bytes.Equal(p, guest[off:off+n]) {
					t.Errorf("read at %d+%d: got wrong bytes or %v", off, n, err)
				}
				var m backing.Mapping
				if err := d.Map(engine.OpRead, off, n, &m); err == nil {
					m.Release()
				}
				if err := d.Cache(t.Context(), off, n); err != nil {
					t.Errorf("cache at %d+%d: %v", off, n, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestCachedMapAndReadAllocateNothing(t *testing.T) {
	file := files(t)
	st := file(bytes.Repeat([]byte{7}, 64<<10))
	zero := qcow2.Span{Kind: qcow2.Zero, Len: 4096}
	data := qcow2.Span{Kind: qcow2.Data, Len: 4096, Store: st, Off: 512}
	d := newDevice(t, layertest.New(nil, data, zero, data), qcow2.Options{})
	p := make([]byte, 12<<10)
	ctx := t.Context()
	if err := d.ReadAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	var m backing.Mapping
	for name, do := range map[string]func() error{
		"map of one run":   func() error { return d.Map(engine.OpRead, 100, 1000, &m) },
		"map of three":     func() error { return d.Map(engine.OpRead, 100, 12000, &m) },
		"read of one run":  func() error { return d.ReadAt(ctx, p[:1000], 100) },
		"read of zeroes":   func() error { return d.ReadAt(ctx, p[:1000], 5000) },
		"read of all runs": func() error { return d.ReadAt(ctx, p, 0) },
	} {
		if got := testing.AllocsPerRun(50, func() {
			if err := do(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			m.Release()
		}); got != 0 {
			t.Errorf("%s: got %v allocations, want 0", name, got)
		}
	}
}

func TestCloseClosesAllLayersOnce(t *testing.T) {
	base := layertest.New(nil, qcow2.Span{Kind: qcow2.Zero, Len: 4096})
	top := layertest.New(base, qcow2.Span{Kind: qcow2.Absent, Len: 4096})
	if err := qcow2.NewChainDevice(top, qcow2.Options{}).Close(); err != nil {
		t.Fatal(err)
	}
	if base.Closed() != 1 || top.Closed() != 1 {
		t.Errorf("closed: got %d and %d, want once each", top.Closed(), base.Closed())
	}
}

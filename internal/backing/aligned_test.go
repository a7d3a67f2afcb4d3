package backing_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// directFile is a file of size bytes, open with O_DIRECT, behind an engine
// whose transfers can be made to wait or fail.
type directFile struct {
	*backing.Aligned
	path  string
	file  *engine.File
	fault *backingtest.FaultEngine
}

func newDirect(t *testing.T, size, align int64, pool *bufpool.Pool) *directFile {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, bytes.Repeat([]byte{1}, int(size)), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		t.Skipf("needs a file system with O_DIRECT at %s", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	fault := backingtest.NewFaultEngine(engine.NewPool(8))
	file, err := fault.Open(f)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	file.Align = int(align)
	a, err := backing.NewAligned(t.Context(), fault, file, align, pool)
	if err != nil {
		t.Fatalf("new aligned: %v", err)
	}
	t.Cleanup(func() {
		a.Close()
		if err := errors.Join(file.Close(), fault.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &directFile{Aligned: a, path: path, file: file, fault: fault}
}

func (d *directFile) wantContents(t *testing.T, want []byte) {
	t.Helper()
	got, err := os.ReadFile(d.path)
	if err != nil || !bytes.Equal(got, want) {
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Fatalf("file: byte %d is %d, want %d", i, got[i], want[i])
			}
		}
		t.Fatalf("file: got %d bytes, %v, want %d", len(got), err, len(want))
	}
}

var bounce = bufpool.New(16 << 20)

func TestAlignedServesAnyRange(t *testing.T) {
	for _, align := range []int64{512, 4096} {
		for _, size := range []int64{300000, 64 << 10} {
			t.Run(fmt.Sprintf("align %d size %d", align, size), func(t *testing.T) {
				d := newDirect(t, size, align, bounce)
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				rnd := rand.New(rand.NewPCG(seed, 0))
				model := bytes.Repeat([]byte{1}, int(size))
				memory := make([]byte, size+align)
				for i := range 200 {
					off := rnd.Int64N(size)
					n := min(rnd.Int64N([]int64{10, 5000, 300000}[rnd.IntN(3)])+1, size-off)
					if rnd.IntN(3) == 0 {
						off = off / align * align
					}
					p := memory[rnd.Int64N(align):][:n] // any address
					if rnd.IntN(2) == 0 {
						for j := range p {
							p[j] = byte(i)
						}
						copy(model[off:], p)
						if err := d.WriteAt(t.Context(), p, off); err != nil {
							t.Fatalf("write at %d+%d: %v", off, n, err)
						}
						continue
					}
					got, err := d.ReadAt(t.Context(), p, off)
					if err != nil || int64(got) != n || !bytes.Equal(p, model[off:off+n]) {
						t.Fatalf("read at %d+%d: got %d bytes, %v, or wrong ones", off, n, got, err)
					}
				}
				d.wantContents(t, model)
			})
		}
	}
}

func TestAlignedReadEndsWithTheFile(t *testing.T) {
	const size = 10000
	d := newDirect(t, size, 512, bounce)
	for _, tt := range []struct {
		off int64
		n   int
	}{{0, 10000}, {0, 20480}, {9000, 1000}, {9999, 5000}, {9728, 512}, {10000, 1}, {10239, 2}, {50000, 4096}} {
		p := make([]byte, tt.n)
		want := int(max(min(int64(tt.n), size-tt.off), 0))
		if got, err := d.ReadAt(t.Context(), p, tt.off); err != nil || got != want {
			t.Errorf("read at %d+%d: got %d, %v, want %d", tt.off, tt.n, got, err, want)
		}
	}
}

func TestAlignedTailWriteKeepsSizeAndDirectness(t *testing.T) {
	d := newDirect(t, 10000, 4096, bounce)
	want := bytes.Repeat([]byte{1}, 10000)
	for _, r := range [][2]int{{9999, 1}, {8192, 1808}, {8000, 2000}, {8300, 5}} {
		p := bytes.Repeat([]byte{byte(r[0])}, r[1])
		if err := d.WriteAt(t.Context(), p, int64(r[0])); err != nil {
			t.Fatalf("write at %d+%d: %v", r[0], r[1], err)
		}
		copy(want[r[0]:], p)
		d.wantContents(t, want)
	}
	if fl, err := unix.FcntlInt(d.file.FD(), unix.F_GETFL, 0); err != nil || fl&unix.O_DIRECT == 0 {
		t.Errorf("flags afterwards: got %#x, %v, want O_DIRECT", fl, err)
	}
}

func TestAlignedWritePastTheEndGrowsTheFileByThatMuch(t *testing.T) {
	d := newDirect(t, 5000, 512, bounce)
	if err := d.WriteAt(t.Context(), bytes.Repeat([]byte{2}, 3000), 4999); err != nil {
		t.Fatalf("write: %v", err)
	}
	d.wantContents(t, append(bytes.Repeat([]byte{1}, 4999), bytes.Repeat([]byte{2}, 3000)...))
}

// TestPartialWriteExcludesOtherWritesOfItsBlock stops a partial write between
// its read and its write.
func TestPartialWriteExcludesOtherWritesOfItsBlock(t *testing.T) {
	const block = 4096
	for _, tt := range []struct {
		name string
		off  int64
		n    int
		free bool // touches no block of the partial write
	}{
		{"the rest of the block", block + 100, block - 100, false},
		{"another part of the block", block + 2000, 1, false},
		{"the whole block", block, block, false},
		{"blocks around it", 0, 3 * block, false},
		{"the block before", 0, block, true},
		{"the block after", 2 * block, block, true},
		{"a part of the block after", 2*block + 1, 7, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDirect(t, 3*block, block, bounce)
			gate := backingtest.NewGate()
			d.fault.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpRead), Gate: gate})
			first, second := make(chan error, 1), make(chan error, 1)
			go func() { first <- d.WriteAt(t.Context(), bytes.Repeat([]byte{2}, 100), block) }()
			<-gate.Arrived
			if lease, ok := d.TryShare(tt.off, int64(tt.n), nil); ok != tt.free {
				t.Errorf("try to share: got %v, want %v", ok, tt.free)
			} else if ok {
				lease.Release()
			}
			go func() { second <- d.WriteAt(t.Context(), bytes.Repeat([]byte{3}, tt.n), tt.off) }()
			if tt.free {
				if err := <-second; err != nil {
					t.Errorf("write elsewhere: %v", err)
				}
				second <- nil
			}
			gate.Open()
			if err := errors.Join(<-first, <-second); err != nil {
				t.Fatalf("writes: %v", err)
			}
			want := bytes.Repeat([]byte{1}, 3*block)
			copy(want[block:], bytes.Repeat([]byte{2}, 100))
			copy(want[tt.off:], bytes.Repeat([]byte{3}, tt.n))
			d.wantContents(t, want)
		})
	}
}

// waiter tells when somebody waits for its end.
type waiter struct {
	context.Context
	waits chan struct{}
}

func newWaiter(t *testing.T) waiter { return waiter{t.Context(), make(chan struct{}, 1)} }

func (w waiter) Done() <-chan struct{} {
	select {
	case w.waits <- struct{}{}:
	default:
	}
	return w.Context.Done()
}

// TestTailWriteRunsBesideNoOtherWrite: a write through the page cache beside
// direct ones loses what they wrote, wherever in the file they are.
func TestTailWriteRunsBesideNoOtherWrite(t *testing.T) {
	const block, end = 512, 64<<10 + 100
	d := newDirect(t, end, block, bounce)
	before, err := d.Share(t.Context(), 0, block)
	if err != nil {
		t.Fatalf("share: %v", err)
	}
	gate := backingtest.NewGate()
	d.fault.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpWrite), Gate: gate})
	tail, after := newWaiter(t), newWaiter(t)
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- d.WriteAt(tail, []byte{2}, end-1) }()
	select {
	case <-tail.waits:
	case <-gate.Arrived:
		t.Error("the tail is written while a write elsewhere is in flight")
		gate.Arrived <- struct{}{}
	}
	before.Release()
	<-gate.Arrived
	if lease, ok := d.TryShare(0, block, nil); ok {
		lease.Release()
		t.Error("a write elsewhere could be mapped while the tail is written")
	}
	go func() { second <- d.WriteAt(after, bytes.Repeat([]byte{3}, block), 0) }()
	select {
	case <-after.waits:
	case err := <-second:
		t.Errorf("write elsewhere: got %v while the tail is written, want it to wait", err)
		second <- err
	}
	gate.Open()
	if err := errors.Join(<-first, <-second); err != nil {
		t.Fatalf("writes: %v", err)
	}
	want := bytes.Repeat([]byte{1}, end)
	copy(want, bytes.Repeat([]byte{3}, block))
	want[end-1] = 2
	d.wantContents(t, want)
}

func TestSharedRangeHoldsPartialWritesBackAndLetsWholeOnesPass(t *testing.T) {
	d := newDirect(t, 8192, 4096, bounce)
	lease, err := d.Share(t.Context(), 100, 10)
	if err != nil {
		t.Fatalf("share: %v", err)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Errorf("write of the whole block: %v", err)
	}
	d.fault.Clear()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.WriteAt(ctx, []byte{1}, 0) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("partial write: got %v, want %v", err, context.Canceled)
	}
	if n := d.fault.Clear(); n != 0 {
		t.Errorf("partial write that waits: got %d transfers, want none", n)
	}
	lease.Release()
	if err := d.WriteAt(t.Context(), []byte{9}, 0); err != nil {
		t.Errorf("partial write afterwards: %v", err)
	}
}

// TestPartialWritesNeedNoBuffersOfAnEmptyPool: requests hold buffers of the
// pool while they wait for one to bounce with.
func TestPartialWritesNeedNoBuffersOfAnEmptyPool(t *testing.T) {
	pool := bufpool.New(limits.BounceBuffer)
	d := newDirect(t, 1<<20, 512, pool)
	var wg sync.WaitGroup
	for w := range int64(8) {
		wg.Go(func() {
			p := make([]byte, 100<<10)
			for i := range int64(4) {
				off := w*100<<10 + i + 1
				if err := d.WriteAt(t.Context(), p, off); err != nil {
					t.Errorf("write at %d: %v", off, err)
				}
				if _, err := d.ReadAt(t.Context(), p, off); err != nil {
					t.Errorf("read at %d: %v", off, err)
				}
			}
		})
	}
	wg.Wait()
	if n, _ := pool.Outstanding(); n != 1 {
		t.Errorf("buffers lent: got %d, want the spare one", n)
	}
}

// full is an engine whose page cache has no room, once: the kernel tells some
// errors to one write alone.
type full struct{ *engine.Pool }

func (full) WriteNow(*engine.File, []byte, int64) (int, error) { return 0, syscall.ENOSPC }

func TestErrorOfACachedWriteIsFinal(t *testing.T) {
	e := full{engine.NewPool(1)}
	defer e.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	file, err := e.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	a, err := backing.NewAligned(t.Context(), e, file, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := a.WriteAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: got %v, want %v", err, syscall.ENOSPC)
	}
}

func TestPartialWriteThatCannotReadWritesNothing(t *testing.T) {
	d := newDirect(t, 8192, 4096, bounce)
	d.fault.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpRead), Fault: backingtest.Fault{Errno: syscall.EIO}})
	if err := d.WriteAt(t.Context(), []byte{2}, 100); !errors.Is(err, syscall.EIO) {
		t.Errorf("write: got %v, want %v", err, syscall.EIO)
	}
	if n := d.fault.Clear(); n != 1 {
		t.Errorf("transfers: got %d, want the read alone", n)
	}
	d.wantContents(t, bytes.Repeat([]byte{1}, 8192))
}

func TestAlignedWholeBlocksAreOneTransfer(t *testing.T) {
	d := newDirect(t, 1<<20, 512, bounce)
	b := bounce.TryGet(512 << 10)
	defer b.Release()
	for _, do := range []func() error{
		func() error { _, err := d.ReadAt(t.Context(), b.Bytes(), 4096); return err },
		func() error { return d.WriteAt(t.Context(), b.Bytes(), 4096) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if n := d.fault.Clear(); n != 1 {
			t.Errorf("aligned half MiB: got %d transfers, want 1", n)
		}
	}
}

func TestNewAlignedRefuses(t *testing.T) {
	e := engine.NewPool(1)
	defer e.Close()
	for _, tt := range []struct {
		align int64
		pool  *bufpool.Pool
	}{{512, nil}, {513, bounce}, {1 << 30, bounce}} {
		if _, err := backing.NewAligned(t.Context(), e, nil, tt.align, tt.pool); !errors.Is(err, backing.ErrInvalid) {
			t.Errorf("alignment %d, pool %v: got %v, want %v", tt.align, tt.pool != nil, err, backing.ErrInvalid)
		}
	}
}

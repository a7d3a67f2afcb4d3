package store_test

import (
	"bytes"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

var buffers = bufpool.New(16 << 20)

// newStore opens a new file of size bytes with fill in each.
func newStore(t *testing.T, direct bool, size int, fill byte) (store.Store, string, *backingtest.FaultEngine) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, bytes.Repeat([]byte{fill}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if direct {
		flags |= unix.O_DIRECT
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	e := backingtest.NewFaultEngine(engine.NewPool(2))
	d, err := raw.Open(os.NewFile(uintptr(fd), path), e, raw.Options{
		Path: path, Container: true, Direct: direct, Buffers: buffers, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatalf("open %q: %v", path, err)
	}
	st := store.NewFile(d)
	t.Cleanup(func() {
		if err := errors.Join(st.Close(), e.Close()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return st, path, e
}

// forModes runs a test in the page cache and past it.
func forModes(t *testing.T, fn func(t *testing.T, direct bool)) {
	for name, direct := range map[string]bool{"cached": false, "direct": true} {
		t.Run(name, func(t *testing.T) { fn(t, direct) })
	}
}

func wantSize(t *testing.T, st store.Store, want int64) {
	t.Helper()
	if got, err := st.Size(); err != nil || got != want {
		t.Errorf("size: got %d, %v, want %d", got, err, want)
	}
}

func TestReadIsShortOnlyAtTheEnd(t *testing.T) {
	forModes(t, func(t *testing.T, direct bool) {
		st, _, _ := newStore(t, direct, 5000, 7)
		for _, tt := range []struct {
			off     int64
			n, want int
		}{
			{0, 5000, 5000}, {0, 4096, 4096}, {0, 6000, 5000}, {4096, 4096, 904}, {4999, 2, 1}, {5000, 1, 0},
			{1 << 40, 512, 0}, {0, 0, 0}, {math.MaxInt64 - 512, 512, 0},
		} {
			p := make([]byte, tt.n)
			n, err := st.ReadAt(t.Context(), p, tt.off)
			if math.MaxInt64-tt.off < 4096 && err != nil {
				continue // the kernel refuses what is past its own bound
			}
			if err != nil || n != tt.want || !bytes.Equal(p[:n], bytes.Repeat([]byte{7}, n)) {
				t.Errorf("read at %d+%d: got %d bytes, %v, want %d", tt.off, tt.n, n, err, tt.want)
			}
		}
	})
}

func TestOffsetsNoFileHasAreRefused(t *testing.T) {
	st, _, _ := newStore(t, false, 512, 1)
	p := make([]byte, 512)
	for _, off := range []int64{-1, math.MinInt64, math.MaxInt64 - 100} {
		_, err := st.ReadAt(t.Context(), p, off)
		for name, err := range map[string]error{"read": err, "write": st.WriteAt(t.Context(), p, off, false), "punch": st.Punch(t.Context(), off, 512)} {
			if !errors.Is(err, syscall.EINVAL) {
				t.Errorf("%s at %d: got %v, want %v", name, off, err, syscall.EINVAL)
			}
		}
	}
	if err := st.Truncate(-1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("truncate to -1: got %v, want %v", err, syscall.EINVAL)
	}
	wantSize(t, st, 512)
}

func TestWritesMoveTheEnd(t *testing.T) {
	forModes(t, func(t *testing.T, direct bool) {
		st, path, _ := newStore(t, direct, 0, 0)
		var want []byte
		for i, w := range []struct {
			off int64
			n   int
		}{{0, 4096}, {4096, 512}, {5000, 3192}, {16384, 65536}, {81920 - 100, 8192}, {200000, 1}} {
			p := bytes.Repeat([]byte{byte(i + 1)}, w.n)
			if grow := int(w.off) + w.n - len(want); grow > 0 {
				want = append(want, make([]byte, grow)...)
			}
			copy(want[w.off:], p)
			if err := st.WriteAt(t.Context(), p, w.off, i&1 == 1); err != nil {
				t.Fatalf("write at %d+%d: %v", w.off, w.n, err)
			}
			wantSize(t, st, int64(len(want)))
		}
		if err := st.Sync(t.Context()); err != nil {
			t.Errorf("sync: %v", err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("file: got %d bytes, %v, want other %d bytes", len(got), err, len(want))
		}
	})
}

func TestOnlyWhatIsInTheFileIsMappable(t *testing.T) {
	forModes(t, func(t *testing.T, direct bool) {
		st, _, _ := newStore(t, direct, 8192, 1)
		mappable := func(off, n int64) bool {
			var m backing.Mapping
			err := st.Map(engine.OpRead, off, n, &m)
			if err == nil && (m.N != 1 || m.Runs[0].Off != off || m.Runs[0].Len != n) {
				t.Errorf("map of %d+%d: got %+v, want the range itself", off, n, m)
			}
			m.Release()
			return err == nil
		}
		check := func(when string, off int64, want bool) {
			if got := mappable(off, 4096); got != want {
				t.Errorf("%s: map of %d+4096: got %v, want %v", when, off, got, want)
			}
		}
		check("before", 4096, true)
		check("before", 8192, false)
		check("before", math.MaxInt64-4095, false)
		if err := st.WriteAt(t.Context(), make([]byte, 4096), 8192, false); err != nil {
			t.Fatal(err)
		}
		check("after the end moved on", 8192, true)
		if err := st.Truncate(4096); err != nil {
			t.Fatal(err)
		}
		wantSize(t, st, 4096)
		check("after the end moved back", 0, true)
		check("after the end moved back", 4096, false)
	})
}

func TestTruncateMakesZeroes(t *testing.T) {
	st, _, _ := newStore(t, false, 8192, 9)
	for _, size := range []int64{100, 8192} {
		if err := st.Truncate(size); err != nil {
			t.Fatalf("truncate to %d: %v", size, err)
		}
	}
	p := make([]byte, 8192)
	want := append(bytes.Repeat([]byte{9}, 100), make([]byte, 8092)...)
	if n, err := st.ReadAt(t.Context(), p, 0); err != nil || n != len(p) || !bytes.Equal(p, want) {
		t.Errorf("read: got %d bytes, %v, want 100 of old data and zeroes", n, err)
	}
}

func TestPunchAndZeroKeepTheEnd(t *testing.T) {
	forModes(t, func(t *testing.T, direct bool) {
		st, _, _ := newStore(t, direct, 256<<10, 3)
		want := bytes.Repeat([]byte{3}, 256<<10)
		clear(want[64<<10 : 128<<10])
		clear(want[192<<10:])
		if err := errors.Join(st.Punch(t.Context(), 64<<10, 64<<10), st.Zero(t.Context(), 192<<10, 128<<10)); err != nil {
			t.Fatal(err)
		}
		wantSize(t, st, 256<<10)
		got := make([]byte, 256<<10)
		if _, err := st.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read: %v, or wrong bytes", err)
		}
		holes := int64(0)
		err := st.Extents(t.Context(), 64<<10, 64<<10, func(x backing.Extent) bool {
			if x.Hole && x.Zero {
				holes += x.Len
			}
			return true
		})
		if err != nil || holes != 64<<10 {
			t.Errorf("extents of what was punched: got %d bytes of holes, %v, want %d", holes, err, 64<<10)
		}
	})
}

func TestPunchThatIsNotSupportedTouchesNothing(t *testing.T) {
	st, _, e := newStore(t, false, 8192, 3)
	e.Inject(backingtest.Rule{Times: -1, Match: backingtest.Ops(engine.OpPunch), Fault: backingtest.Fault{Errno: syscall.EOPNOTSUPP}})
	if err := st.Punch(t.Context(), 0, 8192); !errors.Is(err, backing.ErrNotSupported) {
		t.Errorf("punch: got %v, want %v", err, backing.ErrNotSupported)
	}
	p := make([]byte, 8192)
	if _, err := st.ReadAt(t.Context(), p, 0); err != nil || p[0] != 3 || p[8191] != 3 {
		t.Errorf("read: got %d %d, %v, want 3 3", p[0], p[8191], err)
	}
}

func TestFailedSyncIsForEver(t *testing.T) {
	st, _, e := newStore(t, false, 0, 0)
	e.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: syscall.EIO}})
	if err := st.Sync(t.Context()); !errors.Is(err, backing.ErrIO) {
		t.Fatalf("sync: got %v, want %v", err, backing.ErrIO)
	}
	for name, err := range map[string]error{
		"write": st.WriteAt(t.Context(), make([]byte, 512), 0, false), "sync": st.Sync(t.Context()),
		"truncate": st.Truncate(1), "punch": st.Punch(t.Context(), 0, 1), "zero": st.Zero(t.Context(), 0, 1),
	} {
		if !errors.Is(err, backing.ErrPoisoned) {
			t.Errorf("%s after a failed sync: got %v, want %v", name, err, backing.ErrPoisoned)
		}
	}
}

// TestFailedDurableWriteAfterATailPoisons: part of a block that was written at
// the end of a direct file lies in the page cache, and the failure of a later
// durable write may be the report of its loss.
func TestFailedDurableWriteAfterATailPoisons(t *testing.T) {
	st, _, e := newStore(t, true, 4096, 1)
	for _, w := range [][2]int64{{4096, 100}, {4196, 3996}} {
		if err := st.WriteAt(t.Context(), make([]byte, w[1]), w[0], false); err != nil {
			t.Fatal(err)
		}
	}
	wantSize(t, st, 8192)
	e.Inject(backingtest.Rule{Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: syscall.EIO}})
	if err := st.WriteAt(t.Context(), make([]byte, 4096), 0, true); !errors.Is(err, backing.ErrIO) {
		t.Fatalf("durable write: got %v, want %v", err, backing.ErrIO)
	}
	if err := st.Sync(t.Context()); !errors.Is(err, backing.ErrPoisoned) {
		t.Errorf("sync: got %v, want %v", err, backing.ErrPoisoned)
	}
}

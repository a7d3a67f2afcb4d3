package raw_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// TestFullFileSystemRecovers is fault BE-05.
func TestFullFileSystemRecovers(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		dir := backingtest.Tmpfs(t, 1<<20)
		path := filepath.Join(dir, "disk.img")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 4<<20); err != nil {
			t.Fatal(err)
		}
		dev := openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{})
		closeAfter(t, dev)
		d := backing.NewEmulate(dev)
		p := bytes.Repeat([]byte{7}, 2<<20)
		for name, err := range map[string]error{
			"write":             d.WriteAt(t.Context(), p, 0, 0),
			"FUA write":         d.WriteAt(t.Context(), p, 0, backing.FUA),
			"zero without hole": d.Zero(t.Context(), 2<<20, 1<<20, backing.NoHole),
		} {
			if !errors.Is(err, backing.ErrNoSpace) {
				t.Errorf("%s on a full file system: got %v, want %v", name, err, backing.ErrNoSpace)
			}
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Errorf("flush after no space: got %v, want none", err)
		}
		if err := d.Zero(t.Context(), 0, 4<<20, 0); err != nil {
			t.Errorf("zero, which frees space: %v", err)
		}
		if err := unix.Mount("none", dir, "", unix.MS_REMOUNT, "size=8M"); err != nil {
			t.Fatalf("remount larger: %v", err)
		}
		if err := d.WriteAt(t.Context(), p, 0, backing.FUA); err != nil {
			t.Errorf("same write with space: %v", err)
		}
		if got := contents(t, d); !bytes.Equal(got[:len(p)], p) {
			t.Error("read back: wrong bytes")
		}
	})
}

// TestTmpfsConforms: it knows no ZERO_RANGE, and does not tell its alignment.
func TestTmpfsConforms(t *testing.T) {
	for _, k := range []kind{{"pool", false}, {"pool", true}} {
		t.Run(k.String(), func(t *testing.T) {
			dir := backingtest.Tmpfs(t, 64<<20)
			backingtest.Run(t, backingtest.Maker{New: func(t testing.TB, size int64) backing.Device {
				path := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-"))
				f, err := os.Create(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := f.Truncate(size); err != nil {
					t.Fatal(err)
				}
				d := openRaw(t, path, newEngine(t, k.engine), k.direct, raw.Options{})
				t.Cleanup(func() { _ = os.Remove(path) })
				closeAfter(t, d)
				return backing.NewEmulate(d)
			}})
		})
	}
}

// TestLargestFilesAreServedToTheirEnd: offsets end there too.
func TestLargestFilesAreServedToTheirEnd(t *testing.T) {
	dir := backingtest.Tmpfs(t, 1<<20)
	for _, tt := range []struct {
		size    int64
		direct  bool
		refused bool // the last block is not whole, and ends beyond all offsets
	}{
		{math.MaxInt64, false, false},
		{math.MaxInt64 - 511, false, false},
		{math.MaxInt64 - 4095, false, false},
		{math.MaxInt64 - 4095, true, false},
		{math.MaxInt64, true, true},
	} {
		t.Run(fmt.Sprintf("%d direct %v", tt.size, tt.direct), func(t *testing.T) {
			path := filepath.Join(dir, "disk.img")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, tt.size)); err != nil {
				t.Fatal(err)
			}
			d, err := tryRaw(t, path, newEngine(t, "pool"), tt.direct, raw.Options{})
			if tt.refused {
				if !errors.Is(err, backing.ErrNotSupported) {
					t.Errorf("open: got %v, want %v", err, backing.ErrNotSupported)
				}
				return
			}
			if err != nil {
				t.Fatalf("open: %v", err)
			}
			closeAfter(t, d)
			got := make([]byte, 3)
			for name, err := range map[string]error{
				"write":           d.WriteAt(t.Context(), []byte("end"), tt.size-3, 0),
				"read":            d.ReadAt(t.Context(), got, tt.size-3),
				"trim of a part":  d.Trim(t.Context(), tt.size-100, 100, 0),
				"trim of a block": d.Trim(t.Context(), tt.size-8192, 8000, 0),
			} {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if err := d.ReadAt(t.Context(), got, tt.size-3); err != nil || string(got) != "end" {
				t.Errorf("read: got %q, %v, want %q", got, err, "end")
			}
		})
	}
}

// TestFileSizeLimitIsNoSpace is fault BE-10.
func TestFileSizeLimitIsNoSpace(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		d := newRaw(t, 1<<20, newEngine(t, k.engine), k.direct, raw.Options{})
		var old unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
		low := unix.Rlimit{Cur: 512 << 10, Max: old.Max}
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &low); err != nil {
			t.Fatal(err)
		}
		within := d.WriteAt(t.Context(), make([]byte, 64<<10), 0, 0)
		across := d.WriteAt(t.Context(), make([]byte, 64<<10), 480<<10, 0)
		durable := d.WriteAt(t.Context(), make([]byte, 64<<10), 480<<10, backing.FUA)
		beyond := d.WriteAt(t.Context(), make([]byte, 4096), 600<<10, 0)
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
		if within != nil {
			t.Errorf("write within the limit: %v", within)
		}
		for name, err := range map[string]error{"across": across, "durably across": durable, "beyond": beyond} {
			if !errors.Is(err, backing.ErrNoSpace) {
				t.Errorf("write %s the limit: got %v, want %v", name, err, backing.ErrNoSpace)
			}
		}
		if err := d.WriteAt(t.Context(), make([]byte, 4096), 600<<10, backing.FUA); err != nil {
			t.Errorf("write without the limit: %v", err)
		}
	})
}

// newZram makes a compressed RAM disk of size bytes that stores no more than
// limit: writing more of what does not compress is an I/O error of a real
// block device.
func newZram(t *testing.T, size, limit int64) string {
	t.Helper()
	const control = "/sys/class/zram-control/"
	b, err := os.ReadFile(control + "hot_add")
	if err != nil {
		t.Skipf("needs root and the zram driver: %v", err)
	}
	id := strings.TrimSpace(string(b))
	attr := func(path, value string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			t.Fatalf("write %q to %s: %v", value, path, err)
		}
	}
	dir := "/sys/block/zram" + id + "/"
	t.Cleanup(func() {
		attr(dir+"reset", "1")
		attr(control+"hot_remove", id)
	})
	attr(dir+"disksize", fmt.Sprint(size))
	attr(dir+"mem_limit", fmt.Sprint(limit))
	node := "/dev/zram" + id
	if _, err := os.Stat(node); err != nil {
		t.Skipf("needs a devtmpfs on /dev: %v", err)
	}
	return node
}

// TestLostPagesPoison is fault BE-03: all writes succeed, the flush fails, and
// the kernel would let the next one succeed.
func TestLostPagesPoison(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			node := newZram(t, 32<<20, 4<<20)
			d := openRaw(t, node, newEngine(t, engine), false, raw.Options{})
			p := make([]byte, 16<<20)
			_, _ = rand.Read(p) // never fails
			if err := d.WriteAt(t.Context(), p, 0, 0); err != nil {
				t.Fatalf("write into the page cache: %v", err)
			}
			if err := d.Flush(t.Context()); backing.KindOf(err) != backing.ErrIO && backing.KindOf(err) != backing.ErrNoSpace {
				t.Fatalf("flush: got %v, want %v", err, backing.ErrIO)
			}
			wantPoisoned(t, d)
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			d = openRaw(t, node, newEngine(t, engine), false, raw.Options{})
			closeAfter(t, d)
			if err := d.Zero(t.Context(), 0, 32<<20, 0); err != nil {
				t.Errorf("zero after opening anew: %v", err)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Errorf("flush after opening anew: %v", err)
			}
		})
	}
}

// TestDirectWriteErrorConcernsOneWrite is fault BE-02.
func TestDirectWriteErrorConcernsOneWrite(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			d := openRaw(t, newZram(t, 32<<20, 4<<20), newEngine(t, engine), true, raw.Options{})
			closeAfter(t, d)
			b := buffers.TryGet(16 << 20)
			defer b.Release()
			_, _ = rand.Read(b.Bytes()) // never fails
			err := d.WriteAt(t.Context(), b.Bytes(), 0, 0)
			if k := backing.KindOf(err); err == nil || k != backing.ErrIO && k != backing.ErrNoSpace {
				t.Fatalf("write beyond what the device stores: got %v, want %v", err, backing.ErrIO)
			}
			if err := d.Zero(t.Context(), 0, 32<<20, 0); err != nil {
				t.Errorf("zero: %v", err)
			}
			if err := d.WriteAt(t.Context(), b.Bytes()[:4096], 20<<20, backing.FUA); err != nil {
				t.Errorf("write elsewhere: %v", err)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Errorf("flush: %v", err)
			}
		})
	}
}

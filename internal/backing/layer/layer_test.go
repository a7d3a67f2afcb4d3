package layer_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/choose"
)

var (
	quiet   = slog.New(slog.DiscardHandler)
	buffers = bufpool.New(64 << 20)
)

// base makes the device below the layers.
type base struct {
	name string
	make func(t testing.TB, size int64) backing.Device
}

var bases = []base{
	{"mem", func(_ testing.TB, size int64) backing.Device { return mem.New(size, nil) }},
	{"raw-pool", func(t testing.TB, size int64) backing.Device { return newRaw(t, "pool", size, 0) }},
	{"raw-uring-direct", func(t testing.TB, size int64) backing.Device { return newRaw(t, "uring", size, unix.O_DIRECT) }},
}

func newEngine(t testing.TB, name string) engine.Engine {
	t.Helper()
	e, err := choose.New(name, buffers, quiet)
	if err != nil {
		t.Skipf("needs io_uring: %v", err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("close engine: %v", err)
		}
	})
	return e
}

// newRaw serves a new file, all hole.
func newRaw(t testing.TB, engineName string, size int64, flags int) backing.Device {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return openRaw(t, engineName, path, flags)
}

// openRaw opens a file or block device as a disk.
func openRaw(t testing.TB, engineName, path string, flags int) backing.Device {
	t.Helper()
	e := newEngine(t, engineName)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	d, err := raw.Open(os.NewFile(uintptr(fd), path), e, raw.Options{Path: path, Direct: flags != 0, Buffers: buffers, Log: quiet})
	if err != nil {
		t.Fatalf("serve %s: %v", path, err)
	}
	return backing.NewEmulate(d)
}

// closing closes d after the test.
func closing[D backing.Device](t testing.TB, d D) D {
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

// conform runs the suite for a layer above each base. extra bytes more than
// the suite asks for are made below.
func conform(t *testing.T, extra int64, wrap func(t testing.TB, d backing.Device) backing.Device) {
	conformOn(t, bases, extra, wrap)
}

func conformOn(t *testing.T, bases []base, extra int64, wrap func(t testing.TB, d backing.Device) backing.Device) {
	for _, b := range bases {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			backingtest.Run(t, backingtest.Maker{New: func(t testing.TB, size int64) backing.Device {
				return closing(t, wrap(t, b.make(t, size+extra)))
			}})
		})
	}
}

// must fails the test for an error of a constructor.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// isKind checks an error by its kind.
func isKind(t *testing.T, what string, err error, want backing.Kind) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

// holds checks the bytes of a device.
func holds(t *testing.T, d backing.Device, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if err := d.ReadAt(t.Context(), got, off); err != nil {
		t.Fatalf("read at %d+%d: %v", off, len(want), err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("read at %d+%d: got %.40x…, want %.40x…", off, len(want), got, want)
	}
}

// fill writes n bytes of value v.
func fill(t *testing.T, d backing.Device, off int64, n int, v byte) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{v}, n)
	if err := d.WriteAt(t.Context(), p, off, 0); err != nil {
		t.Fatalf("write at %d+%d: %v", off, n, err)
	}
	return p
}

// mapAllocates counts the allocations of mapping and releasing.
func mapAllocates(t *testing.T, d backing.Device) float64 {
	t.Helper()
	var m backing.Mapping
	return testing.AllocsPerRun(200, func() {
		for _, op := range []engine.Op{engine.OpRead, engine.OpWrite} {
			if err := d.Map(op, 4096, 4096, &m); err != nil {
				t.Fatalf("%v: map: %v", op, err)
			}
			m.Release()
		}
	})
}

// allocated is what a file takes on its storage, in bytes.
func allocated(f *os.File) (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Blocks * 512, err
}

package raw_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/choose"
)

// newEngine makes an engine by name and closes it after the test.
func newEngine(t testing.TB, name string) engine.Engine {
	t.Helper()
	e, err := choose.New(name, buffers, slog.New(slog.DiscardHandler))
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

var engines = []string{"pool", "uring"}

// buffers is shared: its budget is more than all tests need at a time.
var buffers = bufpool.New(64 << 20)

// kind is one way to serve a file.
type kind struct {
	engine string
	direct bool
}

func (k kind) String() string {
	if k.direct {
		return k.engine + "/direct"
	}
	return k.engine + "/buffered"
}

func kinds() (list []kind) {
	for _, e := range engines {
		list = append(list, kind{e, false}, kind{e, true})
	}
	return list
}

// forKinds runs a test for every engine, buffered and direct.
func forKinds(t *testing.T, fn func(*testing.T, kind)) {
	for _, k := range kinds() {
		t.Run(k.String(), func(t *testing.T) { fn(t, k) })
	}
}

// tempImage makes a file of size bytes, all hole, on a disk file system.
func tempImage(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

func openFile(t testing.TB, path string, flags int) *os.File {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s with flags %#x: %v", path, flags, err)
	}
	return os.NewFile(uintptr(fd), path)
}

// openRaw opens path and leaves closing to the caller.
func openRaw(t testing.TB, path string, e engine.Engine, direct bool, o raw.Options) *raw.Device {
	t.Helper()
	d, err := tryRaw(t, path, e, direct, o)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	return d
}

func tryRaw(t testing.TB, path string, e engine.Engine, direct bool, o raw.Options) (*raw.Device, error) {
	t.Helper()
	flags := unix.O_RDWR
	if o.ReadOnly {
		flags = unix.O_RDONLY
	}
	if direct {
		flags |= unix.O_DIRECT
	}
	o.Path, o.Direct, o.Buffers = path, direct, buffers
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return raw.Open(openFile(t, path, flags), e, o)
}

// newRaw makes an image and serves it until the test ends.
func newRaw(t testing.TB, size int64, e engine.Engine, direct bool, o raw.Options) *raw.Device {
	t.Helper()
	d := openRaw(t, tempImage(t, size), e, direct, o)
	closeAfter(t, d)
	return d
}

func closeAfter(t testing.TB, d backing.Device) {
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// rawMaker hands files to the suite.
func rawMaker(k kind, o raw.Options) backingtest.Maker {
	var (
		eng  engine.Engine
		path string
		open *raw.Device
	)
	reopen := func(t testing.TB) backing.Device {
		open = openRaw(t, path, eng, k.direct, o)
		return backing.NewEmulate(open)
	}
	return backingtest.Maker{
		Ends: true,
		New: func(t testing.TB, size int64) backing.Device {
			eng = newEngine(t, k.engine)
			path = tempImage(t, size)
			t.Cleanup(func() { _ = open.Close() })
			return reopen(t)
		},
		Reopen: func(t testing.TB, d backing.Device) backing.Device {
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			return reopen(t)
		},
	}
}

func TestFileConforms(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) { backingtest.Run(t, rawMaker(k, raw.Options{})) })
}

func TestWritethroughFileConforms(t *testing.T) {
	backingtest.Run(t, rawMaker(kind{"pool", true}, raw.Options{Writethrough: true}))
}

func TestUnlockedFileConforms(t *testing.T) {
	backingtest.Run(t, rawMaker(kind{"pool", false}, raw.Options{Lock: raw.LockOff}))
}

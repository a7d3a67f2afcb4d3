package open_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/choose"
)

// engineNamed makes an engine and closes it after the test.
func engineNamed(t testing.TB, name string) engine.Engine {
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

// memoryDir is a file system where a flush need not wait for a disk.
const memoryDir = "/dev/shm"

// folder makes a folder on a disk, or in memory where that is possible.
func folder(t testing.TB, disk bool) string {
	t.Helper()
	if _, err := os.Stat(memoryDir); disk || err != nil {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(memoryDir, "vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// writable is a kind of image that is opened for writing.
type writable struct {
	engine, cache, options string // the options are those of qemu-img create
	above                  bool   // a raw backing file of zeroes
	disk                   bool   // the image lies on a disk
}

// maker hands new images to the suite. When a test is over, qemu-img must find
// its image sound.
func (w writable) maker() backingtest.Maker {
	var (
		s    open.Spec
		dev  backing.Device
		root string
	)
	reopen := func(t testing.TB) backing.Device {
		t.Helper()
		d, err := open.Open(t.Context(), s)
		if err != nil {
			t.Fatalf("open for writing: %v", err)
		}
		dev = d
		return d
	}
	return backingtest.Maker{
		Granule: 512, Ends: true,
		New: func(t testing.TB, size int64) backing.Device {
			root = folder(t, w.disk)
			s = open.Spec{Path: filepath.Join(root, "top.qcow2"), Format: "qcow2", Cache: w.cache, Backing: open.Policy{Mode: open.SameDir},
				Engine: engineNamed(t, w.engine), Buffers: buffers, Log: slog.New(slog.DiscardHandler)}
			args := []string{"create", "-q", "-f", "qcow2", "-o", w.options}
			if w.above {
				base := filepath.Join(root, "base.raw")
				if err := errors.Join(os.WriteFile(base, nil, 0o600), os.Truncate(base, size/2)); err != nil {
					t.Fatal(err)
				}
				args = append(args, "-b", "base.raw", "-F", "raw")
			}
			argv := append(args, s.Path, fmt.Sprint(size))
			if out, err := tryQEMU(t, root, "qemu-img", argv...); err != nil {
				t.Fatalf("qemu-img %q: %v: %s", argv, err, out)
			}
			t.Cleanup(func() {
				if err := dev.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
				wantSound(t, s.Path)
			})
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

func TestWritableQcow2Conforms(t *testing.T) {
	for _, w := range []writable{
		{engine: "uring", options: "compat=1.1", disk: true},
		{engine: "uring", cache: open.CacheNone, options: "compat=1.1", above: true, disk: true},
		{engine: "pool", cache: open.CacheNone, options: "cluster_size=4k"},
		{engine: "pool", cache: open.CacheWritethrough, options: "compat=1.1", disk: true},
		{engine: "uring", cache: open.CacheDirectSync, options: "cluster_size=256k", above: true},
		{engine: "pool", options: "extended_l2=on,cluster_size=32k", above: true},
		{engine: "pool", options: "compat=0.10,cluster_size=512", above: true},
		{engine: "uring", cache: open.CacheUnsafe, options: "refcount_bits=1"},
		{engine: "pool", cache: open.CacheNone, options: "data_file=data"},
		{engine: "uring", options: "data_file=data,data_file_raw=on"},
	} {
		t.Run(fmt.Sprintf("%s,cache=%s,%s", w.engine, w.cache, w.options), func(t *testing.T) {
			t.Parallel()
			backingtest.Run(t, w.maker())
		})
	}
}

// wantSound holds an image that is closed against qemu-img check.
func wantSound(t testing.TB, path string) {
	t.Helper()
	// Not with t.Context, which has ended in a Cleanup.
	cmd := exec.Command("qemu-img", "check", "-f", "qcow2", filepath.Base(path))
	cmd.Dir = filepath.Dir(path) // where QEMU looks for a data file
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
}

// TestWhatIsNotForWritingIsOpenedOnlyForReading: each of these says why, and
// the same image opens read-only.
func TestWhatIsNotForWritingIsOpenedOnlyForReading(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		kind       error
		spoil      func(t *testing.T, path string, s *open.Spec)
	}{
		{"snapshot", "read-only", backing.ErrInvalid, func(t *testing.T, path string, s *open.Spec) {
			qemu(t, "", "qemu-img", "snapshot", "-c", "before", path)
			s.Snapshot = "before"
		}},
		{"marked corrupt", "corrupt", backing.ErrInvalid, setIncompat(1 << 1)},
		{"marked dirty", "repair", backing.ErrInvalid, setIncompat(1 << 0)},
		{"refcount of a data cluster is zero", "corrupt", nil, func(t *testing.T, path string, _ *open.Spec) {
			// The first refcount block is the third cluster.
			change(t, path, 2<<16, make([]byte, 64))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			qemu(t, "", "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
			qemu(t, "", "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 128k", path)
			s := chainSpec(t, path, open.Policy{})
			tt.spoil(t, path, &s)
			s.ReadOnly = false
			before := readFile(t, path)
			d, err := open.Open(t.Context(), s)
			if err == nil {
				_ = d.Close()
			}
			if err == nil || tt.kind != nil && !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("open for writing: got %v, want %v with %q and the path in it", err, tt.kind, tt.text)
			}
			if !bytes.Equal(readFile(t, path), before) {
				t.Error("the refused image has changed")
			}
			s.ReadOnly = true
			p := make([]byte, 512)
			if err := mustOpen(t, s).ReadAt(t.Context(), p, 0); err != nil || p[0] != 7 {
				t.Errorf("read-only: got %#x, %v, want 0x7", p[0], err)
			}
		})
	}
}

// setIncompat sets bits of the header's incompatible features.
func setIncompat(bits byte) func(*testing.T, string, *open.Spec) {
	return func(t *testing.T, path string, _ *open.Spec) { change(t, path, 79, []byte{bits}) }
}

func change(t *testing.T, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(p, off)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestOnlyTheTopOfAWritableChainIsWrittenTo(t *testing.T) {
	dir, want := newChain(t)
	mid, base := readFile(t, filepath.Join(dir, "mid.qcow2")), readFile(t, filepath.Join(dir, "base.raw"))
	s := chainSpec(t, filepath.Join(dir, "top.qcow2"), open.Policy{Mode: open.SameDir})
	s.ReadOnly = false
	d, err := open.Open(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	// Into what mid has, into what base has, and across what top has.
	for _, off := range []int64{70000, 400000, 130000} {
		p := bytes.Repeat([]byte{byte(off)}, 3000)
		copy(want[off:], p)
		if err := d.WriteAt(t.Context(), p, off, 0); err != nil {
			t.Errorf("write at %d: %v", off, err)
		}
	}
	if err := d.Zero(t.Context(), 600000, 100000, 0); err != nil {
		t.Errorf("zero: %v", err)
	}
	clear(want[600000:700000])
	wantContents(t, d, want)
	if err := d.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	wantSound(t, s.Path)
	if !bytes.Equal(readVia(t, dir, "top.qcow2"), want) {
		t.Error("QEMU reads something else")
	}
	if !bytes.Equal(readFile(t, filepath.Join(dir, "mid.qcow2")), mid) || !bytes.Equal(readFile(t, filepath.Join(dir, "base.raw")), base) {
		t.Error("a backing file has changed")
	}
}

// TestUnsafeFlushBringsTheMappingToTheFile: cache=unsafe spares the disk of the
// host the flush, nothing else. Who opens the image, or copies it, or finds it
// after this process was killed, reads what was flushed or written with FUA.
func TestUnsafeFlushBringsTheMappingToTheFile(t *testing.T) {
	for _, options := range []string{"compat=1.1", "data_file=data"} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "4M")
			s, e := newSpec(t)
			s.Path, s.Format, s.Cache, s.Backing = filepath.Join(dir, "disk.qcow2"), "qcow2", open.CacheUnsafe, open.Policy{Mode: open.SameDir}
			d := mustOpen(t, s)
			e.Inject(backingtest.Rule{Times: -1, Match: func(io *engine.IO) bool {
				if io.Op == engine.OpSync {
					t.Errorf("%v of %d bytes at %d: asked for durability", io.Op, io.Len, io.Off)
				}
				return false
			}})
			want := make([]byte, 4<<20)
			read := func(when string) {
				t.Helper()
				r := s
				r.ReadOnly, r.Lock = true, raw.LockOff
				p := make([]byte, len(want))
				if err := mustOpen(t, r).ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
					t.Errorf("%s: the file has something else, %v", when, err)
				}
			}
			p := bytes.Repeat([]byte{0x41}, 192<<10)
			copy(want, p)
			if err := errors.Join(d.WriteAt(t.Context(), p, 0, 0), d.Flush(t.Context())); err != nil {
				t.Fatal(err)
			}
			read("after a flush")
			copy(want[2<<20:], p)
			if err := d.WriteAt(t.Context(), p, 2<<20, backing.FUA); err != nil {
				t.Fatal(err)
			}
			read("after a write with FUA")
		})
	}
}

// TestMappingTakesTheMemoryThatItMay: with clusters of 512 bytes the mapping of 80
// MiB takes 1.25.
func TestMappingTakesTheMemoryThatItMay(t *testing.T) {
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "t", "80M")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write 0 80M", "t")
	for _, most := range []int64{1 << 20, 16 << 20} {
		d, err := open.Open(t.Context(), open.Spec{Path: filepath.Join(dir, "t"), Format: "qcow2", L2Cache: most,
			Engine: engineNamed(t, "pool"), Buffers: buffers})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 512)
		for off := int64(0); off < 80<<20; off += 32 << 10 {
			if err := d.ReadAt(t.Context(), p, off); err != nil {
				t.Fatalf("read at %d: %v", off, err)
			}
		}
		if m, _ := open.MapStats(d); m.Bytes > most || m.Bytes < min(most, 5<<18)/2 {
			t.Errorf("the mapping takes %d bytes, may take %d", m.Bytes, most)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

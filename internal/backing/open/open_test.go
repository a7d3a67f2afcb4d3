package open_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
)

var buffers = bufpool.New(64 << 20)

// newSpec is a complete Spec but for path and format.
func newSpec(t testing.TB) (open.Spec, *backingtest.FaultEngine) {
	t.Helper()
	e := backingtest.NewFaultEngine(engine.NewPool(4))
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("close engine: %v", err)
		}
	})
	return open.Spec{Engine: e, Buffers: buffers, Log: slog.New(slog.DiscardHandler)}, e
}

func image(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t testing.TB, s open.Spec) backing.Device {
	t.Helper()
	d, err := open.Open(t.Context(), s)
	if err != nil {
		t.Fatalf("open %+v: %v", s, err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

func TestEveryCacheModeConforms(t *testing.T) {
	for _, cache := range []string{"", open.CacheWriteback, open.CacheNone, open.CacheWritethrough, open.CacheDirectSync, open.CacheUnsafe} {
		t.Run("cache="+cache, func(t *testing.T) {
			backingtest.Run(t, backingtest.Maker{Ends: true, New: func(t testing.TB, size int64) backing.Device {
				s, _ := newSpec(t)
				s.Path, s.Format, s.Cache = image(t, size), "raw", cache
				return mustOpen(t, s)
			}})
		})
	}
}

// TestCacheModes counts what a write, a durable write and a flush come to.
func TestCacheModes(t *testing.T) {
	for _, tt := range []struct {
		cache           string
		direct          bool
		durable, synced int // writes with FUA, or syncs of what was written; fdatasyncs
	}{
		{"", false, 1, 2},
		{open.CacheWriteback, false, 1, 2},
		{open.CacheNone, true, 1, 2},
		{open.CacheWritethrough, false, 2, 3},
		{open.CacheDirectSync, true, 2, 3},
		{open.CacheUnsafe, false, 0, 0},
	} {
		t.Run("cache="+tt.cache, func(t *testing.T) {
			s, e := newSpec(t)
			s.Path, s.Format, s.Cache = image(t, 1<<20), "raw", tt.cache
			d := mustOpen(t, s)
			durable, synced, direct := 0, 0, false
			e.Inject(backingtest.Rule{Times: -1, Match: func(io *engine.IO) bool {
				direct = io.File.Direct
				if io.Op == engine.OpSync && io.Len > 0 {
					durable++
				} else if io.Op == engine.OpSync {
					synced++
				}
				return false
			}})
			p := make([]byte, 4096)
			for _, err := range []error{
				d.WriteAt(t.Context(), p, 0, 0),
				d.WriteAt(t.Context(), p, 0, backing.FUA),
				d.Flush(t.Context()),
				d.Zero(t.Context(), 0, 4096, 0),
				d.Zero(t.Context(), 0, 4096, backing.FUA),
			} {
				if err != nil {
					t.Errorf("got %v, want none", err)
				}
			}
			if durable != tt.durable || synced != tt.synced || direct != tt.direct {
				t.Errorf("got %d durable writes, %d syncs, direct %v, want %d, %d, %v",
					durable, synced, direct, tt.durable, tt.synced, tt.direct)
			}
		})
	}
}

func TestVolatileFormats(t *testing.T) {
	for _, format := range []string{"mem", "null"} {
		d := mustOpen(t, open.Spec{Format: format, Path: "3M"})
		if got := d.Info(); got.Size != 3<<20 || !got.Caps.Has(backing.CanWrite|backing.CanMultiConn) {
			t.Errorf("%s: got %+v, want 3 MiB, writable, for many connections", format, got)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	toFIFO := filepath.Join(dir, "link")
	if err := os.Symlink(fifo, toFIFO); err != nil {
		t.Fatal(err)
	}
	disk := image(t, 4096)
	for _, tt := range []struct {
		name string
		spec open.Spec
		want error
		text string
	}{
		{"directory", open.Spec{Format: "raw", Path: dir}, backing.ErrInvalid, "directory"},
		{"FIFO", open.Spec{Format: "raw", Path: fifo}, backing.ErrInvalid, "FIFO"},
		{"link to a FIFO", open.Spec{Format: "raw", Path: toFIFO, ReadOnly: true}, backing.ErrInvalid, "FIFO"},
		{"socket", open.Spec{Format: "raw", Path: sock}, backing.ErrInvalid, "socket"},
		{"character device", open.Spec{Format: "raw", Path: "/dev/zero"}, backing.ErrInvalid, "character device"},
		{"nothing there", open.Spec{Format: "raw", Path: dir + "/none"}, fs.ErrNotExist, dir + "/none"},
		{"no path", open.Spec{Format: "raw"}, fs.ErrNotExist, "open"},
		{"unknown format", open.Spec{Format: "vhd", Path: disk}, backing.ErrInvalid, `"vhd"`},
		{"unknown cache mode", open.Spec{Format: "raw", Path: disk, Cache: "fast"}, backing.ErrInvalid, `"fast"`},
		{"unknown lock mode", open.Spec{Format: "raw", Path: disk, Lock: "maybe"}, backing.ErrInvalid, `"maybe"`},
		{"no direct I/O there", open.Spec{Format: "raw", Path: "/proc/self/status", ReadOnly: true, Cache: open.CacheNone}, backing.ErrNotSupported, "direct"},
		{"memory without size", open.Spec{Format: "mem", Path: "lots"}, backing.ErrInvalid, `"lots"`},
		{"memory past the page cache", open.Spec{Format: "null", Path: "1M", Cache: open.CacheNone}, backing.ErrInvalid, `"none"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base, _ := newSpec(t)
			tt.spec.Engine, tt.spec.Buffers, tt.spec.Log = base.Engine, base.Buffers, base.Log
			d, err := open.Open(t.Context(), tt.spec)
			if err == nil {
				_ = d.Close()
			}
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("open: got %v, want %v with %q in it", err, tt.want, tt.text)
			}
		})
	}
}

func TestOpenFollowsLinksOfTheOperator(t *testing.T) {
	path := image(t, 4096)
	link := filepath.Join(t.TempDir(), "current")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	s, _ := newSpec(t)
	s.Format, s.Path = "raw", link
	if got := mustOpen(t, s).Info().Size; got != 4096 {
		t.Errorf("size: got %d, want 4096", got)
	}
	s.Path = path
	if _, err := open.Open(t.Context(), s); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("open of what is served by another name: got %v, want %v", err, backing.ErrLocked)
	}
}

// TestFormatIsNeverProbed: a guest that writes a header of another format into
// its raw disk must find it there again, and nothing else.
func TestFormatIsNeverProbed(t *testing.T) {
	path := image(t, 4096)
	header := []byte("QFI\xfb\x00\x00\x00\x03")
	s, _ := newSpec(t)
	s.Format, s.Path = "raw", path
	for range 2 {
		d, err := open.Open(t.Context(), s)
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		got := make([]byte, len(header))
		if err := errors.Join(d.WriteAt(t.Context(), header, 0, 0), d.ReadAt(t.Context(), got, 0)); err != nil || !bytes.Equal(got, header) {
			t.Errorf("read: got %q, %v, want %q", got, err, header)
		}
		if size := d.Info().Size; size != 4096 {
			t.Errorf("size: got %d, want 4096", size)
		}
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// TestUnsaidFormatDoesNotDestroyAQcow2Image: where raw is only the default, an
// image that begins as qcow2 is not opened for writing, and served read-only as
// what it was opened as, with a warning.
func TestUnsaidFormatDoesNotDestroyAQcow2Image(t *testing.T) {
	for _, tt := range []struct {
		name, begins, format     string
		cache                    string
		readOnly, refused, warns bool
	}{
		{name: "for writing", begins: "QFI\xfb", refused: true},
		{name: "for writing, direct", begins: "QFI\xfb", cache: open.CacheNone, refused: true},
		{name: "for writing, unsafe", begins: "QFI\xfb", cache: open.CacheUnsafe, refused: true},
		{name: "read-only", begins: "QFI\xfb", readOnly: true, warns: true},
		{name: "raw is said", begins: "QFI\xfb", format: "raw"},
		{name: "raw is said, read-only", begins: "QFI\xfb", format: "raw", readOnly: true},
		{name: "another beginning", begins: "QFI\xfa"},
		{name: "cut short", begins: "QFI"},
		{name: "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := newSpec(t)
			var log bytes.Buffer
			s.Log = slog.New(slog.NewTextHandler(&log, nil))
			s.Path, s.Format, s.Cache, s.ReadOnly = image(t, 0), tt.format, tt.cache, tt.readOnly
			p := []byte(tt.begins)
			if len(p) == 4 {
				p = append(p, make([]byte, 65532)...)
			}
			if err := os.WriteFile(s.Path, p, 0o600); err != nil {
				t.Fatal(err)
			}
			table, err := open.Gather(t.Context(), s)
			if err != nil {
				t.Fatalf("gather: %v, want what Open has to say", err)
			}
			s.Table = table
			defer table.Close()
			d, err := open.Open(t.Context(), s)
			if tt.refused {
				if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), "--format=raw if it really is raw") {
					t.Errorf("open: got %v, want a refusal that says what to write", err)
				}
				return
			}
			if err != nil {
				t.Fatalf("open: %v", err)
			}
			got := make([]byte, len(p))
			if err := errors.Join(d.ReadAt(t.Context(), got, 0), d.Close()); err != nil || !bytes.Equal(got, p) {
				t.Errorf("read: %v, or other bytes than those of the file", err)
			}
			if warned := strings.Contains(log.String(), "begins as a qcow2 image"); warned != tt.warns {
				t.Errorf("log: %q, want a warning: %v", log.String(), tt.warns)
			}
		})
	}
}

func TestReadOnlyDiskTakesNoWritesAndSharesItsImage(t *testing.T) {
	path := image(t, 4096)
	s, _ := newSpec(t)
	s.Format, s.Path, s.ReadOnly = "raw", path, true
	d := mustOpen(t, s)
	if d.Info().Caps.Has(backing.CanWrite) {
		t.Error("caps: read-only disk can write")
	}
	if err := d.WriteAt(t.Context(), []byte{1}, 0, 0); !errors.Is(err, backing.ErrReadOnly) {
		t.Errorf("write: got %v, want %v", err, backing.ErrReadOnly)
	}
	s.Lock = raw.LockOn
	mustOpen(t, s) // a second reader
}

func TestOpenLeavesNoDescriptorBehind(t *testing.T) {
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	path := image(t, 4096)
	s, _ := newSpec(t)
	s.Format, s.Path = "raw", path
	mustOpen(t, s)
	before := count()
	for range 5 {
		if _, err := open.Open(t.Context(), s); !errors.Is(err, backing.ErrLocked) {
			t.Fatalf("second open: got %v, want %v", err, backing.ErrLocked)
		}
	}
	if got := count(); got != before {
		t.Errorf("descriptors after failed opens: got %d, want %d", got, before)
	}
}

func TestOpenOfOneWhoGaveUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open.Open(ctx, open.Spec{Format: "mem", Path: "1M"}); !errors.Is(err, context.Canceled) {
		t.Errorf("open: got %v, want %v", err, context.Canceled)
	}
}

func TestUnsafeCacheNeverPoisons(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			s, e := newSpec(t)
			s.Path, s.Format, s.Cache = image(t, 1<<20), format, open.CacheUnsafe
			if format == "qcow2" {
				qemu(t, "", "qemu-img", "create", "-q", "-f", "qcow2", s.Path, "1M")
			}
			d := mustOpen(t, s)
			e.Inject(backingtest.Rule{Times: -1, Match: backingtest.Ops(engine.OpSync), Fault: backingtest.Fault{Errno: unix.EIO}})
			for _, err := range []error{
				d.WriteAt(t.Context(), []byte{1}, 0, backing.FUA), d.Flush(t.Context()), d.Trim(t.Context(), 0, 8192, backing.FUA),
			} {
				if err != nil {
					t.Errorf("got %v, want none", err)
				}
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "512b": 512, "1K": 1 << 10, "1k": 1 << 10, "64M": 64 << 20, "1G": 1 << 30,
		"2t": 2 << 40, "9223372036854775807": 1<<63 - 1, "8388607T": 8388607 << 40,
	} {
		if got, err := open.ParseSize(in); err != nil || got != want {
			t.Errorf("size %q: got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "K", "-1", "+1", "1.5G", "1 G", "1GB", "1KK", "0x10", "G1", "1P", "8388608T",
		"9223372036854775808", "99999999999999999999", "1e3", "١"} {
		if got, err := open.ParseSize(in); err == nil {
			t.Errorf("size %q: got %d, want an error", in, got)
		} else if !strings.Contains(err.Error(), in) {
			t.Errorf("size %q: error %q does not quote it", in, err)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	f.Add("1G")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := open.ParseSize(s); err == nil && n < 0 {
			t.Errorf("size %q: got %d", s, n)
		}
	})
}

func TestFilesOfTheKernelAreNoImages(t *testing.T) {
	for path, kind := range map[string]string{"/proc/self/mem": "proc", "/proc/self/status": "proc", "/sys/kernel/notes": "sysfs"} {
		_, err := open.Open(t.Context(), open.Spec{Path: path, Format: "raw", ReadOnly: true})
		if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), "a file of "+kind) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

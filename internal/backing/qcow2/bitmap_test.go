package qcow2_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// bitmapped is an image with an enabled bitmap "on" and a disabled one "off".
func bitmapped(t *testing.T) *storetest.Mem {
	t.Helper()
	path := filepath.Join(t.TempDir(), "t")
	if err := os.WriteFile(path, made(t, "cluster_size=64k", "64M", "write -q -P 17 0 1M"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--add", "-g", "64k", path, "on"}, {"--add", "--disable", path, "off"}} {
		qemu(t, filepath.Dir(path), "qemu-img", append([]string{"bitmap"}, args...)...)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return storetest.New(b)
}

func openQuiet(t *testing.T, st *storetest.Mem, readOnly bool) backing.Device {
	t.Helper()
	d, err := qcow2.Open(t.Context(), st, qcow2.Options{ReadOnly: readOnly, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// statuses describes the whole disk.
func statuses(t *testing.T, d backing.Device, name string) (list []backing.Status) {
	t.Helper()
	err := d.(backing.Describer).Describe(t.Context(), name, 0, d.Info().Size, 0, func(s backing.Status) bool {
		list = append(list, s)
		return true
	})
	if err != nil {
		t.Fatalf("describe %s: %v", name, err)
	}
	return list
}

// TestBitmapsFollowWrites: of all ways to change the disk.
func TestBitmapsFollowWrites(t *testing.T) {
	st := bitmapped(t)
	d := openQuiet(t, st, false)
	const on, off, depth = "qemu:dirty-bitmap:on", "qemu:dirty-bitmap:off", "qemu:allocation-depth"
	if got := d.(backing.Describer).Descriptions(); !slices.Equal(got, []string{depth, off}) {
		t.Errorf("descriptions of a writable disk: got %q, want %q", got, []string{depth, off})
	}
	var m backing.Mapping
	if err := d.Map(engine.OpWrite, 0, 512, &m); err != backing.ErrNotMappable {
		t.Errorf("map of the first write: got %v, want %v", err, backing.ErrNotMappable)
	}
	p := make([]byte, 512)
	for name, err := range map[string]error{
		"write": d.WriteAt(t.Context(), p, 65536, 0),
		"new":   d.WriteAt(t.Context(), p, 10<<20, 0),
		"zero":  d.Zero(t.Context(), 20<<20, 65536, 0),
		"trim":  d.Trim(t.Context(), 512<<10, 65536, 0),
	} {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	before := openQuiet(t, storetest.New(st.Contents()), true) // as a crash leaves it
	if got := before.(backing.Describer).Descriptions(); !slices.Equal(got, []string{depth, off}) {
		t.Errorf("descriptions after a crash: got %q, want %q", got, []string{depth, off})
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	st.Reopen()
	wantSound(t, st, 0)
	qemuCheck(t, st.Contents())
	d = openQuiet(t, st, true)
	const u = 65536
	want := []backing.Status{
		{Len: u}, {Len: u, Value: 1}, {Len: 6 * u}, {Len: u, Value: 1}, {Len: 151 * u}, {Len: u, Value: 1},
		{Len: 159 * u}, {Len: u, Value: 1}, {Len: 64<<20 - 321*u},
	}
	if got := statuses(t, d, on); !slices.Equal(got, want) {
		t.Errorf("bitmap: got %v, want %v", got, want)
	}
	if got := statuses(t, d, off); len(got) != 1 || got[0].Value != 0 {
		t.Errorf("disabled bitmap: got %v, want nothing dirty", got)
	}
	if got := fmt.Sprint(statuses(t, d, depth)[0]); got != fmt.Sprint(backing.Status{Len: 8 * u, Value: 1}) {
		t.Errorf("depth: got %v first, want the data before the trim", got)
	}
}

// TestFullHostAtCloseIsSaidOfTheBitmaps: the disk itself is whole, and the file
// ends where the image does.
func TestFullHostAtCloseIsSaidOfTheBitmaps(t *testing.T) {
	st := bitmapped(t)
	d := openQuiet(t, st, false)
	if err := errors.Join(d.WriteAt(t.Context(), make([]byte, 512), 40<<20, 0), d.Flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	st.FailOp(storetest.Write, 1, syscall.ENOSPC)
	err := d.Close()
	if !errors.Is(err, backing.ErrNoSpace) || !strings.Contains(fmt.Sprint(err), "store bitmaps") {
		t.Errorf("close on a full host: got %v, want %v of bitmaps", err, backing.ErrNoSpace)
	}
	st.Reopen()
	wantSound(t, st, 0)
	h, err := qcow2.ReadHeader(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	r, err := check.Run(t.Context(), st, h, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if size, err := st.Size(); err != nil || size != r.ImageEnd {
		t.Errorf("the file has %d bytes (%v), the image %d", size, err, r.ImageEnd)
	}
}

// TestMappedWritesMark: a write that the engine does is marked too.
func TestMappedWritesMark(t *testing.T) {
	st := bitmapped(t)
	path := filepath.Join(t.TempDir(), "t")
	if err := os.WriteFile(path, st.Contents(), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := qcow2.Open(t.Context(), writableFile(t, path), qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 512), 0, 0); err != nil { // begins
		t.Fatal(err)
	}
	var m backing.Mapping
	if err := d.Map(engine.OpWrite, 128<<10, 4096, &m); err != nil {
		t.Fatal(err)
	}
	m.Release()
	if err := d.Map(engine.OpRead, 128<<10, 4096, &m); err != nil || !m.Reused {
		t.Errorf("map of a cluster that may be freed: error %v, reused %t", err, m.Reused)
	}
	m.Release()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := statuses(t, openQuiet(t, storetest.New(b), true), "qemu:dirty-bitmap:on")
	want := []backing.Status{{Len: 65536, Value: 1}, {Len: 65536}, {Len: 65536, Value: 1}, {Len: 64<<20 - 3*65536}}
	if !slices.Equal(got, want) {
		t.Errorf("bitmap: got %v, want %v", got, want)
	}
}

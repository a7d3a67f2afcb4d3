package qcow2_test

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// diskCases are kinds of images that a disk is tried on.
var diskCases = map[string]struct {
	o     create.Options
	below int64 // bytes of zeroes in a backing file, 0 for none
}{
	"default":       {},
	"small":         {o: create.Options{ClusterSize: 512}},
	"v2":            {o: create.Options{ClusterSize: 4096, Version: 2}},
	"v2 overlay":    {o: create.Options{ClusterSize: 4096, Version: 2}, below: 300 << 10},
	"overlay":       {o: create.Options{ClusterSize: 4096}, below: 700 << 10},
	"subclusters":   {o: create.Options{ClusterSize: 16 << 10, ExtendedL2: true}},
	"sub overlay":   {o: create.Options{ClusterSize: 64 << 10, ExtendedL2: true}, below: 500 << 10},
	"refcount 1":    {o: create.Options{ClusterSize: 512, RefcountBits: 1}},
	"refcount 64":   {o: create.Options{ClusterSize: 512, RefcountBits: 64}},
	"large":         {o: create.Options{ClusterSize: 2 << 20}},
	"data file":     {o: create.Options{ClusterSize: 4096, DataFile: "data"}},
	"raw data file": {o: create.Options{ClusterSize: 4096, DataFile: "data", DataFileRaw: true}},
}

// heldDisk is an open disk with the files that it is in.
type heldDisk struct {
	backing.Device
	image, data, below *storetest.Mem
}

func (h *heldDisk) open(t testing.TB) {
	t.Helper()
	o := qcow2.Options{Path: "image", Log: slog.New(slog.DiscardHandler)}
	if h.data != nil {
		o.DataFile = h.data
	}
	if h.below != nil {
		l, err := qcow2.NewRawLayer(h.below)
		if err != nil {
			t.Fatal(err)
		}
		o.Backing = l
	}
	d, err := qcow2.Open(t.Context(), h.image, o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	h.Device = backing.NewEmulate(d)
}

// shut closes the disk and judges what it has left.
func (h *heldDisk) shut(t testing.TB) {
	t.Helper()
	if err := h.Device.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	h.image.Reopen()
	for _, m := range []*storetest.Mem{h.data, h.below} {
		if m != nil {
			m.Reopen()
		}
	}
	wantSound(t, h.image, 0)
	if h.data == nil && h.below == nil {
		qemuCheck(t, h.image.Contents())
	}
}

// wantSound checks an image that no disk has open.
func wantSound(t testing.TB, st store.Store, leaks int64) {
	t.Helper()
	h, err := qcow2.ReadHeader(context.Background(), st)
	if err != nil {
		t.Fatalf("header: %v", err)
	}
	r, err := check.Run(context.Background(), st, h, check.Options{})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if r.Corruptions > 0 || r.Errors > 0 || r.Leaks > leaks {
		t.Errorf("check: got %d corruptions, %d errors, %d leaks, want none: %v", r.Corruptions, r.Errors, r.Leaks, r.Problems)
	}
}

func TestDiskConforms(t *testing.T) {
	for _, name := range kinds(slices.Collect(maps.Keys(diskCases))) {
		tt := diskCases[name]
		t.Run(name, func(t *testing.T) {
			backingtest.Run(t, backingtest.Maker{
				Granule: 512,
				New: func(t testing.TB, size int64) backing.Device {
					o := tt.o
					o.Size = size
					h := &heldDisk{image: storetest.New(nil)}
					if o.DataFile != "" {
						h.data = storetest.New(nil)
						o.Data = h.data
					}
					if tt.below > 0 {
						h.below = storetest.New(make([]byte, tt.below))
						o.Backing, o.BackingFormat = "below", "raw"
					}
					if err := create.Image(t.Context(), h.image, o); err != nil {
						t.Fatal(err)
					}
					h.open(t)
					t.Cleanup(func() { h.shut(t) })
					return h
				},
				Reopen: func(t testing.TB, d backing.Device) backing.Device {
					h := d.(*heldDisk)
					h.shut(t)
					h.open(t)
					return h
				},
			})
		})
	}
}

// qemuCheck has qemu-img judge an image.
func qemuCheck(t testing.TB, image []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
}

// writableFile is a store on a real file.
func writableFile(t testing.TB, path string) store.Store {
	t.Helper()
	e := engine.NewPool(2)
	t.Cleanup(func() { _ = e.Close() })
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(f, e, raw.Options{Path: path, Container: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return store.NewFile(d)
}

// TestPreallocatedClustersAreZeroes: as QEMU has it, for readers and writers.
func TestPreallocatedClustersAreZeroes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, made(t, "preallocation=metadata", "8M", "write -q -P 17 1M 64k"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A file without holes has none to show.
	punch(t, path)
	for _, readOnly := range []bool{true, false} {
		d, err := qcow2.Open(t.Context(), writableFile(t, path), qcow2.Options{ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		var got []backing.Extent
		err = d.Extents(t.Context(), 0, 8<<20, 0, func(e backing.Extent) bool {
			got = append(got, e)
			return true
		})
		want := []backing.Extent{{Len: 1 << 20, Zero: true}, {Len: 64 << 10}, {Len: 7<<20 - 64<<10, Zero: true}}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("read-only %v: got %v, %v, want %v", readOnly, got, err, want)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// punch makes holes of what reads as zeroes in a file.
func punch(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("fallocate", "--dig-holes", path).CombinedOutput(); err != nil {
		t.Fatalf("fallocate: %v: %s", err, out)
	}
}

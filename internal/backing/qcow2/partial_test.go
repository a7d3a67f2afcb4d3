package qcow2_test

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// countedStore counts how often the file is read: by Extents and Describe,
// once for each table.
type countedStore struct {
	store.Store
	reads *atomic.Int64
}

func (s countedStore) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	s.reads.Add(1)
	return s.Store.ReadAt(ctx, p, off)
}

// allocatedImage has 12 GiB of clusters that are all allocated, with data,
// zeroes and holes of the file, and an image of 14 GiB above it that has
// nothing but a few bytes.
func allocatedImage(t *testing.T) (base, top string) {
	t.Helper()
	dir := t.TempDir()
	base, top = filepath.Join(dir, "base"), filepath.Join(dir, "top")
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", base, "12G")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 1M 64k", "-c", "write -q -P 2 5000M 1M",
		"-c", "write -q -z -u 6000M 100M", "-c", "write -q -P 3 12287M 1M", base)
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "14G")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -q -P 4 5G 64k", "-c", "write -q -P 5 13G 64k", top)
	return base, top
}

// TestPartialAnswersReadABoundedNumberOfTables: whoever asks for a whole disk
// and goes on where the answer ended sees what QEMU sees of it.
func TestPartialAnswersReadABoundedNumberOfTables(t *testing.T) {
	base, top := allocatedImage(t)
	for name, tt := range map[string]struct {
		path     string
		readOnly bool
	}{
		"one image, for reading": {base, true},
		"one image, for writing": {base, false},
		"chain, for reading":     {top, true},
		"chain, for writing":     {top, false},
	} {
		t.Run(name, func(t *testing.T) {
			want := qemuMap(t, tt.path)
			var reads atomic.Int64
			o := quiet()
			o.ReadOnly = tt.readOnly
			if tt.path == top {
				below, err := qcow2.OpenImage(t.Context(), countedStore{writableFile(t, base), &reads}, quiet())
				if err != nil {
					t.Fatal(err)
				}
				o.Backing = below
			}
			d, err := qcow2.Open(t.Context(), countedStore{writableFile(t, tt.path), &reads}, o)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			size := d.Info().Size
			got := piecewise(t, size, &reads, func(off int64, yield func(backing.Status) bool) error {
				return d.Extents(t.Context(), off, size-off, backing.Partial, func(e backing.Extent) bool {
					return yield(statusOf(e.Len, e.Hole, e.Zero))
				})
			})
			if !slices.Equal(got, want) {
				t.Errorf("extents: got %v, want %v", got, want)
			}
			got = piecewise(t, size, &reads, func(off int64, yield func(backing.Status) bool) error {
				return d.(backing.Describer).Describe(t.Context(), "qemu:allocation-depth", off, size-off, backing.Partial, yield)
			})
			if want := joined(depths(t, d, 0, size)); !slices.Equal(got, want) {
				t.Errorf("depths: got %v, want %v", got, want)
			}
		})
	}
}

// piecewise are the statuses of a whole disk, of which ask tells the next.
func piecewise(t *testing.T, size int64, reads *atomic.Int64, ask func(off int64, yield func(backing.Status) bool) error) []backing.Status {
	t.Helper()
	// Each image of a chain may read one more, to see that it is enough.
	const most = 2 * (limits.StatusTables + 1)
	var all []backing.Status
	for off := int64(0); off < size; {
		from, before := off, reads.Load()
		err := ask(off, func(s backing.Status) bool {
			all = append(all, s)
			off += s.Len
			return true
		})
		if err != nil || off == from || off > size {
			t.Fatalf("asked for %d+%d: got an answer of %d bytes, %v", from, size-from, off-from, err)
		}
		if n := reads.Load() - before; n > most {
			t.Errorf("asked for %d+%d: %d tables read, want at most %d", from, size-from, n, most)
		}
	}
	return joined(all)
}

// joined puts equal neighbours together.
func joined(list []backing.Status) (all []backing.Status) {
	for _, s := range list {
		if k := len(all) - 1; k >= 0 && all[k].Value == s.Value {
			all[k].Len += s.Len
		} else {
			all = append(all, s)
		}
	}
	return all
}

// statusOf is an extent in base:allocation's flags.
func statusOf(n int64, hole, zero bool) backing.Status {
	s := backing.Status{Len: n}
	if hole {
		s.Value |= 1
	}
	if zero {
		s.Value |= 2
	}
	return s
}

// qemuMap is what `qemu-img map` says of an image.
func qemuMap(t *testing.T, path string) (all []backing.Status) {
	t.Helper()
	var list []mapped
	out := qemu(t, filepath.Dir(path), "qemu-img", "map", "-f", "qcow2", "--output=json", path)
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		all = append(all, statusOf(e.Length, !e.Data, e.Zero))
	}
	return joined(all)
}

package qcow2_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/layertest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

const tera = 1 << 40

// hugeDisk has 10 TiB with data in four clusters.
func hugeDisk(t *testing.T) (backing.Device, *storetest.Mem) {
	t.Helper()
	b := made(t, "cluster_size=64k", "10T", "write -P 1 0 64k", "write -P 2 3T 64k", "write -P 3 5T 64k", "write -P 4 10995116212224 64k")
	st := storetest.New(b)
	o := quiet()
	o.ReadOnly = true
	d, err := qcow2.Open(t.Context(), st, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, st
}

func TestReadsOfAHugeSparseDiskNeedFewPages(t *testing.T) {
	d, st := hugeDisk(t)
	for i := range byte(4) {
		off := []int64{0, 3 * tera, 5 * tera, 10*tera - 64<<10}[i]
		mustMatch(t, d, off, bytes.Repeat([]byte{i + 1}, 64<<10))
	}
	before := st.Calls()
	r := random(t)
	zeroes := make([]byte, 4096)
	for range 5000 {
		// Not where there are L2 tables, of 512 MiB each.
		off := []int64{0, 3 * tera, 5 * tera}[r.IntN(3)] + 1<<29
		mustMatch(t, d, off+r.Int64N(2*tera-1<<30), zeroes)
	}
	if got := st.Calls() - before; got != 0 {
		t.Errorf("5000 reads of holes asked the file %d times, want not once", got)
	}
	if got := stats(d); got.Pages > 8 || got.Hits < 5000-8 {
		t.Errorf("map: %d pages and %d hits, want at most 8 and 4992 or more", got.Pages, got.Hits)
	}
}

func TestExtentsOfAHugeSparseDiskAreFoundWithFewReads(t *testing.T) {
	d, st := hugeDisk(t)
	before := st.Calls()
	var got []backing.Extent
	for off := int64(0); off < 10*tera; {
		for _, e := range extents(t, d, off, 10*tera-off) {
			off += e.Len
			if k := len(got) - 1; k >= 0 && got[k].Hole == e.Hole && got[k].Zero == e.Zero {
				got[k].Len += e.Len
				continue
			}
			got = append(got, e)
		}
	}
	data, hole := backing.Extent{Len: 64 << 10}, backing.Extent{Hole: true, Zero: true}
	want := []backing.Extent{data, hole, data, hole, data, hole, data}
	want[1].Len, want[3].Len, want[5].Len = 3*tera-64<<10, 2*tera-64<<10, 5*tera-128<<10
	if !slices.Equal(got, want) {
		t.Errorf("extents: got %v, want %v", got, want)
	}
	// The pages of the four L2 tables that there are, of 512 MiB each, and
	// whether the data are holes of the file.
	if got := st.Calls() - before; got > 4*18 {
		t.Errorf("the file was asked %d times", got)
	}
}

// opaque is a layer that does not tell its holes without I/O.
type opaque struct{ qcow2.Layer }

func (o opaque) Below() qcow2.Layer {
	if b := o.Layer.Below(); b != nil {
		return opaque{b}
	}
	return nil
}

// hollowChain makes three images of different sizes and clusters, mostly
// holes, above one that does not know its own.
func hollowChain(t *testing.T) qcow2.Layer {
	t.Helper()
	r := random(t)
	var top qcow2.Layer = layertest.New(nil,
		qcow2.Span{Kind: qcow2.Absent, Len: 40 << 20}, qcow2.Span{Kind: qcow2.Zero, Len: 300 << 20},
		qcow2.Span{Kind: qcow2.Data, Len: 4096, Store: memory(bytes.Repeat([]byte{9}, 4096))})
	for i, l := range []struct {
		options string
		size    int64
	}{{"cluster_size=4k", 3 << 30}, {"cluster_size=512", 2<<30 + 512}, {"cluster_size=16k,extended_l2=on", 4<<30 + 4096}} {
		var commands []string
		for j := range 6 {
			commands = append(commands, fmt.Sprintf("write -P %d %d 5k", 16*i+j+1, r.Int64N(l.size-8192)&^511))
		}
		o := quiet()
		st := storetest.New(made(t, l.options, fmt.Sprint(l.size), commands...))
		o.Backing = top
		m, err := qcow2.OpenImage(t.Context(), st, o)
		if err != nil {
			t.Fatal(err)
		}
		top = m
	}
	return top
}

// TestHolesAreWhatTheLayersSay compares a map that knows holes with one that
// asks the layers for every page.
func TestHolesAreWhatTheLayersSay(t *testing.T) {
	top := hollowChain(t)
	d := newDevice(t, top, qcow2.Options{})
	plain := qcow2.NewChainDevice(opaque{top}, qcow2.Options{})
	size := top.Size()
	r := random(t)
	for i := range 300 {
		off := r.Int64N(size)
		n := 1 + r.Int64N(min(size-off, []int64{100 << 10, 100 << 20, size}[i%3]))
		if got, want := extents(t, d, off, n), extents(t, plain, off, n); !slices.Equal(got, want) {
			t.Fatalf("extents at %d+%d: got %v, want %v", off, n, got, want)
		}
		if got, want := depths(t, d, off, n), depths(t, plain, off, n); !slices.Equal(got, want) {
			t.Fatalf("depths at %d+%d: got %v, want %v", off, n, got, want)
		}
		n = min(n, 64<<10)
		mustMatch(t, d, off, mustRead(t, plain, off, n))
	}
	if got, most := stats(d).Pages, stats(plain).Pages; got >= most {
		t.Errorf("map: %d pages with holes, %d without", got, most)
	}
}

func depths(t *testing.T, d backing.Device, off, n int64) (list []backing.Status) {
	t.Helper()
	err := d.(backing.Describer).Describe(t.Context(), "qemu:allocation-depth", off, n, 0, func(s backing.Status) bool {
		list = append(list, s)
		return true
	})
	if err != nil {
		t.Fatalf("depths at %d+%d: %v", off, n, err)
	}
	return list
}

// TestHolesStayWithinTheirBound has more holes than a small map can keep.
func TestHolesStayWithinTheirBound(t *testing.T) {
	var commands []string
	for i := range 64 {
		commands = append(commands, fmt.Sprintf("write -P 5 %dM 4k", 64*i))
	}
	const bound = 17 * 2000 // six holes
	o := quiet()
	o.CacheBytes = bound
	d := newDevice(t, open(t, made(t, "cluster_size=4k", "4G", commands...), o), o)
	zeroes := make([]byte, 4096)
	for range 2 {
		for i := range int64(64) {
			mustMatch(t, d, i<<26, bytes.Repeat([]byte{5}, 4096))
			mustMatch(t, d, i<<26+40<<20, zeroes)
			if got := stats(d).Bytes; got > bound {
				t.Fatalf("map: got %d bytes, want at most %d", got, bound)
			}
		}
	}
}

package mem_test

import (
	"bytes"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func closing(t testing.TB, d backing.Device) backing.Device {
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

func TestDiskConforms(t *testing.T) {
	backingtest.Run(t, backingtest.Maker{New: func(t testing.TB, size int64) backing.Device {
		return closing(t, mem.New(size, nil))
	}})
}

func TestNullConforms(t *testing.T) {
	backingtest.Run(t, backingtest.Maker{Forgets: true, New: func(t testing.TB, size int64) backing.Device {
		return closing(t, mem.Null(size))
	}})
}

func TestDiskBeginsWithInitialContents(t *testing.T) {
	initial := bytes.Repeat([]byte("0123456789"), 10000)
	for _, size := range []int64{10, 100000, 300000} {
		d := mem.New(size, initial)
		want := make([]byte, size)
		copy(want, initial)
		got := make([]byte, size)
		if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read of a disk of %d bytes: got %.20q…, %v, want the initial contents", size, got, err)
		}
	}
	clear(initial)
	d := mem.New(10, []byte("0123456789"))
	got := make([]byte, 10)
	if err := d.ReadAt(t.Context(), got, 0); err != nil || string(got) != "0123456789" {
		t.Errorf("read: got %q, %v", got, err)
	}
}

func extents(t *testing.T, d backing.Device, off, n int64) (list []backing.Extent) {
	t.Helper()
	err := d.Extents(t.Context(), off, n, 0, func(x backing.Extent) bool {
		list = append(list, x)
		return true
	})
	if err != nil {
		t.Fatalf("extents at %d+%d: %v", off, n, err)
	}
	return list
}

func TestHugeDiskCostsWhatIsWritten(t *testing.T) {
	const size, page = 1 << 60, 32 << 10
	d := mem.New(size, nil)
	for _, off := range []int64{0, size/2 - 1, size - 1} {
		if err := d.WriteAt(t.Context(), []byte{1}, off, 0); err != nil {
			t.Fatalf("write at %d: %v", off, err)
		}
	}
	got := extents(t, d, 0, size)
	data, hole := func(n int64) backing.Extent { return backing.Extent{Len: n} },
		func(n int64) backing.Extent { return backing.Extent{Len: n, Hole: true, Zero: true} }
	want := []backing.Extent{data(page), hole(size/2 - 2*page), data(page), hole(size/2 - page), data(page)}
	if len(got) != len(want) {
		t.Fatalf("extents: got %+v, want %+v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("extent %d: got %+v, want %+v", i, got[i], want[i])
		}
	}
	if err := d.Zero(t.Context(), 0, size, backing.FastZero); err != nil {
		t.Fatalf("zero of the whole disk: %v", err)
	}
	if got := extents(t, d, 0, size); len(got) != 1 || got[0] != hole(size) {
		t.Errorf("extents after zero: got %+v, want one hole", got)
	}
}

func TestZeroWithNoHoleAllocates(t *testing.T) {
	d := mem.New(1<<20, nil)
	if err := d.Zero(t.Context(), 100, 200000, backing.NoHole); err != nil {
		t.Fatalf("zero: %v", err)
	}
	if got := extents(t, d, 100, 200000); len(got) != 1 || got[0].Hole || got[0].Zero {
		t.Errorf("extents: got %+v, want one run of data", got)
	}
}

func TestTrimFreesWholePagesOnly(t *testing.T) {
	const page = 32 << 10
	d := mem.New(4*page, bytes.Repeat([]byte{7}, 4*page))
	if err := d.Trim(t.Context(), 1, 3*page, 0); err != nil {
		t.Fatalf("trim: %v", err)
	}
	got := extents(t, d, 0, 4*page)
	want := []backing.Extent{{Len: page}, {Len: 2 * page, Hole: true, Zero: true}, {Len: page}}
	if len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("extents: got %+v, want %+v", got, want)
	}
}

func TestNullReadMapsToZeroes(t *testing.T) {
	d := mem.Null(1 << 40)
	var m backing.Mapping
	if err := d.Map(engine.OpRead, 4096, 1<<20, &m); err != nil || m.N != 1 || m.Runs[0] != (backing.Run{Len: 1 << 20}) {
		t.Errorf("map: got %+v, %v, want one run without a file", m, err)
	}
	if n := testing.AllocsPerRun(100, func() { _ = d.Map(engine.OpRead, 0, 4096, &m) }); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

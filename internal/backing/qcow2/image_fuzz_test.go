package qcow2_test

import (
	"context"
	"encoding/binary"
	"runtime"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// tiny builds an image with clusters of 512 bytes by hand: refcount table at
// 512, L1 table at 1536, L2 tables from 2048 on.
func tiny(version, size, l1Size uint64, l1, l2 []uint64) []byte {
	b := make([]byte, 8192)
	put := func(off int, v uint64) { binary.BigEndian.PutUint64(b[off:], v) }
	put(0, format.Magic<<32|version)
	put(16, 9) // no backing name, cluster bits
	put(24, size)
	put(32, l1Size) // no encryption, L1 size
	put(40, 1536)
	put(48, 512)
	put(56, 1<<32)
	if version == 3 {
		put(96, 4<<32|104)
	}
	put(512, 1024)
	for i, e := range l1 {
		put(1536+8*i, e)
	}
	for i, e := range l2 {
		put(2048+8*i, e)
	}
	return b
}

// fuzzMemory is what one image may keep: the L1 table and as much for the places
// of the L2 tables. Opening it passes through as much again.
const fuzzMemory = 64 << 20

// FuzzImage opens any bytes, followed by a hole, and asks for the spans of all
// of the disk that the mapping has tables for.
func FuzzImage(f *testing.F) {
	f.Add(tiny(3, 1<<20, 32, []uint64{2048, 2560}, []uint64{3072, 1, 4096 | 1<<63, 0, 3072 | 1}), int64(0), "")
	f.Add(tiny(2, 64<<10, 2, []uint64{1<<63 | 2048, 1536}, []uint64{1<<62 | 5000, 1<<62 | 3<<61 | 8000}), int64(0), "")
	f.Add(tiny(3, 100<<10, 4, []uint64{512, 1 << 40, 1 << 62, 2048}, []uint64{^uint64(0), 1 << 55, 512, 8192, 8704}), int64(0), "")
	snap := tiny(3, 32<<10, 1, []uint64{2048}, []uint64{3072})
	binary.BigEndian.PutUint64(snap[60:], 1<<32)
	binary.BigEndian.PutUint32(snap[68:], 4096)
	binary.BigEndian.PutUint64(snap[4096:], 1536)
	binary.BigEndian.PutUint64(snap[4104:], 1<<32|1<<16|1)
	copy(snap[4136:], "1s")
	f.Add(snap, int64(1<<40), "s")
	f.Fuzz(func(t *testing.T, b []byte, hole int64, snapshot string) {
		st := storetest.New(b)
		st.Cut(int64(len(b)) + max(0, min(hole, 1<<50)))
		o := snapshotOf(snapshot)
		o.Backing, _ = qcow2.NewRawLayer(storetest.New(nil))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		m, err := qcow2.OpenImage(context.Background(), st, o)
		if err == nil {
			walkAll(t, m, st)
			_ = m.Close()
		}
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > 3*fuzzMemory {
			t.Errorf("%d bytes allocated", got)
		}
	})
}

// TestHugeTablesTakeBoundedMemory opens an image whose L1 table is as large as
// may be, and names L2 tables all over a sparse file of 64 TiB.
func TestHugeTablesTakeBoundedMemory(t *testing.T) {
	const entries = format.MaxL1 / 8
	b := tiny(3, entries*32<<10, entries, nil, nil)
	binary.BigEndian.PutUint64(b[40:], 1<<20)
	st := storetest.New(b)
	l1 := make([]byte, format.MaxL1)
	for i := range entries {
		binary.BigEndian.PutUint64(l1[8*i:], uint64(1<<30+(i*7919%entries)<<24))
	}
	st.Patch(1<<20, l1)
	st.Cut(1 << 47)
	l1 = nil
	used := func() uint64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	before := used()
	m, err := qcow2.OpenImage(context.Background(), st, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if got := int64(used() - before); got > fuzzMemory+1<<20 {
		t.Errorf("%d bytes taken, want at most %d", got, fuzzMemory)
	}
	if s := at(t, m, m.Size()-1); s.Kind != qcow2.Absent {
		t.Errorf("span %+v, want absent", s)
	}
}

// walkAll checks the spans of the first and last part of m.
func walkAll(t *testing.T, m *qcow2.Image, st *storetest.Mem) {
	size, _ := st.Size()
	const part = 1 << 20
	for _, off := range []int64{0, max(0, m.Size()-part)} {
		n := min(part, m.Size()-off)
		var sum int64
		err := m.Spans(context.Background(), off, n, func(s qcow2.Span) bool {
			sum += s.Len
			switch {
			case s.Len <= 0 || (s.Err != nil) != (s.Kind == qcow2.Damaged):
				t.Fatalf("span %+v", s)
			case s.Kind == qcow2.Data && (s.Off < 512 || s.Off > size-s.Len):
				t.Fatalf("data span %+v in a file of %d bytes", s, size)
			case s.Kind == qcow2.Compressed && (s.Off < 512 || s.InLen <= 0 || s.Off > size-s.InLen ||
				s.Skip < 0 || s.Skip+s.Len > s.Cluster || s.InLen > 2*s.Cluster):
				t.Fatalf("compressed span %+v in a file of %d bytes", s, size)
			}
			return true
		})
		if err != nil || sum != n {
			t.Fatalf("Spans(%d, %d) has %d bytes, %v", off, n, sum, err)
		}
	}
}

package bitmaps_test

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// tiny is an image by hand: its header, an empty L1 table, a directory with
// two bitmaps, a table for both, and a cluster of bits.
func tiny(t testing.TB) []byte {
	const cluster = 512
	h := format.Header{Version: 3, ClusterBits: 9, Size: 4 << 20, L1Size: 128, L1Offset: 7 * cluster,
		RefTableOffset: cluster, RefTableClusters: 1, RefcountOrder: 4, Length: 104, Autoclear: format.AutoclearBitmaps}
	list := []format.Bitmap{
		{Name: "one", TableOffset: 4 * cluster, TableEntries: 2, GranularityBits: 9, Auto: true},
		{Name: "two", TableOffset: 5 * cluster, TableEntries: 1, GranularityBits: 10, Extra: []byte("extra"), ExtraCompatible: true},
		{Name: "three", TableOffset: 5 * cluster, TableEntries: 1, GranularityBits: 31, InUse: true},
	}
	dir, err := format.EncodeBitmaps(list)
	if err != nil {
		t.Fatal(err)
	}
	h.Bitmaps = &format.BitmapsExtension{Count: uint32(len(list)), DirSize: uint64(len(dir)), DirOffset: 3 * cluster}
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, make([]byte, 16*cluster)...)
	copy(b[3*cluster:], dir)
	binary.BigEndian.PutUint64(b[4*cluster:], 6*cluster)
	binary.BigEndian.PutUint64(b[4*cluster+8:], 1)
	binary.BigEndian.PutUint64(b[5*cluster:], 6*cluster)
	for i := range 100 {
		b[6*cluster+i*5] = byte(i)
	}
	return b
}

// FuzzLoad loads the bitmaps of any image, followed by a hole; size is that of
// the disk if it is not negative. What was loaded answers for all of the disk.
func FuzzLoad(f *testing.F) {
	const memory = 8 << 20
	b := tiny(f)
	f.Add(b, int64(0), int64(-1))
	f.Add(b, int64(1<<40), int64(4<<20-512))
	f.Add(b[:6*512+100], int64(0), int64(-1))
	f.Fuzz(func(t *testing.T, b []byte, hole, size int64) {
		h, err := format.ParseHeader(b)
		if err != nil {
			return
		}
		st := storetest.New(b)
		st.Cut(int64(len(b)) + max(0, min(hole, 1<<50)))
		if size < 0 {
			size = int64(h.Size)
		}
		s, err := bitmaps.Load(ctx, st, h, size, bitmaps.Options{Log: quiet, Limit: memory})
		if err != nil {
			if !errors.Is(err, backing.ErrInvalid) {
				t.Fatalf("load: got %v, want %v", err, backing.ErrInvalid)
			}
			return
		}
		if got := st.Bytes(storetest.Read); got > 2*memory+format.MaxBitmapDir {
			t.Fatalf("load read %d bytes", got)
		}
		for _, name := range s.Exposed(false) {
			var sum int64
			last := uint32(2)
			err := s.Describe(name, 0, size, func(x backing.Status) bool {
				if x.Len <= 0 || x.Value == last || x.Value > 1 {
					t.Fatalf("%q: range %+v after value %d", name, x, last)
				}
				sum, last = sum+x.Len, x.Value
				return true
			})
			if err != nil || sum != size {
				t.Fatalf("%q: %d bytes of %d described, %v", name, sum, size, err)
			}
		}
		if s.Tracking() {
			s.Mark(size/2, 1)
		}
	})
}

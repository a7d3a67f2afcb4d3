package check

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// at reads the big-endian number at off.
func (i image) at(off int64) int64 {
	i.Helper()
	return int64(binary.BigEndian.Uint64(i.bytes()[off:]))
}

// TestBrokenImagesAgreeWithQEMU has the images of the catalogue: header at 0,
// refcount table at 0x10000, its block at 0x20000, L1 table at 0x30000, L2
// table at 0x40000, data at 0x50000.
func TestBrokenImagesAgreeWithQEMU(t *testing.T) {
	data := func(t *testing.T) image { return create(t, "", "64M", fill) }
	empty := func(t *testing.T) image { return create(t, "", "64M") }
	snapped := func(t *testing.T) (image, int64) {
		i := data(t).snap("one")
		return i, i.at(64)
	}
	for _, tt := range []struct {
		name  string
		build func(t *testing.T) image
	}{
		{"M1", func(t *testing.T) image { return empty(t).patch(0x30000, "8000000000030000") }},
		{"M3", func(t *testing.T) image { return data(t).patch(0x30000, "c000000000040001") }},
		{"M4", func(t *testing.T) image { return data(t).patch(0x30000, "8000000000010000") }},
		{"M5", func(t *testing.T) image { return data(t).patch(0x30000, "8000001000000000") }},
		{"M6", func(t *testing.T) image { return data(t).patch(0x40000, "8000000000052a00") }},
		{"M7 refcount block", func(t *testing.T) image { return data(t).patch(0x40000, "8000000000020000") }},
		{"M7 L1", func(t *testing.T) image { return data(t).patch(0x40000, "8000000000030000") }},
		{"M7 L2", func(t *testing.T) image { return data(t).patch(0x40000, "8000000000040000") }},
		{"M8", func(t *testing.T) image { return data(t).patch(0x40000, "b0000000000500fe") }},
		{"M9", func(t *testing.T) image { return data(t).patch(0x40000, "8000001000000000") }},
		{"M10", func(t *testing.T) image { return data(t).patch(0x40000, "80ffffffffff0000") }},
		{"M12", func(t *testing.T) image {
			return data(t).io("write 64k 64k").patch(0x40008, "8000000000050000")
		}},
		{"M13", func(t *testing.T) image {
			i := create(t, "cluster_size=512", "1M", "write 0 512", "write 32k 512")
			l1 := i.at(40)
			b := i.bytes()[l1 : l1+8]
			return i.patch(l1+8, hexOf(b))
		}},
		{"M14", func(t *testing.T) image {
			i := data(t)
			if err := os.Truncate(i.path, 0x50000+40960); err != nil {
				t.Fatal(err)
			}
			return i
		}},
		{"M15", func(t *testing.T) image {
			return create(t, "cluster_size=512", "512", "write 0 512").patch(2048+8, "0080000000000000")
		}},
		{"C1", func(t *testing.T) image { return data(t).patch(0x40000, "4000001000000000") }},
		{"C2", func(t *testing.T) image { return data(t).patch(0x40000, "7fc0000000050000") }},
		{"C4", func(t *testing.T) image { return data(t).patch(0x40000, "c000000000050000") }},
		{"C5", func(t *testing.T) image { return data(t).patch(0x40000, "4000000000000000") }},
		{"R1", func(t *testing.T) image { return data(t).patch(0x10000, "0000000000000000") }},
		{"R3", func(t *testing.T) image { return data(t).patch(0x10000, "00ffffffffff0000") }},
		{"R4", func(t *testing.T) image { return data(t).patch(0x20000, "0000000000000000") }},
		{"R5", func(t *testing.T) image { return data(t).patch(0x20008, "0000") }},
		{"R6", func(t *testing.T) image { return data(t).patch(0x2000a, "0000") }},
		{"R7", func(t *testing.T) image { return data(t).patch(0x2000a, "ffff") }},
		{"R8 twice", func(t *testing.T) image { return data(t).patch(0x10008, "0000000000020000") }},
		{"R8 L2", func(t *testing.T) image { return data(t).patch(0x10008, "0000000000040000") }},
		{"R9", func(t *testing.T) image { return data(t).patch(0x10008, "00ffffff00000000") }},
		{"leak", func(t *testing.T) image { return leaky(t) }},
		{"X1", func(t *testing.T) image {
			return create(t, "extended_l2=on", "64M", fill).patch(0x40008, "0000000100000001")
		}},
		{"X2", func(t *testing.T) image {
			return create(t, "extended_l2=on", "64M", fill).patch(0x40000, "00000000000000000000000000000001")
		}},
		{"X3", func(t *testing.T) image {
			return create(t, "extended_l2=on", "64M", fill).patch(0x40007, "01")
		}},
		{"S1", func(t *testing.T) image { i, sn := snapped(t); return i.patch(sn, "0000000000400200") }},
		{"S2", func(t *testing.T) image { i, sn := snapped(t); return i.patch(sn+8, "10000000") }},
		{"S5", func(t *testing.T) image { i, sn := snapped(t); return i.patch(sn, "0000000000030000") }},
		{"snapshot without a size", func(t *testing.T) image { return sizeless(t) }},
		{"zero clusters of a data file in two places", func(t *testing.T) image {
			i := create(t, "data_file=data", "1G", "write -z 0 1M")
			return i.patch(0x30000, "00000000000400000000000000040000").patch(0x20008, "0002")
		}},
		{"V6", func(t *testing.T) image {
			i := create(t, "", "64M")
			i.run("qemu-img", "bitmap", "--add", "-g", "64k", i.path, "b0")
			return i.patch(88, "0000000000000000")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.build(t).agree(nil) })
	}
}

// sizeless is an image with a snapshot "one" whose entry has no extra data.
func sizeless(t *testing.T) image {
	i := create(t, "", "64M", fill).snap("one")
	b, off := i.bytes(), i.at(64)
	e := append(bytes.Clone(b[off:off+36]), 0, 0, 0, 0)
	e = append(e, "1one"...)
	return i.patch(off, hexOf(e)+strings.Repeat("00", 24))
}

// leaky is an image with a leaked cluster at its end.
func leaky(t *testing.T) image {
	i := create(t, "", "64M", fill).patch(0x2000c, "0001")
	if err := os.Truncate(i.path, 0x70000); err != nil {
		t.Fatal(err)
	}
	return i
}

func hexOf(b []byte) string {
	const digits = "0123456789abcdef"
	s := make([]byte, 0, 2*len(b))
	for _, c := range b {
		s = append(s, digits[c>>4], digits[c&15])
	}
	return string(s)
}

// TestDifferencesFromQEMU has the images where another answer is meant.
func TestDifferencesFromQEMU(t *testing.T) {
	data := func() image { return create(t, "", "64M", fill) }
	outside := func(options, size string) image {
		return create(t, "data_file=data"+options, size, "write -P 1 0 1M")
	}
	bitmap := func() (i image, dir, table int64) {
		i = create(t, "", "64M")
		i.run("qemu-img", "bitmap", "--add", "-g", "64k", i.path, "b0")
		h, err := format.ParseHeader(i.bytes())
		if err != nil || h.Bitmaps == nil {
			t.Fatalf("header with a bitmap: %v, bitmaps %v", err, h)
		}
		dir = int64(h.Bitmaps.DirOffset)
		return i, dir, i.at(dir)
	}
	for _, tt := range []struct {
		name, why string
		build     func() image
		want      numbers
	}{
		{"M2", "a table that is not aligned is not read: what is there is not entries",
			func() image { return data().patch(0x30000, "8000000000042a00") },
			numbers{Corruptions: 1, Total: 1024, End: 0x60000}},
		{"M11", "the zero flag in version 2 is an error when it is read, so it is one here",
			func() image { return create(t, "compat=0.10", "64M", fill).patch(0x40000, "8000000000050001") },
			numbers{Corruptions: 1, Total: 1024, Allocated: 1, End: 0x60000}},
		{"copied without cluster", "the flag speaks of a cluster that is not there",
			func() image { return data().patch(0x40008, "8000000000000000") },
			numbers{Corruptions: 1, Total: 1024, Allocated: 1, End: 0x60000}},
		{"overlap with matching refcounts", "a guest write would go into the refcounts",
			func() image {
				return data().patch(0x40000, "0000000000020000").patch(0x20004, "0002").patch(0x2000a, "0000")
			},
			numbers{Corruptions: 2, Total: 1024, Allocated: 1, End: 0x50000}},
		{"R2", "refcounts that cannot be found are 0: qemu-img counts failed reads",
			func() image { return data().patch(0x10000, "0000000000022a00") },
			numbers{Corruptions: 8, Total: 1024, Allocated: 1, End: 0x60000}},
		{"cluster elsewhere in a data file", "as M11",
			func() image { return outside("", "64M").patch(0x40078, "8000000000030000") },
			numbers{Corruptions: 1, Total: 1024, Allocated: 16, Fragmented: 1, End: 0x50000}},
		{"zero cluster elsewhere in a data file", "as M11",
			func() image { return outside("", "64M").patch(0x40078, "8000000000030001") },
			numbers{Corruptions: 1, Total: 1024, Allocated: 16, Fragmented: 1, End: 0x50000}},
		{"subclusters elsewhere in a data file", "as M11, without data too",
			func() image {
				return outside(",extended_l2=on", "64M").patch(0x400f0, "80000000000300000000000000000000")
			},
			numbers{Corruptions: 1, Total: 1024, Allocated: 16, Fragmented: 1, End: 0x50000}},
		{"first cluster elsewhere in a data file", "as M11: with the copied flag 0 is a place",
			func() image { return outside("", "64M").patch(0x40078, "8000000000000000") },
			numbers{Corruptions: 1, Total: 1024, Allocated: 16, Fragmented: 1, End: 0x50000}},
		{"clusters of a data file in two places", "as M11, whatever refcount the table has",
			func() image {
				twice := "00000000000400000000000000040000"
				return outside("", "1G").patch(0x30000, twice).patch(0x20008, "0002")
			},
			numbers{Corruptions: 16, Total: 16384, Allocated: 32, End: 0x50000}},
		{"compressed data behind the end", "as M11: there is nothing to decompress",
			func() image {
				i := create(t, "", "64M", "write -c -P 1 0 64k")
				if err := os.Truncate(i.path, 0x50000); err != nil {
					t.Fatal(err)
				}
				return i
			},
			numbers{Corruptions: 1, Total: 1024, Allocated: 1, Fragmented: 1, Compressed: 1, End: 0x60000}},
		{"S3", "the active disk can be checked without the snapshots; qemu-img does not open it",
			func() image { i := data().snap("one"); return i.patch(i.at(64)+36, "00000401") },
			numbers{Corruptions: 1, Leaks: 4, Total: 1024, Allocated: 1, End: 0x80000}},
		{"V3 type", "as S3",
			func() image { i, dir, _ := bitmap(); return i.patch(dir+16, "02") },
			numbers{Corruptions: 1, Leaks: 1, Total: 1024, End: 0x60000}},
		{"V4", "as S3",
			func() image { i, _, table := bitmap(); return i.patch(table, "0000000000000002") },
			numbers{Corruptions: 1, Total: 1024, End: 0x60000}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := tt.build()
			i.TB = t
			i.agree(&tt.want)
		})
	}
}

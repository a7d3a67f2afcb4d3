package format

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode"
)

// plainHeader is the header of a disk of 64 MiB with parts of every kind.
func plainHeader() *Header {
	return &Header{
		Version: 3, ClusterBits: 12, Size: 64 << 20, L1Size: 32, L1Offset: 3 << 12, RefTableOffset: 1 << 12,
		RefTableClusters: 1, Snapshots: 1, SnapshotsOffset: 9 << 12, RefcountOrder: 4, Length: 120, Unknown: make([]byte, 8),
		Autoclear: AutoclearBitmaps, Backing: "base", BackingFormat: "raw",
		Bitmaps:      &BitmapsExtension{Count: 1, DirSize: 32, DirOffset: 8 << 12},
		FeatureNames: []FeatureName{{0, 0, "dirty bit"}, {0, 63, "new"}},
		Extensions:   []Extension{{0x12345678, []byte{1, 2, 3}}},
	}
}

// A header that is read is bounded, and says the same when it is written and
// read again.
func FuzzHeader(f *testing.F) {
	whole, err := plainHeader().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:1024])
	f.Add(whole[:200])
	f.Add(patched(f, whole, patch{72, "8000000000000000"}))
	f.Add(patched(f, whole, patch{72, "0000000000000014"}, patch{20, "0000000e"}))
	f.Add(patched(f, whole, patch{4, "00000002"}))
	f.Add(patched(f, whole, patch{120, "12345678ffffffff"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		g := h.Geometry()
		if h.Size > maxDisk || h.L1Size > MaxL1/8 || int64(h.L1Size) < g.L1Size(int64(h.Size)) ||
			int64(h.RefTableClusters)*g.ClusterSize > MaxRefTable || h.Snapshots > MaxSnapshots {
			t.Fatalf("beyond its bounds: %+v", h)
		}
		if err := h.Within(int64(len(b)), true); err == nil && int64(h.L1Offset)+int64(h.L1Size)*8 > int64(len(b)) {
			t.Fatalf("L1 table within a file of %d bytes: %+v", len(b), h)
		}
		again, err := h.Encode()
		if err != nil {
			return // full without an end marker
		}
		got, err := ParseHeader(again)
		if err != nil {
			t.Fatalf("encoded header of %+v is refused: %v", h, err)
		}
		h.BitmapsErr, h.StaleBitmaps = nil, false
		if !reflect.DeepEqual(got, h) {
			t.Fatalf("read again:\ngot  %+v\nwant %+v", got, h)
		}
	})
}

func FuzzSnapshots(f *testing.F) {
	entry := snapshotEntry()
	f.Add(entry, 1)
	f.Add(append(snapshotEntry(), entry...), 2)
	f.Add(entry[:40+24+3], 1)
	f.Add(patched(f, entry, patch{36, "00000010"}), 1)
	f.Add(patched(f, entry, patch{14, "ffff"}), 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		list, used, err := ParseSnapshots(b, n)
		if err != nil {
			return
		}
		if len(list) != n || used < n*snapshotFixed || used > len(b) {
			t.Fatalf("%d snapshots in %d of %d bytes", len(list), used, len(b))
		}
		again, err := EncodeSnapshots(list)
		if err != nil {
			t.Fatalf("%+v cannot be written: %v", list, err)
		}
		got, size, err := ParseSnapshots(again, n)
		if err != nil || size != len(again) || size < used || !reflect.DeepEqual(got, list) {
			t.Fatalf("read again %d of %d bytes: %v\ngot  %+v\nwant %+v", size, len(again), err, got, list)
		}
	})
}

func FuzzBitmaps(f *testing.F) {
	entry := bitmapEntry()
	f.Add(entry, 1)
	f.Add(append(bitmapEntry(), patched(f, entry, patch{25, "31"})...), 2)
	f.Add(patched(f, entry, patch{12, "00000005"}), 1)
	f.Add(patched(f, entry, patch{20, "00000006"}), 1)
	f.Add(patched(f, entry, patch{18, "ffff"}), 1)
	f.Fuzz(func(t *testing.T, dir []byte, n int) {
		list, err := ParseBitmaps(dir, n)
		if err != nil {
			return
		}
		g := NewGeometry(3, 16, 4, false, false)
		for i := range list {
			m := &list[i]
			if m.Check(&g, 64<<20) == nil && int64(m.TableEntries)<<g.ClusterBits > MaxBitmapData {
				t.Fatalf("beyond its bounds: %+v", m)
			}
		}
		again, err := EncodeBitmaps(list)
		if err != nil || len(again) != len(dir) {
			t.Fatalf("%+v is written as %d bytes instead of %d: %v", list, len(again), len(dir), err)
		}
		got, err := ParseBitmaps(again, n)
		if err != nil || !reflect.DeepEqual(got, list) {
			t.Fatalf("read again: %v\ngot  %+v\nwant %+v", err, got, list)
		}
	})
}

// What is taken means the same to a reader of JSON that is not strict.
func FuzzJSONFile(f *testing.F) {
	f.Add(`json:{"driver": "raw", "file": {"driver": "file", "filename": "/a/b"}}`)
	f.Add(`json:{"driver":"qcow2","file.driver":"file","file.filename":"a\u00e4"}`)
	f.Add(`json:{"driver":"raw","driver":"qcow2","file":{"driver":"file","filename":"a"}}`)
	f.Add(`json:{"driver":"raw","file":{"driver":"nbd"}}`)
	f.Add(`json:{`)
	f.Fuzz(func(t *testing.T, s string) {
		format, filename, err := ParseJSONFile(s)
		if err != nil {
			return
		}
		if format != "raw" && format != "qcow2" || filename == "" || strings.ContainsFunc(filename, unicode.IsControl) {
			t.Fatalf("%q: got %q, %q", s, format, filename)
		}
		var loose map[string]any
		if err := json.Unmarshal([]byte(strings.TrimPrefix(s, JSONPrefix)), &loose); err != nil {
			t.Fatalf("%q is not JSON: %v", s, err)
		}
		inner, _ := loose["file"].(map[string]any)
		name, nested := inner["filename"]
		if !nested {
			name = loose["file.filename"]
		}
		if loose["driver"] != format || name != filename {
			t.Fatalf("%q: got %q, %q, others read %v, %v", s, format, filename, loose["driver"], name)
		}
	})
}

func FuzzL2Entry(f *testing.F) {
	f.Add(uint64(0x8000000000050000), uint64(0), uint8(16), uint8(0))
	f.Add(uint64(0x4000000000050123), uint64(0), uint8(16), uint8(0))
	f.Add(uint64(0x7fc0000000050000), uint64(0), uint8(9), uint8(0))
	f.Add(uint64(1), uint64(0), uint8(12), uint8(4))
	f.Add(uint64(0x50001), uint64(0x200000001), uint8(16), uint8(1))
	f.Add(uint64(FlagCopied), uint64(0), uint8(21), uint8(2))
	f.Fuzz(func(t *testing.T, word, bitmap uint64, bits, kind uint8) {
		extended, version := kind&1 != 0, 3
		if kind&4 != 0 {
			extended, version = false, 2
		}
		g := NewGeometry(version, MinClusterBits+uint(bits)%13, 4, extended, kind&2 != 0)
		c, err := g.DecodeL2(word, bitmap)
		if err != nil {
			return
		}
		switch {
		case c.Compressed && (c.Length <= 0 || c.Length > 2*g.ClusterSize || c.Host < 0 || c.Host >= g.MaxCompressedHost()):
			t.Fatalf("compressed data out of bounds: %+v", c)
		case c.HasHost() && (!g.Aligned(c.Host) || c.Host < 0 || c.Host>>56 != 0):
			t.Fatalf("host cluster out of bounds: %+v", c)
		case c.Data&c.Zero != 0 || c.Data != 0 && c.Host == NoHost || (c.Data|c.Zero)&^g.AllSubs() != 0:
			t.Fatalf("contradiction: %+v", c)
		}
		wantWord, wantBitmap := word, bitmap
		if c.Compressed || !extended {
			wantBitmap = 0
		}
		if extended && !c.Compressed {
			wantWord &^= FlagZero
		}
		if w, b := g.EncodeL2(c); w != wantWord || b != wantBitmap {
			t.Fatalf("%#x, %#x: encoded to %#x, %#x from %+v", word, bitmap, w, b, c)
		}
	})
}

// The fixed fields of the example lie where the specification has them.
func TestHeaderFieldsLieInTheirPlaces(t *testing.T) {
	b, err := plainHeader().Encode()
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString("514649fb" + "00000003" + "0000000000000128" + "00000004" + "0000000c" +
		"0000000004000000" + "00000000" + "00000020" + "0000000000003000" + "0000000000001000" + "00000001" +
		"00000001" + "0000000000009000" + "0000000000000000" + "0000000000000000" + "0000000000000001" +
		"00000004" + "00000078" + "0000000000000000" + "0000000000000000")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b[:len(want)], want) || string(b[0x128:0x12c]) != "base" {
		t.Errorf("got  %x\nwant %x", b[:len(want)], want)
	}
}

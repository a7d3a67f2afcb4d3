package format

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// snapshotEntry is an entry with 24 bytes of extra data, ID "1" and name "s1".
func snapshotEntry() []byte {
	b, err := EncodeSnapshots([]Snapshot{{
		L1Offset: 0x50000, L1Size: 1, ID: "1", Name: "s1", Seconds: 7, Nanoseconds: 8,
		VMClock: 9, VMStateSize: 10, DiskSize: 64 << 20, ICount: 1<<64 - 1, ExtraSize: 24,
	}})
	if err != nil {
		panic(err)
	}
	return b
}

func TestSnapshotsOfQEMURoundTrip(t *testing.T) {
	dir := t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "image", "64M")
	qemuImg(t, dir, "snapshot", "-c", "first", "image")
	qemuImg(t, dir, "resize", "-q", "image", "128M")
	qemuImg(t, dir, "snapshot", "-c", "the second", "image")
	file, err := os.ReadFile(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := open(file, true)
	if err != nil {
		t.Fatal(err)
	}
	table := file[h.SnapshotsOffset:]
	list, used, err := ParseSnapshots(table, int(h.Snapshots))
	if err != nil {
		t.Fatal(err)
	}
	g := h.Geometry()
	for i, want := range []Snapshot{
		{ID: "1", Name: "first", DiskSize: 64 << 20}, {ID: "2", Name: "the second", DiskSize: 128 << 20},
	} {
		got := list[i]
		if got.ID != want.ID || got.Name != want.Name || got.DiskSize != want.DiskSize || got.Seconds == 0 {
			t.Errorf("snapshot %d: got %+v, want %+v", i, got, want)
		}
		if err := got.Check(&g, h.Size); err != nil {
			t.Errorf("snapshot %d: Check: %v", i, err)
		}
	}
	b, err := EncodeSnapshots(list)
	if err != nil {
		t.Fatal(err)
	}
	// The file may end before the padding of the last entry.
	if used != len(table) && used != len(b) || string(b[:used]) != string(table[:used]) {
		t.Errorf("encoded table differs:\ngot  %x\nwant %x", b, table[:used])
	}
}

func TestBadSnapshotTables(t *testing.T) {
	entry := snapshotEntry()
	for _, tt := range []struct {
		name string
		b    []byte
		n    int
		want string
	}{
		{"none in nothing", nil, 0, ""},
		{"sound", entry, 1, ""},
		{"sound, more follows", append(snapshotEntry(), 1, 2, 3), 1, ""},
		{"without padding at the end", entry[:40+24+3], 1, ""},
		{"cut in the name", entry[:40+24+2], 1, "ends within it"},
		{"cut in the fixed part", entry[:39], 1, "cannot have 1"},
		{"two of one", entry, 2, "cannot have 2"},
		{"two with the second cut", append(snapshotEntry(), entry[:39]...), 2, "snapshot 1: the table ends"},
		{"negative", entry, -1, "cannot have -1"},
		{"65537", make([]byte, 65537*40), 65537, "cannot have 65537"},
		{"offset beyond 2^63", patched(t, entry, patch{0, "8000000000000000"}), 1, "L1 table offset 0x8000000000000000"},
		{"extra data of 1025", patched(t, entry, patch{36, "00000401"}), 1, "too much extra metadata: 1025"},
		{"extra data of all", patched(t, entry, patch{36, "ffffffff"}), 1, "too much extra metadata"},
		{"extra data of 1024", patched(t, entry, patch{36, "00000400"}), 1, "ends within it"},
		{"long id", patched(t, entry, patch{12, "ffff"}), 1, "ends within it"},
		{"long name", patched(t, entry, patch{14, "ffff"}), 1, "ends within it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkRefusal(t, tt.want, func() error { _, _, err := ParseSnapshots(tt.b, tt.n); return err })
		})
	}
}

// checkRefusal wants an error of type Corrupt with a text, or none for "".
func checkRefusal(t *testing.T, want string, parse func() error) {
	t.Helper()
	err := parse()
	switch {
	case want == "":
		if err != nil {
			t.Errorf("got %v, want no error", err)
		}
	case err == nil:
		t.Errorf("got no error, want one with %q", want)
	case !strings.Contains(err.Error(), want):
		t.Errorf("got %v, want an error with %q", err, want)
	default:
		if _, ok := err.(Corrupt); !ok {
			t.Errorf("error %v is of type %T", err, err)
		}
	}
}

// How much of the extra data there is decides what it says.
func TestSnapshotExtraData(t *testing.T) {
	b := patched(t, snapshotEntry(), patch{32, "00000055"})
	b = append(b, make([]byte, 64)...)
	for size := range uint32(40) {
		binary.BigEndian.PutUint32(b[36:], size)
		list, used, err := ParseSnapshots(b, 1)
		if err != nil {
			t.Fatal(err)
		}
		want := Snapshot{VMStateSize: 0x55}
		if size >= 8 {
			want.VMStateSize = 10
		}
		if size >= 16 {
			want.DiskSize = 64 << 20
		}
		if size >= 24 {
			want.ICount = 1<<64 - 1
		}
		s := list[0]
		if s.VMStateSize != want.VMStateSize || s.DiskSize != want.DiskSize || s.ICount != want.ICount {
			t.Errorf("extra data of %d: got %+v, want %+v", size, s, want)
		}
		again, err := EncodeSnapshots(list)
		if err != nil {
			t.Fatal(err)
		}
		// A VM state size of the extra data is written to the old field too.
		if want.VMStateSize == 10 {
			binary.BigEndian.PutUint32(again[32:], 0x55)
		}
		end := 40 + int(size) + 3
		if len(again) != used || string(again[:end]) != string(b[:end]) {
			t.Errorf("extra data of %d: encoded %x, want %x", size, again, b[:used])
		}
	}
}

func TestSnapshotCheck(t *testing.T) {
	g := NewGeometry(3, 16, 4, false, false)
	for _, tt := range []struct {
		name string
		s    Snapshot
		want string
	}{
		{"sound", Snapshot{L1Offset: 1 << 16, L1Size: 1, DiskSize: 512 << 20}, ""},
		{"size of the active disk", Snapshot{L1Offset: 1 << 16, L1Size: 2}, ""},
		{"too small for the active disk", Snapshot{L1Offset: 1 << 16, L1Size: 1}, "too small: 1 entries, the disk needs 2"},
		{"too small for its own disk", Snapshot{L1Offset: 1 << 16, L1Size: 1, DiskSize: 512<<20 + 1}, "too small"},
		{"unaligned", Snapshot{L1Offset: 0x400200, L1Size: 2}, "offset 0x400200 invalid"},
		{"huge", Snapshot{L1Offset: 1 << 16, L1Size: 0x10000000}, "too large"},
		{"at 0", Snapshot{L1Size: 2}, "offset is 0"},
		{"disk of 2^64", Snapshot{L1Offset: 1 << 16, L1Size: 2, DiskSize: 1<<64 - 1}, "too big"},
	} {
		t.Run(tt.name, func(t *testing.T) { checkRefusal(t, tt.want, func() error { return tt.s.Check(&g, 1<<30) }) })
	}
}

func TestEncodeSnapshotsRefusesWhatDoesNotFit(t *testing.T) {
	long := Snapshot{ID: strings.Repeat("i", 65535), Name: strings.Repeat("n", 65535)}
	many := make([]Snapshot, 513)
	for i := range many {
		many[i] = long
	}
	for name, list := range map[string][]Snapshot{
		"too many":              make([]Snapshot, MaxSnapshots+1),
		"long id":               {{ID: long.ID + "i"}},
		"long name":             {{Name: long.Name + "n"}},
		"extra data missing":    {{ExtraSize: 25}},
		"extra data too long":   {{ExtraSize: 1025, Extra: make([]byte, 1001)}},
		"table of over 64 MiB":  many,
		"extra data not spoken": {{Extra: []byte{1}}},
	} {
		if b, err := EncodeSnapshots(list); err == nil {
			t.Errorf("%s: encoded to %d bytes", name, len(b))
		}
	}
	if _, err := EncodeSnapshots(many[:511]); err != nil {
		t.Errorf("longest names: %v", err)
	}
}

func TestSnapshotTableIsBounded(t *testing.T) {
	entry, err := EncodeSnapshots([]Snapshot{{ID: strings.Repeat("i", 65535), Name: strings.Repeat("n", 65535)}})
	if err != nil {
		t.Fatal(err)
	}
	n := MaxSnapshotTable / len(entry)
	table := bytes.Repeat(entry, n+1)
	if _, used, err := ParseSnapshots(table, n); err != nil || used != n*len(entry) {
		t.Errorf("%d snapshots of %d bytes: %d bytes used, %v", n, len(entry), used, err)
	}
	checkRefusal(t, "ends within it", func() error { _, _, err := ParseSnapshots(table, n+1); return err })
}

func bitmapEntry() []byte {
	b, err := EncodeBitmaps([]Bitmap{{Name: "b0", TableOffset: 0x40000, TableEntries: 1, GranularityBits: 16}})
	if err != nil {
		panic(err)
	}
	return b
}

func TestBitmapsOfQEMURoundTrip(t *testing.T) {
	dir := t.TempDir()
	qemuImg(t, dir, "create", "-q", "-f", "qcow2", "image", "64M")
	qemuImg(t, dir, "bitmap", "--add", "-g", "64k", "image", "b0")
	qemuImg(t, dir, "bitmap", "--add", "-g", "512", "--disable", "image", "another")
	file, err := os.ReadFile(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := open(file, true)
	if err != nil || h.BitmapsErr != nil || h.Bitmaps == nil {
		t.Fatalf("header: %v, %+v", err, h)
	}
	dirBytes := file[h.Bitmaps.DirOffset:][:h.Bitmaps.DirSize]
	list, err := ParseBitmaps(dirBytes, int(h.Bitmaps.Count))
	if err != nil {
		t.Fatal(err)
	}
	g := h.Geometry()
	byName := map[string]Bitmap{}
	for _, m := range list {
		byName[m.Name] = m
		if err := m.Check(&g, int64(h.Size)); err != nil || !m.Usable() {
			t.Errorf("bitmap %+v: Check: %v, usable %v", m, err, m.Usable())
		}
		for i := range int64(m.TableEntries) {
			e := binary.BigEndian.Uint64(file[m.TableOffset+i*8:])
			off, ones, err := g.DecodeBitmapTable(e)
			if err != nil || off != 0 || ones {
				t.Errorf("bitmap %q entry %d %#x: %d, %v, %v", m.Name, i, e, off, ones, err)
			}
		}
	}
	if m := byName["b0"]; !m.Auto || m.GranularityBits != 16 || m.TableEntries != 1 {
		t.Errorf("b0: %+v", m)
	}
	if m := byName["another"]; m.Auto || m.GranularityBits != 9 || m.TableEntries != 1 {
		t.Errorf("another: %+v", m)
	}
	b, err := EncodeBitmaps(list)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != string(dirBytes) {
		t.Errorf("encoded directory differs:\ngot  %x\nwant %x", b, dirBytes)
	}
}

func TestBadBitmapDirectories(t *testing.T) {
	entry := bitmapEntry()
	change := func(off int, hex string) []byte { return patched(t, entry, patch{off, hex}) }
	for _, tt := range []struct {
		name string
		dir  []byte
		n    int
		want string
	}{
		{"sound", entry, 1, ""},
		{"none", nil, 0, ""},
		{"in use", change(12, "00000003"), 1, ""},
		{"one more than there is", entry, 2, "cannot have 2"},
		{"two, the second cut", append(bitmapEntry(), make([]byte, 23)...), 2, "bitmap 1: broken bitmap directory"},
		{"one less than there is", entry, 0, "32 bytes more"},
		{"negative", entry, -1, "cannot have -1"},
		{"65536", make([]byte, 65536*24), 65536, "cannot have 65536"},
		{"same name twice", append(bitmapEntry(), entry...), 2, `"b0" occurs twice`},
		{"cut", entry[:31], 1, "ends within the entry"},
		{"bytes behind", append(bitmapEntry(), 0), 1, "1 bytes more"},
		{"table at 0", change(0, "0000000000000000"), 1, "table offset 0x0"},
		{"table beyond 2^63", change(0, "8000000000000000"), 1, "table offset 0x8000000000000000"},
		{"table of 7fffffff", change(8, "7fffffff"), 1, "table of 2147483647 entries"},
		{"table of 0", change(8, "00000000"), 1, "table of 0 entries"},
		{"flags", change(12, "00000008"), 1, "reserved bits"},
		{"type 2", change(16, "02"), 1, "unknown type 2"},
		{"type 0", change(16, "00"), 1, "unknown type 0"},
		{"granularity 8", change(17, "08"), 1, "granularity 2^8"},
		{"granularity 32", change(17, "20"), 1, "granularity 2^32"},
		{"no name", change(18, "0000"), 1, "name of 0 bytes"},
		{"name of 1024", change(18, "0400"), 1, "name of 1024 bytes"},
		{"name of ffff", change(18, "ffff"), 1, "name of 65535 bytes"},
		{"name of 1023", change(18, "03ff"), 1, "ends within the entry"},
		{"extra data", change(20, "00000008"), 1, "ends within the entry"},
		{"extra data of all", change(20, "ffffffff"), 1, "ends within the entry"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkRefusal(t, tt.want, func() error { _, err := ParseBitmaps(tt.dir, tt.n); return err })
		})
	}
}

func TestBitmapFlags(t *testing.T) {
	for flags := range byte(8) {
		want := Bitmap{
			Name: "name", TableOffset: 0x40000, TableEntries: 1, GranularityBits: 9,
			InUse: flags&1 != 0, Auto: flags&2 != 0, ExtraCompatible: flags&4 != 0, Extra: []byte{1, 2, 3},
		}
		dir, err := EncodeBitmaps([]Bitmap{want})
		if err != nil {
			t.Fatal(err)
		}
		if dir[15] != flags {
			t.Errorf("flags %d are written as %d", flags, dir[15])
		}
		got, err := ParseBitmaps(dir, 1)
		if err != nil || !reflect.DeepEqual(got, []Bitmap{want}) {
			t.Errorf("flags %d: got %+v, %v, want %+v", flags, got, err, want)
		}
		if usable := got[0].Usable(); usable != (flags&1 == 0 && flags&4 != 0) {
			t.Errorf("flags %d: usable %v", flags, usable)
		}
	}
}

func TestBitmapCheck(t *testing.T) {
	g := NewGeometry(3, 16, 4, false, false)
	for _, tt := range []struct {
		name string
		m    Bitmap
		size int64
		want string
	}{
		{"sound", Bitmap{TableOffset: 1 << 16, TableEntries: 1, GranularityBits: 16}, 64 << 20, ""},
		{"full cluster of bits", Bitmap{TableOffset: 1 << 16, TableEntries: 1, GranularityBits: 9}, 256 << 20, ""},
		{"one bit more", Bitmap{TableOffset: 1 << 16, TableEntries: 1, GranularityBits: 9}, 256<<20 + 512, "the disk needs 2"},
		{"too large a table", Bitmap{TableOffset: 1 << 16, TableEntries: 2, GranularityBits: 16}, 64 << 20, "table of 2 entries, the disk needs 1"},
		{"in use may differ", Bitmap{TableOffset: 1 << 16, TableEntries: 2, GranularityBits: 16, InUse: true}, 64 << 20, ""},
		{"unaligned", Bitmap{TableOffset: 0x10200, TableEntries: 1, GranularityBits: 16}, 64 << 20, "offset 0x10200"},
		{"over 512 MiB", Bitmap{TableOffset: 1 << 16, TableEntries: 8193, GranularityBits: 9}, 1 << 41, "too large: 536936448"},
		{"512 MiB", Bitmap{TableOffset: 1 << 16, TableEntries: 8192, GranularityBits: 9}, 1 << 41, ""},
		{"end beyond 2^63", Bitmap{TableOffset: 1<<63 - 1<<16, TableEntries: 8193, GranularityBits: 9}, 1 << 41, "offset 0x7fffffffffff0000"},
		{"largest disk", Bitmap{TableOffset: 1 << 16, TableEntries: 8192, GranularityBits: 31}, maxDisk, ""},
	} {
		t.Run(tt.name, func(t *testing.T) { checkRefusal(t, tt.want, func() error { return tt.m.Check(&g, tt.size) }) })
	}
}

func TestEncodeBitmapsRefusesWhatDoesNotFit(t *testing.T) {
	for name, list := range map[string][]Bitmap{
		"too many":       make([]Bitmap, MaxBitmaps+1),
		"no name":        {{}},
		"long name":      {{Name: strings.Repeat("n", 1024)}},
		"much extra":     {{Name: "n", Extra: make([]byte, MaxBitmapDir+1)}},
		"over the bound": {{Name: "n", Extra: make([]byte, MaxBitmapDir)}},
	} {
		if b, err := EncodeBitmaps(list); err == nil {
			t.Errorf("%s: encoded to %d bytes", name, len(b))
		}
	}
}

func TestBitmapTableEntries(t *testing.T) {
	g := NewGeometry(3, 16, 4, false, false)
	for _, tt := range []struct {
		e    uint64
		off  int64
		ones bool
		want string
	}{
		{0, 0, false, ""},
		{1, 0, true, ""},
		{0x50000, 0x50000, false, ""},
		{0x00ffffffffff0000, 0x00ffffffffff0000, false, ""},
		{0x50001, 0, false, "reserved bits"},
		{2, 0, false, "reserved bits"},
		{0x100, 0, false, "reserved bits"},
		{1 << 56, 0, false, "reserved bits"},
		{1 << 63, 0, false, "reserved bits"},
		{0x50200, 0, false, "cluster boundary"},
	} {
		off, ones, err := g.DecodeBitmapTable(tt.e)
		checkRefusal(t, tt.want, func() error { return err })
		if tt.want != "" {
			continue
		}
		if off != tt.off || ones != tt.ones {
			t.Errorf("%#x: got %#x, %v, want %#x, %v", tt.e, off, ones, tt.off, tt.ones)
		}
		if e := EncodeBitmapTable(off, ones); e != tt.e {
			t.Errorf("%#x encodes to %#x", tt.e, e)
		}
	}
}

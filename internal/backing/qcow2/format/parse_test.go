package format

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// patch overwrites the bytes at off with those that hex says.
type patch struct {
	off int
	hex string
}

func patched(t testing.TB, b []byte, patches ...patch) []byte {
	t.Helper()
	b = bytes.Clone(b)
	for _, p := range patches {
		data, err := hex.DecodeString(p.hex)
		if err != nil || p.off+len(data) > len(b) {
			t.Fatalf("patch %+v does not suit %d bytes: %v", p, len(b), err)
		}
		copy(b[p.off:], data)
	}
	return b
}

// qemuImage is an image made by qemu-img create with options.
func qemuImage(t *testing.T, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	qemuImg(t, dir, append(append([]string{"create", "-q", "-f", "qcow2"}, options...), "image", "64M")...)
	b, err := os.ReadFile(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// open is what opening a file begins with.
func open(file []byte, write bool) (*Header, error) {
	n, err := ClusterSize(file)
	if err != nil {
		return nil, err
	}
	h, err := ParseHeader(file[:min(n, int64(len(file)))])
	if err != nil {
		return nil, err
	}
	return h, h.Within(int64(len(file)), write)
}

// Each row patches an image of qemu-img create, with its header at 0, the
// refcount table at 0x10000 and the L1 table at 0x30000; want is a part of the
// refusal.
func TestBadHeadersAreRefused(t *testing.T) {
	image := qemuImage(t)
	small := qemuImage(t, "-o", "cluster_size=8k")
	for _, tt := range []struct {
		name    string
		file    []byte
		patches []patch
		want    string
	}{
		{"magic", image, []patch{{0, "51464900"}}, "not in qcow2 format"},
		{"version 4", image, []patch{{4, "00000004"}}, "version 4"},
		{"version 1", image, []patch{{4, "00000001"}}, "version 1"},
		{"cluster bits 8", image, []patch{{20, "00000008"}}, "cluster size: 2^8"},
		{"cluster bits 22", image, []patch{{20, "00000016"}}, "cluster size: 2^22"},
		{"cluster bits 40", image, []patch{{20, "00000028"}}, "cluster size: 2^40"},
		{"cluster bits all", image, []patch{{20, "ffffffff"}}, "cluster size: 2^4294967295"},
		{"header length 100", image, []patch{{100, "00000064"}}, "header too short: 100"},
		{"header length beyond", image, []patch{{100, "7fffffff"}}, "exceeds cluster size"},
		{"header length one more", image, []patch{{100, "00010008"}}, "exceeds cluster size"},
		{"header length odd", image, []patch{{100, "0000006d"}}, "not a multiple of 8"},
		{"refcount width", image, []patch{{96, "00000007"}}, "width too large"},
		{"refcount width all", image, []patch{{96, "ffffffff"}}, "width too large"},
		{"feature 63", image, []patch{{72, "8000000000000000"}}, "features: bit 63"},
		{"feature 32", image, []patch{{72, "0000000100000000"}}, "features: bit 32"},
		{"two features", image, []patch{{72, "8000000000000020"}}, "features: bit 5, bit 63"},
		{"named feature", image, []patch{{72, "0000000000000020"}, {120, "0005" + "6e65770a1b00"}}, `features: "new??"`},
		{"feature, broken extensions", image, []patch{{72, "0000000000000020"}, {112, "12345678ffffffff"}}, "features: bit 5"},
		{"compression without bit", image, []patch{{104, "01"}}, "bit must be set"},
		{"compression bit alone", image, []patch{{72, "0000000000000008"}}, "bit must not be set"},
		{"compression unknown", image, []patch{{72, "0000000000000008"}, {104, "02"}}, "unknown compression type 2"},
		{"compression bit, short header", image, []patch{{72, "0000000000000008"}, {100, "00000068"}, {104, "00000000"}}, "bit must not be set"},
		{"subclusters too small", small, []patch{{72, "0000000000000010"}}, "extended L2 entries need clusters of 16384"},
		{"encryption unknown", image, []patch{{32, "00000003"}}, "encryption method 3"},
		{"encryption AES", image, []patch{{32, "00000001"}}, "AES-CBC encrypted"},
		{"encryption LUKS", image, []patch{{32, "00000002"}}, "LUKS encrypted"},
		{"size all", image, []patch{{24, "ffffffffffffffff"}}, "too big"},
		{"size 2^63", image, []patch{{24, "8000000000000000"}}, "too big"},
		{"size 2^63-512", image, []patch{{24, "7ffffffffffffe00"}}, "L1 table is too small"},
		{"size 4 GiB", image, []patch{{24, "0000000100000000"}}, "L1 table is too small: 1 entries, the disk needs 8"},
		{"backing offset beyond", image, []patch{{8, "0000000000020000"}, {16, "00000010"}}, "invalid backing file offset"},
		{"backing offset all", image, []patch{{8, "ffffffffffffffff"}, {16, "00000001"}}, "invalid backing file offset"},
		{"backing offset in header", image, []patch{{8, "0000000000000068"}, {16, "00000010"}}, "invalid backing file offset"},
		{"backing name all", image, []patch{{8, "0000000000001000"}, {16, "ffffffff"}}, "name too long"},
		{"backing name 1024", image, []patch{{8, "0000000000001000"}, {16, "00000400"}}, "name too long"},
		{"backing name over the end", image, []patch{{8, "000000000000fff8"}, {16, "00000009"}}, "name too long"},
		{"backing offset alone", image, []patch{{8, "0000000000000200"}}, "name of 0 bytes"},
		{"backing size alone", image, []patch{{16, "00000005"}}, "name of 5 bytes at offset 0x0"},
		{"backing name with NUL", image, []patch{{8, "0000000000001000"}, {16, "00000003"}, {0x1000, "610062"}}, "control characters"},
		{"backing name with newline", image, []patch{{8, "0000000000001000"}, {16, "00000003"}, {0x1000, "610a62"}}, "control characters"},
		{"extension too large", image, []patch{{112, "12345678ffffffff"}}, "header extension 0x12345678 too large"},
		{"extension over the name", image, []patch{{8, "0000000000000080"}, {16, "00000003"}, {128, "616263"}, {112, "1234567800000009"}}, "too large: 9"},
		{"end marker too large", image, []patch{{112, "00000000ffffffff"}}, "header extension 0x0 too large"},
		{"L1 size all", image, []patch{{36, "ffffffff"}}, "L1 table too large"},
		{"L1 size over 32 MiB", image, []patch{{36, "00400001"}}, "L1 table too large"},
		{"L1 size 0", image, []patch{{36, "00000000"}}, "L1 table is too small"},
		{"L1 offset unaligned", image, []patch{{40, "1234567890abcdef"}}, "L1 table offset 0x1234567890abcdef invalid"},
		{"L1 offset negative", image, []patch{{40, "ffffffffffff0000"}}, "L1 table offset 0xffffffffffff0000 invalid"},
		{"L1 end beyond 2^63", image, []patch{{36, "00400000"}, {40, "7fffffffffff0000"}}, "L1 table offset"},
		{"L1 past the file", image, []patch{{40, "0000000100000000"}}, "beyond the end of the file"},
		{"L1 over the end of the file", image, []patch{{36, "00400000"}}, "beyond the end of the file"},
		{"L1 offset 0", image, []patch{{40, "0000000000000000"}}, "L1 table offset is 0"},
		{"no refcount table", image, []patch{{56, "00000000"}}, "does not contain a reference count table"},
		{"refcount table all", image, []patch{{56, "ffffffff"}}, "reference count table too large"},
		{"refcount table 8 GiB", image, []patch{{56, "00020001"}}, "reference count table too large"},
		{"refcount table one more", image, []patch{{56, "00000081"}}, "reference count table too large"},
		{"refcount table unaligned", image, []patch{{48, "1234567890abcdef"}}, "reference count table offset"},
		{"refcount table negative", image, []patch{{48, "ffffffffffff0000"}}, "reference count table offset"},
		{"raw without data file", image, []patch{{88, "0000000000000002"}}, "data-file-raw requires a data file"},
		{"raw with backing", image, []patch{{72, "0000000000000004"}, {88, "0000000000000002"}, {8, "0000000000001000"}, {16, "00000003"}, {0x1000, "616263"}}, "data-file-raw excludes"},
		{"snapshots all", image, []patch{{60, "ffffffff"}}, "snapshot table too large"},
		{"snapshots 65537", image, []patch{{60, "00010001"}}, "snapshot table too large"},
		{"snapshot offset negative", image, []patch{{64, "ffffffffffff0000"}}, "snapshot table offset"},
		{"snapshot offset unaligned", image, []patch{{60, "00000001"}, {64, "0000000000000200"}}, "snapshot table offset"},
		{"snapshot offset 0", image, []patch{{60, "00000001"}}, "snapshot table offset is 0"},
		{"snapshots past the file", image, []patch{{60, "00010000"}, {64, "0000000001000000"}}, "beyond the end of the file"},
		{"backing format unknown", image, []patch{{112, "e2792aca00000004" + "766d646b00000000"}}, `backing format "vmdk"`},
		{"backing format long", image, []patch{{112, "e2792aca00000010"}}, "backing format name too long"},
		{"backing format twice", image, []patch{{112, "e2792aca00000003" + "7261770000000000" + "e2792aca00000003"}}, "occurs twice"},
		{"feature table twice", image, []patch{{112, "6803f85700000000" + "6803f85700000000"}}, "occurs twice"},
		{"bitmaps twice", image, []patch{{112, "2385287500000000" + "2385287500000000"}}, "occurs twice"},
		{"data file twice", image, []patch{{112, "4441544100000000" + "4441544100000000"}}, "occurs twice"},
		{"data file with NUL", image, []patch{{72, "0000000000000004"}, {112, "4441544100000003" + "610062"}}, "control characters"},
		{"data file name long", image, []patch{{72, "0000000000000004"}, {112, "4441544100001000"}}, "data file name too long"},
		{"encryption extension", image, []patch{{112, "0537be7700000010"}}, "encryption header extension"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := open(patched(t, tt.file, tt.patches...), false)
			var c Corrupt
			var u Unsupported
			switch {
			case err == nil:
				t.Fatal("opened")
			case !errors.As(err, &c) && !errors.As(err, &u):
				t.Errorf("error %v is of type %T", err, err)
			case !strings.Contains(err.Error(), tt.want):
				t.Errorf("got %q, want it to have %q", err, tt.want)
			}
		})
	}
}

// What looks odd and does not keep an image from being read.
func TestOddHeadersAreRead(t *testing.T) {
	image := qemuImage(t)
	for _, tt := range []struct {
		name    string
		patches []patch
		check   func(h *Header) bool
	}{
		{"corrupt", []patch{{72, "0000000000000002"}}, func(h *Header) bool { return h.Incompat == IncompatCorrupt }},
		{"dirty", []patch{{72, "0000000000000001"}}, func(h *Header) bool { return h.Incompat == IncompatDirty }},
		{"size of no sectors", []patch{{24, "0000000003ffffff"}}, func(h *Header) bool { return h.Size == 67108352 }},
		{"size 0", []patch{{24, "00000000000001ff"}, {36, "00000000"}}, func(h *Header) bool { return h.Size == 0 }},
		{"unknown autoclear", []patch{{88, "8000000000000000"}}, func(h *Header) bool { return h.Autoclear == 1<<63 }},
		{"unknown compatible", []patch{{80, "8000000000000000"}}, func(h *Header) bool { return h.Compat == 1<<63 }},
		{"refcount table 0", []patch{{48, "0000000000000000"}}, func(h *Header) bool { return h.RefTableOffset == 0 }},
		{"refcount table past the file", []patch{{48, "0000000100000000"}}, func(h *Header) bool { return h.RefTableOffset == 1<<32 }},
		{"short v3 header", []patch{{100, "00000068"}, {104, "0000000000000000"}}, func(h *Header) bool { return h.Length == 104 && h.Unknown == nil }},
		{"longer header", []patch{{100, "00000078"}, {112, "0102030405060708" + "0000000000000000"}}, func(h *Header) bool {
			return bytes.Equal(h.Unknown, []byte{1, 2, 3, 4, 5, 6, 7, 8})
		}},
		{"padding not zero", []patch{{105, "ffffffffffffff"}}, func(h *Header) bool { return h.Compression == Deflate }},
		{"unknown extension", []patch{{112, "1234567800000003" + "0102030000000000" + "0000000000000000"}}, func(h *Header) bool {
			return reflect.DeepEqual(h.Extensions, []Extension{{0x12345678, []byte{1, 2, 3}}})
		}},
		{"extension behind the end", []patch{{112, "0000000000000000" + "12345678ffffffff"}}, func(h *Header) bool {
			return h.Extensions == nil
		}},
		{"unknown extension twice", []patch{{112, "1234567800000000" + "1234567800000000" + "0000000000000000"}}, func(h *Header) bool {
			return len(h.Extensions) == 2
		}},
		{"data file name without feature", []patch{{112, "4441544100000001" + "0a00000000000000" + "0000000000000000"}}, func(h *Header) bool {
			return h.DataFile == "" && len(h.Extensions) == 1
		}},
		{"backing name at the end", []patch{{8, "000000000000fffd"}, {16, "00000003"}, {0xfffd, "616263"}}, func(h *Header) bool {
			return h.Backing == "abc" && h.BackingFormat == ""
		}},
		{"extension up to the name", []patch{{8, "0000000000000080"}, {16, "00000003"}, {112, "1234567800000008"}, {128, "616263"}}, func(h *Header) bool {
			return h.Backing == "abc" && len(h.Extensions) == 1 && len(h.Extensions[0].Data) == 8
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, err := open(patched(t, image, tt.patches...), false)
			if err != nil {
				t.Fatal(err)
			}
			if !tt.check(h) {
				t.Errorf("wrong header: %+v", h)
			}
		})
	}
}

func TestWritingNeedsTheRefcountTable(t *testing.T) {
	image := qemuImage(t)
	for off, want := range map[string]string{
		"0000000000000000": "reference count table offset is 0",
		"0000000100000000": "reference count table at 0x100000000 lies beyond",
	} {
		_, err := open(patched(t, image, patch{48, off}), true)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("refcount table at %s: got %v, want %q", off, err, want)
		}
	}
	if _, err := open(image, true); err != nil {
		t.Errorf("sound image: %v", err)
	}
}

// A file that ends early is refused wherever that is within the header, and
// otherwise read.
func TestHeaderCutShort(t *testing.T) {
	image := qemuImage(t, "-b", "base", "-F", "raw", "-u")
	whole, err := ParseHeader(image[:1<<16])
	if err != nil {
		t.Fatal(err)
	}
	nameEnd := bytes.Index(image, []byte("base")) + 4
	for n := range 1024 {
		h, err := ParseHeader(image[:n])
		if (err == nil) != (n >= nameEnd) {
			t.Fatalf("first %d bytes of a header of %d: error %v", n, nameEnd, err)
		}
		if err == nil && !reflect.DeepEqual(h, whole) {
			t.Fatalf("first %d bytes: got %+v, want %+v", n, h, whole)
		}
	}
	plain := qemuImage(t)
	if _, err := ParseHeader(plain[:112]); err != nil {
		t.Errorf("file that ends behind the fixed fields: %v", err)
	}
}

// bitmapsExtension is one of a bitmap of a 64 MiB disk.
const bitmapsExtension = "23852875" + "00000018" + "00000001" + "00000000" + "0000000000000020" + "0000000000050000"

func TestBitmapsExtension(t *testing.T) {
	image := patched(t, qemuImage(t), patch{112, bitmapsExtension + "0000000000000000"}, patch{88, "0000000000000001"})
	const ext = 112
	for _, tt := range []struct {
		name    string
		patches []patch
		want    string // "" for sound
	}{
		{"sound", nil, ""},
		{"no bitmaps", []patch{{ext + 8, "00000000"}}, "zero bitmaps"},
		{"65536 bitmaps", []patch{{ext + 8, "00010000"}}, "65536 bitmaps"},
		{"2 bitmaps in the room of 1", []patch{{ext + 8, "00000002"}}, "32 bytes for 2"},
		{"reserved", []patch{{ext + 12, "00000001"}}, "reserved field"},
		{"directory of 0", []patch{{ext + 16, "0000000000000000"}}, "directory of 0 bytes"},
		{"directory of all", []patch{{ext + 16, "ffffffffffffffff"}}, "directory of 18446744073709551615 bytes"},
		{"directory unaligned", []patch{{ext + 24, "0000000000050200"}}, "directory offset 0x50200"},
		{"directory at 0", []patch{{ext + 24, "0000000000000000"}}, "directory offset 0x0"},
		{"directory negative", []patch{{ext + 24, "ffffffffffff0000"}}, "directory offset"},
		{"length", []patch{{ext + 4, "00000017"}}, "invalid length 23"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, err := ParseHeader(patched(t, image, tt.patches...)[:1<<16])
			if err != nil {
				t.Fatalf("disk cannot be read: %v", err)
			}
			switch {
			case h.StaleBitmaps:
				t.Error("bitmaps taken for stale")
			case tt.want == "":
				want := BitmapsExtension{Count: 1, DirSize: 32, DirOffset: 0x50000}
				if h.BitmapsErr != nil || h.Bitmaps == nil || *h.Bitmaps != want {
					t.Errorf("got %+v, %v, want %+v", h.Bitmaps, h.BitmapsErr, want)
				}
			case h.Bitmaps != nil || h.BitmapsErr == nil || !strings.Contains(h.BitmapsErr.Error(), tt.want):
				t.Errorf("got %+v, %v, want an error with %q", h.Bitmaps, h.BitmapsErr, tt.want)
			}
		})
	}
}

func TestBitmapsWithoutTheirBitAreStale(t *testing.T) {
	image := patched(t, qemuImage(t), patch{112, bitmapsExtension + "0000000000000000"})
	h, err := ParseHeader(image[:1<<16])
	if err != nil {
		t.Fatal(err)
	}
	if h.Bitmaps != nil || h.BitmapsErr != nil || !h.StaleBitmaps {
		t.Errorf("got %+v, %v, stale %v", h.Bitmaps, h.BitmapsErr, h.StaleBitmaps)
	}
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if h, err = ParseHeader(b); err != nil || h.StaleBitmaps {
		t.Errorf("written anew: stale %v, %v", h.StaleBitmaps, err)
	}
}

func TestEncodeRefusesWhatDoesNotFit(t *testing.T) {
	sound := Header{Version: 3, ClusterBits: 9, RefcountOrder: 4, RefTableOffset: 512, RefTableClusters: 1, Length: 112}
	for _, tt := range []struct {
		name   string
		change func(h *Header)
		ok     bool
	}{
		{"sound", func(*Header) {}, true},
		{"extension that fills", func(h *Header) { h.Extensions = []Extension{{1, make([]byte, 512-112-16)}} }, true},
		{"extension over", func(h *Header) { h.Extensions = []Extension{{1, make([]byte, 512-112-15)}} }, false},
		{"name that fills", func(h *Header) { h.Backing = strings.Repeat("a", 512-112-8) }, true},
		{"name over", func(h *Header) { h.Backing = strings.Repeat("a", 512-112-7) }, false},
		{"name of 1023", func(h *Header) { h.ClusterBits, h.Backing = 16, strings.Repeat("a", 1023) }, true},
		{"name of 1024", func(h *Header) { h.ClusterBits, h.Backing = 16, strings.Repeat("a", 1024) }, false},
		{"unknown fields", func(h *Header) { h.Unknown = make([]byte, 16) }, true},
		{"odd unknown fields", func(h *Header) { h.Unknown = make([]byte, 9) }, false},
		{"features of version 2", func(h *Header) { h.Version, h.Compat = 2, 1 }, false},
		{"refcounts of version 2", func(h *Header) { h.Version, h.RefcountOrder = 2, 5 }, false},
		{"version 2", func(h *Header) { h.Version = 2 }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := sound
			tt.change(&h)
			b, err := h.Encode()
			switch {
			case (err == nil) != tt.ok:
				t.Errorf("error %v, want success %v", err, tt.ok)
			case err == nil && len(b) != 1<<h.ClusterBits:
				t.Errorf("%d bytes", len(b))
			}
		})
	}
}

func TestFeatureTableIsBounded(t *testing.T) {
	h := Header{Version: 3, ClusterBits: 21, RefcountOrder: 4, RefTableOffset: 1 << 21, RefTableClusters: 1, Length: 112}
	h.FeatureNames = make([]FeatureName, 40000)
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.FeatureNames) != 192 {
		t.Errorf("%d names are kept", len(got.FeatureNames))
	}
}

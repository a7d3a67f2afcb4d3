package format

import (
	"errors"
	"testing"
)

func TestCompressedEntries(t *testing.T) {
	for bits := uint(MinClusterBits); bits <= MaxClusterBits; bits++ {
		g := NewGeometry(3, bits, 4, false, false)
		x := 62 - (bits - 8)
		for y := range uint(62) {
			word := uint64(FlagCompressed) | 1<<y
			c, err := g.DecodeL2(word, 0)
			if y < x && y >= 56 {
				if err == nil {
					t.Errorf("cluster bits %d, bit %d: reserved bit taken: %+v", bits, y, c)
				}
				continue
			}
			want := Cluster{Length: 512, Compressed: true, Data: 1}
			if y < x {
				want.Host = 1 << y
				want.Length -= want.Host & 511
			} else {
				want.Length += 512 << (y - x)
			}
			if err != nil || c != want {
				t.Errorf("cluster bits %d, bit %d: got %+v, %v, want %+v", bits, y, c, err, want)
			}
			if again, bitmap := g.EncodeL2(c); again != word || bitmap != 0 {
				t.Errorf("cluster bits %d, bit %d: encoded to %#x, %#x", bits, y, again, bitmap)
			}
		}
		longest, err := g.DecodeL2(uint64(1<<63-1)&^(1<<x-1), 0)
		if err != nil || longest.Length != 2*g.ClusterSize {
			t.Errorf("cluster bits %d: longest is %d, %v, want %d", bits, longest.Length, err, 2*g.ClusterSize)
		}
	}
}

// The offsets that compressed entries can name, by cluster size (section
// "Compressed Clusters Descriptor").
func TestCompressedOffsets(t *testing.T) {
	for bits, x := range map[uint]uint{9: 56, 12: 56, 14: 56, 15: 55, 16: 54, 21: 49} {
		g := NewGeometry(3, bits, 4, false, false)
		if got := g.MaxCompressedHost(); got != 1<<x {
			t.Errorf("cluster bits %d: bound %#x, want 2^%d", bits, got, x)
		}
	}
}

func TestStandardEntries(t *testing.T) {
	const host = 0x50000
	v3 := NewGeometry(3, 16, 4, false, false)
	v2 := NewGeometry(2, 16, 4, false, false)
	data := NewGeometry(3, 16, 4, false, true)
	ext := NewGeometry(3, 16, 4, true, false)
	for _, tt := range []struct {
		name         string
		g            Geometry
		word, bitmap uint64
		want         Cluster
		ok           bool
	}{
		{"empty", v3, 0, 0, Unallocated, true},
		{"data", v3, host, 0, Cluster{Host: host, Data: 1}, true},
		{"data, copied", v3, host | FlagCopied, 0, Cluster{Host: host, Data: 1, Copied: true}, true},
		{"zero", v3, 1, 0, Cluster{Host: NoHost, Zero: 1}, true},
		{"zero, allocated", v3, host | 1 | FlagCopied, 0, Cluster{Host: host, Zero: 1, Copied: true}, true},
		{"last offset", v3, OffsetMask &^ 0xffff, 0, Cluster{Host: OffsetMask &^ 0xffff, Data: 1}, true},
		{"unaligned", v3, host + 0x200, 0, Cluster{}, false},
		{"copied without cluster", v3, FlagCopied, 0, Cluster{}, false},
		{"copied zero without cluster", v3, FlagCopied | 1, 0, Cluster{}, false},
		{"zero in version 2", v2, 1, 0, Cluster{}, false},
		{"zero, allocated in version 2", v2, host | 1, 0, Cluster{}, false},
		{"data in version 2", v2, host, 0, Cluster{Host: host, Data: 1}, true},
		{"offset 0 of a data file", data, FlagCopied, 0, Cluster{Host: 0, Data: 1, Copied: true}, true},
		{"empty with a data file", data, 0, 0, Unallocated, true},
		{"compressed with a data file", data, FlagCompressed | host, 0, Cluster{}, false},
		{"compressed, copied", v3, FlagCompressed | FlagCopied | host, 0, Cluster{Host: host, Length: 512, Compressed: true, Copied: true, Data: 1}, true},
		{"extended, empty", ext, 0, 0, Unallocated, true},
		{"extended, data", ext, host, 0x0000000200000001, Cluster{Host: host, Data: 1, Zero: 2}, true},
		{"extended, all data", ext, host, 0xffffffff, Cluster{Host: host, Data: 0xffffffff}, true},
		{"extended, all zero", ext, 0, 0xffffffff00000000, Cluster{Host: NoHost, Zero: 0xffffffff}, true},
		{"extended, both", ext, host, 0x0000000100000001, Cluster{}, false},
		{"extended, data without cluster", ext, 0, 1, Cluster{}, false},
		{"extended, bit 0", ext, host | 1, 1, Cluster{Host: host, Data: 1}, true},
		{"extended, bitmap of none", ext, host, 0, Cluster{Host: host}, true},
		{"extended, compressed", ext, FlagCompressed | host, 0x0000000100000001, Cluster{Host: host, Length: 512, Compressed: true, Data: 0xffffffff}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.g.DecodeL2(tt.word, tt.bitmap)
			var c Corrupt
			switch {
			case !tt.ok:
				if !errors.As(err, &c) {
					t.Errorf("got %+v, error %v, want one of type Corrupt", got, err)
				}
			case err != nil || got != tt.want:
				t.Errorf("got %+v, %v, want %+v", got, err, tt.want)
			case got.HasHost() != (tt.want.Host >= 0 && !tt.want.Compressed):
				t.Errorf("HasHost %v of %+v", got.HasHost(), got)
			}
		})
	}
}

// Every combination of flags that means something is written and read alike.
func TestEncodeL2IsTheReverseOfDecodeL2(t *testing.T) {
	for _, extended := range []bool{false, true} {
		g := NewGeometry(3, 16, 4, extended, false)
		for _, c := range []Cluster{
			Unallocated,
			{Host: NoHost, Zero: g.AllSubs()},
			{Host: 0x50000, Data: g.AllSubs()},
			{Host: 0x50000, Data: g.AllSubs(), Copied: true},
			{Host: 0x50000, Zero: g.AllSubs(), Copied: true},
			{Host: 0x50123, Length: 3*512 - 0x123, Compressed: true, Data: g.AllSubs()},
		} {
			got, err := g.DecodeL2(g.EncodeL2(c))
			if err != nil || got != c {
				t.Errorf("extended %v: got %+v, %v, want %+v", extended, got, err, c)
			}
		}
	}
}

// A reserved bit is refused in each place, and no other.
func TestReservedBits(t *testing.T) {
	const host = 0x50000
	g := NewGeometry(3, 9, 4, false, false)
	for bit := range 64 {
		word := uint64(host) | 1<<bit
		_, _, err := g.DecodeL1(word)
		if bad := bit <= 8 || bit >= 56 && bit <= 62; bad != (err != nil) {
			t.Errorf("L1 bit %d: error %v", bit, err)
		}
		_, err = g.DecodeL2(word, 0)
		if bad := bit >= 1 && bit <= 8 || bit >= 56 && bit <= 61; bad != (err != nil) {
			t.Errorf("L2 bit %d: error %v", bit, err)
		}
		_, err = g.DecodeRefTable(word)
		if bad := bit <= 8 || bit == 63; bad != (err != nil) {
			t.Errorf("refcount table bit %d: error %v", bit, err)
		}
	}
}

func TestL1Entries(t *testing.T) {
	g := NewGeometry(3, 16, 4, false, false)
	for _, tt := range []struct {
		e      uint64
		off    int64
		copied bool
	}{{0, 0, false}, {0x40000, 0x40000, false}, {0x8000000000040000, 0x40000, true}, {0x00ffffffffff0000, 0x00ffffffffff0000, false}} {
		off, copied, err := g.DecodeL1(tt.e)
		if err != nil || off != tt.off || copied != tt.copied || EncodeL1(off, copied) != tt.e {
			t.Errorf("%#x: got %#x, %v, %v", tt.e, off, copied, err)
		}
	}
	for _, e := range []uint64{0x8000000000042a00, 0xc000000000040001, 0x200} {
		if off, _, err := g.DecodeL1(e); err == nil {
			t.Errorf("%#x: got %#x", e, off)
		}
	}
}

func TestRefTableEntries(t *testing.T) {
	g := NewGeometry(3, 16, 4, false, false)
	for e, ok := range map[uint64]bool{
		0: true, 0x20000: true, 0x7fffffffffff0000: true,
		0x22a00: false, 1: false, 0xffffffffffff0000: false,
	} {
		off, err := g.DecodeRefTable(e)
		if (err == nil) != ok || ok && off != int64(e) {
			t.Errorf("%#x: got %#x, %v", e, off, err)
		}
	}
}

// Every entry of a block of 8 bytes is written with values of every bit, in a
// block of ones and one of zeroes, and changes no other.
func TestRefcounts(t *testing.T) {
	for order := range uint(7) {
		g := NewGeometry(3, 9, order, false, false)
		width := uint64(1) << order
		highest := ^uint64(0) >> (64 - width)
		if g.MaxRefcount() != highest || g.BlockEntries != int64(4096/width) {
			t.Fatalf("order %d: largest %#x, %d entries", order, g.MaxRefcount(), g.BlockEntries)
		}
		n := int64(64 / width)
		for i := range n {
			for bit := range width {
				for _, v := range []uint64{0, highest, 1 << bit, highest &^ (1 << bit)} {
					checkRefcount(t, &g, n, i, v)
				}
			}
		}
	}
}

func checkRefcount(t *testing.T, g *Geometry, n, i int64, v uint64) {
	t.Helper()
	for _, before := range []uint64{0, g.MaxRefcount()} {
		block := make([]byte, 8)
		for j := range n {
			g.SetRefcount(block, j, before)
		}
		g.SetRefcount(block, i, v)
		for j := range n {
			want := before
			if j == i {
				want = v
			}
			if got := g.Refcount(block, j); got != want {
				t.Fatalf("order %d, entry %d set to %#x: entry %d is %#x, want %#x", g.RefcountOrder, i, v, j, got, want)
			}
		}
	}
}

// Where the bits of an entry lie: small ones from the lowest bit of a byte
// on, large ones with the highest byte first.
func TestRefcountPlaces(t *testing.T) {
	for _, tt := range []struct {
		order uint
		i     int64
		v     uint64
		want  [16]byte
	}{
		{0, 0, 1, [16]byte{0x01}},
		{0, 9, 1, [16]byte{0, 0x02}},
		{1, 1, 3, [16]byte{0x0c}},
		{2, 1, 0xf, [16]byte{0xf0}},
		{3, 1, 0x12, [16]byte{0, 0x12}},
		{4, 1, 0x1234, [16]byte{0, 0, 0x12, 0x34}},
		{5, 1, 0x12345678, [16]byte{4: 0x12, 5: 0x34, 6: 0x56, 7: 0x78}},
		{6, 1, 0x123456789abcdef0, [16]byte{8: 0x12, 9: 0x34, 10: 0x56, 11: 0x78, 12: 0x9a, 13: 0xbc, 14: 0xde, 15: 0xf0}},
	} {
		g := NewGeometry(3, 16, tt.order, false, false)
		var block [16]byte
		g.SetRefcount(block[:], tt.i, tt.v)
		if block != tt.want {
			t.Errorf("order %d, entry %d, %#x: got %x, want %x", tt.order, tt.i, tt.v, block, tt.want)
		}
	}
}

func TestGeometry(t *testing.T) {
	for _, tt := range []struct {
		bits               uint
		extended           bool
		entries, coverage  int64
		size, l1, clusters int64
	}{
		{9, false, 64, 32 << 10, 1<<63 - 512, 1 << 48, 1<<54 - 1},
		{16, false, 8192, 512 << 20, 512 << 20, 1, 8192},
		{16, false, 8192, 512 << 20, 512<<20 + 1, 2, 8193},
		{16, true, 4096, 256 << 20, 512 << 20, 2, 8192},
		{21, false, 262144, 512 << 30, 0, 0, 0},
		{21, false, 262144, 512 << 30, 1<<63 - 1, 1 << 24, 1 << 42},
	} {
		g := NewGeometry(3, tt.bits, 4, tt.extended, false)
		if g.L2Entries != tt.entries || g.L2Coverage != tt.coverage || g.L1Size(tt.size) != tt.l1 || g.Clusters(tt.size) != tt.clusters {
			t.Errorf("cluster bits %d, size %d: %+v, L1 of %d, clusters %d", tt.bits, tt.size, g, g.L1Size(tt.size), g.Clusters(tt.size))
		}
	}
}

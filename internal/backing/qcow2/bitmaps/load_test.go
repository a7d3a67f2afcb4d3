package bitmaps_test

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var quiet = slog.New(slog.DiscardHandler)

// one is an image with a bitmap, and where its parts are.
type one struct {
	b             []byte
	ext, dir, tab int64
}

// newOne makes the image of the catalogue's rows V1 to V6.
func newOne(t testing.TB) one {
	b := create(t, "cluster_size=64k", "64m", []string{"add", "-g", "64k", "b0"}, []string{"io", "write 0 1k"})
	h, err := format.ParseHeader(b)
	must(t, err)
	dir := int64(h.Bitmaps.DirOffset)
	return one{b, int64(payloadOf(t, b)) - 8, dir, int64(binary.BigEndian.Uint64(b[dir:]))}
}

// patched is the image with bytes of hexadecimal digits at off.
func (o *one) patched(t testing.TB, off int64, digits string) *storetest.Mem {
	t.Helper()
	p, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	must(t, err)
	st := storetest.New(o.b)
	st.Patch(off, p)
	return st
}

// TestLoadRefusesBrokenBitmaps has rows V1 to V4 of the catalogue and what
// else does not lie in the file. The error has the kind that callers look for.
func TestLoadRefusesBrokenBitmaps(t *testing.T) {
	o := newOne(t)
	end := (int64(len(o.b)) + 65535) &^ 65535
	for _, tt := range []struct {
		row    string
		off    int64
		digits string
		want   string
	}{
		{"V1 no bitmaps", o.ext + 8, "00000000", "zero bitmaps"},
		{"V1 too many", o.ext + 8, "00010000", "65536 bitmaps"},
		{"V1 more than there are", o.ext + 8, "00000002", "directory of"},
		{"V2 reserved", o.ext + 12, "00000001", "reserved field"},
		{"V2 size 0", o.ext + 16, "0000000000000000", "directory of 0 bytes"},
		{"V2 size", o.ext + 16, "ffffffffffffffff", "directory of"},
		{"V2 size odd", o.ext + 16, "0000000000000019", "ends within the entry"},
		{"V2 offset unaligned", o.ext + 24, fmt.Sprintf("%016x", o.dir+8), "directory offset"},
		{"V2 offset past the end", o.ext + 24, fmt.Sprintf("%016x", end+65536), "beyond the end"},
		{"V2 offset at the end", o.ext + 24, fmt.Sprintf("%016x", end), "beyond the end"},
		{"V2 length", o.ext + 4, "00000017", "invalid length 23"},
		{"V3 table 0", o.dir, "0000000000000000", "table offset 0x0"},
		{"V3 table unaligned", o.dir, fmt.Sprintf("%016x", o.tab+8), "table offset"},
		{"V3 table past the end", o.dir, fmt.Sprintf("%016x", end+65536), "beyond the end"},
		{"V3 entries", o.dir + 8, "7fffffff", "table of 2147483647 entries"},
		{"V3 entries", o.dir + 8, "00000002", "the disk needs 1"},
		{"V3 flags", o.dir + 12, "00000008", "reserved bits"},
		{"V3 type", o.dir + 16, "02", "unknown type 2"},
		{"V3 granularity", o.dir + 17, "08", "granularity 2^8"},
		{"V3 granularity", o.dir + 17, "20", "granularity 2^32"},
		{"V3 name", o.dir + 18, "0000", "name of 0 bytes"},
		{"V3 name", o.dir + 18, "ffff", "name of 65535 bytes"},
		{"V3 extra", o.dir + 20, "00000008", "ends within the entry"},
		{"V4 reserved", o.tab, "0000000000000002", "reserved bits"},
		{"V4 ones with an offset", o.tab, "0000000000050001", "reserved bits"},
		{"bits past the end", o.tab, fmt.Sprintf("%016x", end+65536), "beyond the end"},
		{"bits unaligned", o.tab, "0000000000050200", "cluster boundary"},
	} {
		t.Run(tt.row, func(t *testing.T) {
			st := o.patched(t, tt.off, tt.digits)
			h := header(t, st)
			_, err := bitmaps.Load(ctx, st, h, int64(h.Size), bitmaps.Options{Log: quiet})
			if !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("load: got %v, want %v with %q", err, backing.ErrInvalid, tt.want)
			}
			if st.Count(storetest.Write) != 0 {
				t.Error("load wrote to the file")
			}
		})
	}
}

// TestLoadOfMarkedAndClearedBitmaps has rows V5 and V6.
func TestLoadOfMarkedAndClearedBitmaps(t *testing.T) {
	o := newOne(t)
	s, _ := load(t, o.patched(t, o.dir+12, "00000003"))
	if got := s.List(); len(got) != 1 || got[0].Usable || len(s.Exposed(false)) != 0 || s.Tracking() || !s.Begun() {
		t.Errorf("in use: got %+v, exposed %q", got, s.Exposed(false))
	}
	if err := s.Describe(bitmaps.Prefix+"b0", 0, 1, nil); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("describe what is in use: got %v", err)
	}
	s, h := load(t, o.patched(t, format.OffAutoclear, "0000000000000000"))
	if got := s.Names(); len(got) != 0 || !s.Begun() || !h.StaleBitmaps {
		t.Errorf("autoclear bit clear: got %q, want none", got)
	}
}

// TestUnknownExtraDataIsKept: without the flag that allows it the bitmap is
// not used, and what a writer would have to keep up to date is marked.
func TestUnknownExtraDataIsKept(t *testing.T) {
	for _, compatible := range []bool{false, true} {
		o := newOne(t)
		h, err := format.ParseHeader(o.b)
		must(t, err)
		list, err := format.ParseBitmaps(o.b[o.dir:][:h.Bitmaps.DirSize], 1)
		must(t, err)
		list[0].Extra, list[0].ExtraCompatible = []byte("unknown"), compatible
		dir, err := format.EncodeBitmaps(list)
		must(t, err)
		h.Bitmaps.DirSize = uint64(len(dir))
		st := storetest.New(o.b)
		st.Patch(o.dir, dir)
		st.Patch(0, reheaded(t, o.b, func(x *format.Header) { x.Bitmaps = h.Bitmaps })[:65536])
		s, h := load(t, st)
		if got := s.List()[0].Usable; got != compatible {
			t.Errorf("compatible %v: usable %v", compatible, got)
		}
		must(t, s.Begin(ctx))
		s.Mark(32<<20, 1)
		must(t, s.Save(ctx, allocator(t, st, h)))
		b := st.Contents()
		list, err = format.ParseBitmaps(b[h.Bitmaps.DirOffset:][:h.Bitmaps.DirSize], 1)
		must(t, err)
		if m := list[0]; string(m.Extra) != "unknown" || m.ExtraCompatible != compatible || m.InUse == compatible {
			t.Errorf("compatible %v: got %+v", compatible, m)
		}
		if r := audit(t, st); r.Corruptions != 0 || r.Leaks != 0 {
			t.Errorf("compatible %v: %v", compatible, r.Problems)
		}
	}
}

// TestLoadReadsOnes: an entry without a cluster may say that all bits are set.
func TestLoadReadsOnes(t *testing.T) {
	for _, clusterSize := range []string{"512", "64k"} {
		b := create(t, "cluster_size="+clusterSize, "40m", []string{"add", "-g", "512", "b0"}, []string{"disable", "b0"})
		h, err := format.ParseHeader(b)
		must(t, err)
		tab := binary.BigEndian.Uint64(b[h.Bitmaps.DirOffset:])
		binary.BigEndian.PutUint64(b[tab:], 1)
		st := storetest.New(b)
		s, h := load(t, st)
		if got := described(t, s, h, "b0"); got[0].Value != 1 {
			t.Errorf("got %v, want ones first", got)
		}
		same(t, b, s, h)
		sp := allocator(t, st, h)
		if err := s.Save(ctx, sp); err != nil || st.Count(storetest.Write) != 0 {
			t.Errorf("save of what has not changed: %v, %d writes", err, st.Count(storetest.Write))
		}
	}
}

// TestOnesCountAsMemory: a small cluster of ones beside one of zeroes takes a
// page.
func TestOnesCountAsMemory(t *testing.T) {
	b := create(t, "cluster_size=512", "8g", []string{"add", "-g", "4k", "b0"}, []string{"disable", "b0"})
	h, err := format.ParseHeader(b)
	must(t, err)
	tab := binary.BigEndian.Uint64(b[h.Bitmaps.DirOffset:])
	for i := uint64(0); i < 512; i += 8 {
		binary.BigEndian.PutUint64(b[tab+i*8:], 1)
	}
	for limit, want := range map[int64]bool{100 << 10: false, 300 << 10: true} {
		_, err := bitmaps.Load(ctx, storetest.New(b), h, int64(h.Size), bitmaps.Options{Log: quiet, Limit: limit})
		if got := err == nil; got != want {
			t.Errorf("limit %d: got %v, want success %v", limit, err, want)
		}
	}
}

// TestLoadIsBounded: what the bits take is known before they are read.
func TestLoadIsBounded(t *testing.T) {
	b := create(t, "cluster_size=64k", "8g", []string{"add", "-g", "4k", "b0"}, []string{"io", "write 0 1k", "write 7g 1k"},
		[]string{"disable", "b0"})
	st := storetest.New(b)
	h := header(t, st)
	// 256 KiB of bits, two clusters of which are not zero.
	for _, tt := range []struct {
		limit int64
		ok    bool
	}{{1 << 10, false}, {64 << 10, false}, {150 << 10, true}, {0, true}} {
		st := storetest.New(b)
		s, err := bitmaps.Load(ctx, st, h, int64(h.Size), bitmaps.Options{Log: quiet, Limit: tt.limit})
		if got := err == nil; got != tt.ok {
			t.Errorf("limit %d: got %v, want success %v", tt.limit, err, tt.ok)
		}
		if !tt.ok && (!errors.Is(err, backing.ErrInvalid) || st.Bytes(storetest.Read) > 16<<10) {
			t.Errorf("limit %d: got %v after reading %d bytes", tt.limit, err, st.Bytes(storetest.Read))
		}
		if err != nil || tt.limit == 0 {
			continue
		}
		// A bitmap whose bits may all change counts in full.
		if err := s.Enable("b0"); !errors.Is(err, backing.ErrInvalid) || s.Tracking() {
			t.Errorf("limit %d: enable: got %v, want a refusal", tt.limit, err)
		}
		if err := s.Add("b1", 12, true); !errors.Is(err, backing.ErrInvalid) {
			t.Errorf("limit %d: add: got %v, want a refusal", tt.limit, err)
		}
		must(t, s.Remove("b0"))
		if err := s.Add("b1", 14, true); err != nil {
			t.Errorf("limit %d: add to the room of another: %v", tt.limit, err)
		}
	}
}

// TestLoadPassesErrorsOn fails each call of Load.
func TestLoadPassesErrorsOn(t *testing.T) {
	o := newOne(t)
	for n := 1; ; n++ {
		st := storetest.New(o.b)
		h := header(t, st)
		before := st.Calls()
		st.FailCall(n, errors.New("boom"))
		_, err := bitmaps.Load(ctx, st, h, int64(h.Size), bitmaps.Options{Log: quiet})
		if st.Calls()-before < n {
			if n < 4 {
				t.Errorf("load makes %d calls", n-1)
			}
			return
		}
		if !errors.Is(err, backing.ErrIO) || errors.Is(err, backing.ErrInvalid) {
			t.Errorf("call %d fails: got %v, want %v", n, err, backing.ErrIO)
		}
	}
}

func TestExposed(t *testing.T) {
	st := storetest.New(create(t, "cluster_size=64k", "64m", []string{"add", "on"}, []string{"add", "--disable", "off"}))
	s, _ := load(t, st)
	if got, want := s.Exposed(true), []string{"qemu:dirty-bitmap:off"}; !slices.Equal(got, want) {
		t.Errorf("writable: got %q, want %q", got, want)
	}
	if got, want := s.Exposed(false), []string{"qemu:dirty-bitmap:on", "qemu:dirty-bitmap:off"}; !slices.Equal(got, want) {
		t.Errorf("read-only: got %q, want %q", got, want)
	}
}

// TestNamesThatAreNotTextAreNotExposed: the name of a context is UTF-8.
func TestNamesThatAreNotTextAreNotExposed(t *testing.T) {
	o := newOne(t)
	for _, digits := range []string{"62ff", "6200", "620a"} {
		s, _ := load(t, o.patched(t, o.dir+24, digits))
		if got := s.Exposed(false); len(got) != 0 || len(s.Names()) != 1 {
			t.Errorf("%s: got %q of %q", digits, got, s.Names())
		}
	}
}

func TestDescribeStopsAndRefuses(t *testing.T) {
	o := newOne(t)
	s, _ := load(t, storetest.New(o.b))
	var got []backing.Status
	must(t, s.Describe(bitmaps.Prefix+"b0", 1000, 64<<20-1000, func(x backing.Status) bool {
		got = append(got, x)
		return false
	}))
	if want := []backing.Status{{Len: 64<<10 - 1000, Value: 1}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, tt := range []struct {
		name   string
		off, n int64
		want   error
	}{
		{"b0", 0, 1, backing.ErrInvalid},
		{bitmaps.Prefix + "b1", 0, 1, backing.ErrInvalid},
		{bitmaps.Prefix + "b0", -1, 1, backing.ErrOutOfRange},
		{bitmaps.Prefix + "b0", 64 << 20, 1, backing.ErrOutOfRange},
		{bitmaps.Prefix + "b0", 1, 64 << 20, backing.ErrOutOfRange},
		{bitmaps.Prefix + "b0", 64 << 20, 0, nil},
	} {
		if err := s.Describe(tt.name, tt.off, tt.n, nil); !errors.Is(err, tt.want) {
			t.Errorf("describe %q %d+%d: got %v, want %v", tt.name, tt.off, tt.n, err, tt.want)
		}
	}
}

package bitmaps_test

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// TestBeginDoesAsQemuDoes: bitmaps count as absent while their directory is
// rewritten where it lies.
func TestBeginDoesAsQemuDoes(t *testing.T) {
	o := newOne(t)
	st := storetest.NewCrash(storetest.New(o.b))
	s, h := load(t, st)
	var got []string
	st.SetHook(func(c storetest.Call) {
		if c.Done {
			got = append(got, fmt.Sprintf("%s %#x+%d", c.Op, c.Off, c.Len))
		}
	})
	must(t, s.Begin(ctx))
	must(t, s.Begin(ctx))
	clear := fmt.Sprintf("write %#x+8", format.OffAutoclear)
	want := []string{clear, "sync 0x0+0", fmt.Sprintf("write %#x+%d", o.dir, h.Bitmaps.DirSize), "sync 0x0+0", clear, "sync 0x0+0"}
	if !slices.Equal(got, want) {
		t.Errorf("calls: got %q, want %q", got, want)
	}
}

// TestBeginLeavesAloneWhatWritesDoNotChange: there is nothing to do for
// bitmaps that are disabled.
func TestBeginLeavesAloneWhatWritesDoNotChange(t *testing.T) {
	b := create(t, "cluster_size=64k", "64m", []string{"add", "--disable", "off"})
	st := storetest.New(b)
	s, h := load(t, st)
	sp := allocator(t, st, h)
	if !s.Begun() || s.Tracking() {
		t.Errorf("begun %v, tracking %v", s.Begun(), s.Tracking())
	}
	must(t, s.Begin(ctx))
	s.Mark(0, 64<<20)
	must(t, s.Save(ctx, sp))
	if st.Count(storetest.Write)+st.Count(storetest.Sync) != 0 {
		t.Error("the file was written to")
	}
	if got := described(t, s, h, "off"); !slices.Equal(got, []extent{{0, 64 << 20, 0}}) {
		t.Errorf("a disabled bitmap was marked: %v", got)
	}
}

// TestMarkKeepsToTheDisk: parts of a range that are not in the disk count for
// nothing.
func TestMarkKeepsToTheDisk(t *testing.T) {
	o := newOne(t)
	const size = 64 << 20
	for _, tt := range []struct {
		off, n int64
		want   []extent
	}{
		{0, 0, []extent{{0, size, 0}}},
		{5, -1, []extent{{0, size, 0}}},
		{size, 1, []extent{{0, size, 0}}},
		{1 << 62, 1 << 62, []extent{{0, size, 0}}},
		{-1 << 63, 1<<63 - 1, []extent{{0, size, 0}}},
		{-5, 6, []extent{{0, 65536, 1}, {65536, size - 65536, 0}}},
		{65535, 2, []extent{{0, 131072, 1}, {131072, size - 131072, 0}}},
		{size - 1, 1<<63 - 1, []extent{{0, size - 65536, 0}, {size - 65536, 65536, 1}}},
		{0, 1<<63 - 1, []extent{{0, size, 1}}},
	} {
		s, h := load(t, storetest.New(o.b))
		must(t, s.Clear("b0"))
		s.Mark(tt.off, tt.n)
		if got := described(t, s, h, "b0"); !slices.Equal(got, tt.want) {
			t.Errorf("mark %d+%d: got %v, want %v", tt.off, tt.n, got, tt.want)
		}
	}
}

// TestMarkDoesNotAllocate where the neighbourhood is marked.
func TestMarkDoesNotAllocate(t *testing.T) {
	o := newOne(t)
	s, _ := load(t, storetest.New(o.b))
	s.Mark(0, 1)
	off := int64(0)
	if n := testing.AllocsPerRun(500, func() { s.Mark(off, 4096); off += 64 << 10 }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestAddRefuses(t *testing.T) {
	s, _ := load(t, storetest.New(create(t, "cluster_size=64k", "16t", []string{"add", "there"})))
	for _, tt := range []struct {
		name        string
		granularity uint8
		want        string
	}{
		{"", 0, "1 to 1023 bytes"},
		{strings.Repeat("x", 1024), 0, "1 to 1023 bytes"},
		{"a\x00b", 0, "plain text"},
		{"a\xff", 0, "plain text"},
		{"there", 0, "already"},
		{"new", 8, "granularity"},
		{"new", 32, "granularity"},
		{"new", 11, "bytes of bits"},
		{"new", 12, "bytes of memory"},
	} {
		if err := s.Add(tt.name, tt.granularity, true); !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("add %q 2^%d: got %v, want %q", tt.name, tt.granularity, err, tt.want)
		}
	}
	must(t, s.Add("new", 31, true))
	must(t, s.Add(strings.Repeat("x", 1023), 12, false))
	must(t, s.Remove("new"))
	old, _ := load(t, storetest.New(create(t, "compat=0.10", "1m")))
	if err := old.Add("new", 0, true); err == nil || !strings.Contains(err.Error(), "version 3") {
		t.Errorf("add to version 2: got %v", err)
	}
	empty, _ := load(t, storetest.New(create(t, "cluster_size=64k", "0")))
	if err := empty.Add("new", 0, true); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("add to an empty disk: got %v", err)
	}
	for _, call := range []func(string) error{s.Remove, s.Clear, s.Enable, s.Disable,
		func(n string) error { return s.Merge(n, "there") }, func(n string) error { return s.Merge("there", n) }} {
		if err := call("nowhere"); !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), "no bitmap") {
			t.Errorf("change of an unknown bitmap: got %v", err)
		}
	}
}

// TestDirectoryIsBounded: no more names are taken than can be read again.
func TestDirectoryIsBounded(t *testing.T) {
	st := storetest.New(create(t, "cluster_size=512", "1m"))
	s, h := load(t, st)
	for i := range 70 {
		must(t, s.Add(fmt.Sprintf("%04d%s", i, strings.Repeat("x", 1019)), 0, false))
	}
	must(t, s.Save(ctx, allocator(t, st, h)))
	clean(t, st.Contents())
	again, _ := load(t, storetest.New(st.Contents()))
	if got, want := again.Names(), s.Names(); !slices.Equal(got, want) {
		t.Errorf("%d names, want %d", len(got), len(want))
	}
}

// TestDefaultGranularityIsQemus adds with both.
func TestDefaultGranularityIsQemus(t *testing.T) {
	for _, clusterSize := range []string{"512", "4k", "32k", "64k", "2m"} {
		b := create(t, "cluster_size="+clusterSize, "1m", []string{"add", "theirs"})
		s, _ := load(t, storetest.New(b))
		must(t, s.Add("ours", 0, true))
		list := s.List()
		if list[0].Granularity != list[1].Granularity {
			t.Errorf("clusters of %s: got %d, want %d", clusterSize, list[1].Granularity, list[0].Granularity)
		}
	}
}

// TestMergeAndClearAgreeWithQemu does the same here and there, between bitmaps
// of one granularity.
func TestMergeAndClearAgreeWithQemu(t *testing.T) {
	b := create(t, "cluster_size=64k", "300m",
		[]string{"add", "-g", "4k", "a"}, []string{"io", "write 0 1k", "write 100m 3m", "write 299m 1m"}, []string{"disable", "a"},
		[]string{"add", "-g", "4k", "b"}, []string{"io", "write 50m 51m", "write 7m 1k"},
		[]string{"add", "-g", "4k", "c"}, []string{"add", "-g", "4k", "d"})
	theirs := change(t, b, []string{"merge", "a", "b"}, []string{"merge", "c", "b"}, []string{"merge", "c", "a"},
		[]string{"clear", "b"}, []string{"enable", "a"}, []string{"disable", "d"})
	st := storetest.New(b)
	s, h := load(t, st)
	must(t, s.Merge("a", "b"))
	must(t, s.Merge("c", "b"))
	must(t, s.Merge("c", "a"))
	must(t, s.Merge("c", "c"))
	must(t, s.Clear("b"))
	must(t, s.Enable("a"))
	must(t, s.Disable("d"))
	same(t, theirs, s, h)
	must(t, s.Save(ctx, allocator(t, st, h)))
	clean(t, st.Contents())
	same(t, st.Contents(), s, h)
	ours := infos(t, st.Contents())
	for i, want := range infos(t, theirs) {
		if got := ours[i]; got.Name != want.Name || !slices.Equal(got.Flags, want.Flags) || got.Granularity != want.Granularity {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

// TestMergeCoversOtherGranularities: every byte that is dirty in the source is
// so afterwards, and no bit is set that has none.
func TestMergeCoversOtherGranularities(t *testing.T) {
	const size = 5<<20 + 512*3
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for _, shift := range []uint8{9, 12, 16, 20} {
		st := storetest.New(create(t, "cluster_size=64k", fmt.Sprint(size)))
		s, h := load(t, st)
		must(t, s.Add("src", 13, true))
		must(t, s.Add("dst", shift, false))
		must(t, s.Add("want", shift, true))
		for range 20 {
			s.Mark(r.Int64N(size), r.Int64N(30000))
		}
		// A bit of src stands for all of its bytes.
		for _, e := range described(t, s, h, "src") {
			if e.Value == 1 {
				s.Mark(e.Off, e.Len)
			}
		}
		must(t, s.Merge("dst", "src"))
		if got, want := described(t, s, h, "dst"), described(t, s, h, "want"); !slices.Equal(got, want) {
			t.Errorf("seed %d, granularity 2^%d: got %v, want %v", seed, shift, got, want)
		}
	}
}

// TestNoRoomInTheHeader: the image is not touched when the extension does not
// fit.
func TestNoRoomInTheHeader(t *testing.T) {
	b := create(t, "cluster_size=512", "1m")
	b = reheaded(t, b, func(h *format.Header) {
		h.Extensions = append(h.Extensions, format.Extension{Type: 0x12345678, Data: make([]byte, 360)})
	})
	st := storetest.New(b)
	s, h := load(t, st)
	sp := allocator(t, st, h)
	must(t, s.Add("new", 0, true))
	if err := s.Save(ctx, sp); !errors.Is(err, backing.ErrInvalid) || !strings.Contains(err.Error(), "no room") {
		t.Fatalf("save: got %v, want a refusal", err)
	}
	must(t, s.Remove("new"))
	must(t, s.Save(ctx, sp))
	must(t, sp.Write(ctx))
	if _, h := load(t, st); h.Autoclear != 0 || h.Bitmaps != nil {
		t.Errorf("header: %+v", h)
	}
	if r := audit(t, st); r.Corruptions+r.Leaks != 0 {
		t.Errorf("%v", r.Problems)
	}
}

// TestSaveWithoutSpaceCanBeRepeated: on a device that is full nothing changes,
// and what is removed makes room.
func TestSaveWithoutSpaceCanBeRepeated(t *testing.T) {
	b := create(t, "cluster_size=512", "8m", []string{"add", "-g", "512", "old"}, []string{"io", "write 1m 100k"})
	b = append(b, make([]byte, -len(b)&511+8*512)...)
	st := storetest.New(b)
	st.SetFixed(true)
	s, h := load(t, st)
	sp := allocator(t, st, h)
	must(t, s.Begin(ctx))
	must(t, s.Add("new", 9, true))
	for off := int64(0); off < 8<<20; off += 64 << 10 {
		s.Mark(off, 512)
	}
	want := described(t, s, h, "new")
	if err := s.Save(ctx, sp); !errors.Is(err, backing.ErrNoSpace) {
		t.Fatalf("save: got %v, want %v", err, backing.ErrNoSpace)
	}
	if again, _ := load(t, st); usable(again) != 0 {
		t.Error("a bitmap in the file is believed")
	}
	must(t, s.Remove("old"))
	must(t, s.Clear("new"))
	s.Mark(0, 4096)
	want = described(t, s, h, "new")
	must(t, s.Save(ctx, sp))
	again, _ := load(t, st)
	if got := described(t, again, h, "new"); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	clean(t, st.Contents())
}

// TestAllAtOnce marks, asks and changes from many goroutines.
func TestAllAtOnce(t *testing.T) {
	o := newOne(t)
	st := storetest.New(o.b)
	s, err := bitmaps.Load(ctx, st, header(t, st), 64<<20, bitmaps.Options{Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	var wg sync.WaitGroup
	for k := range int64(3) {
		wg.Go(func() {
			for i := range int64(300) {
				if err := s.Begin(ctx); err != nil {
					t.Error(err)
				}
				s.Mark((i*7+k)<<16&(64<<20-1), 1<<17)
				s.Exposed(i%2 == 0)
				if err := s.Describe(bitmaps.Prefix+"b0", 0, 64<<20, func(backing.Status) bool { return true }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 100 {
			name := fmt.Sprint(i)
			for _, err := range []error{s.Add(name, 0, i%2 == 0), s.Enable(name), s.Merge(name, "b0"), s.Clear("b0"),
				s.Merge("b0", name), s.Disable(name), s.Remove(name)} {
				if err != nil {
					t.Error(err)
				}
			}
		}
	})
	wg.Wait()
	if got := s.Names(); !slices.Equal(got, []string{"b0"}) || !s.Begun() {
		t.Errorf("names: got %q, begun %v", got, s.Begun())
	}
}

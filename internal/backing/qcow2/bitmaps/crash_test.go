package bitmaps_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// scenario is an image and what is done to its bitmaps.
type scenario struct {
	name   string
	image  func(t *testing.T) []byte
	change func(t *testing.T, s *bitmaps.Set)
	before func(t *testing.T, s *bitmaps.Set) // comes before Begin; nil for nothing
}

// must fails for a change that is refused.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reheaded is b with another header, which keeps everything else.
func reheaded(t testing.TB, b []byte, f func(h *format.Header)) []byte {
	t.Helper()
	h, err := format.ParseHeader(b)
	must(t, err)
	f(h)
	p, err := h.Encode()
	must(t, err)
	return append(p, b[len(p):]...)
}

// torn moves the bitmaps extension so that its payload lies in two sectors.
func torn(t testing.TB, b []byte) []byte {
	b = reheaded(t, b, func(h *format.Header) {
		h.Unknown = make([]byte, 376)
	})
	if at := payloadOf(t, b); at/512 == (at+23)/512 {
		t.Fatalf("the payload at %d lies in one sector", at)
	}
	return b
}

// payloadOf is the offset of the payload of the bitmaps extension.
func payloadOf(t testing.TB, b []byte) int {
	t.Helper()
	at := strings.Index(string(b[:min(len(b), 4096)]), "\x23\x85\x28\x75\x00\x00\x00\x18")
	if at < 0 {
		t.Fatal("the header has no bitmaps extension")
	}
	return at + 8
}

// three is an image with a bitmap that is kept up to date, one that is not, and
// one that was not stored.
func three(t *testing.T, clusterSize string) []byte {
	b := create(t, "cluster_size="+clusterSize, "8m",
		[]string{"add", "-g", "512", "auto"}, []string{"add", "-g", "512", "off"}, []string{"io", "write 1m 3k", "write 6m 1k"},
		[]string{"disable", "off"}, []string{"add", "-g", "512", "lost"})
	st := storetest.New(b)
	s, h := load(t, st)
	must(t, s.Remove("off")) // so that only two are marked
	must(t, s.Save(ctx, allocator(t, st, h)))
	must(t, s.Begin(ctx))
	marked := st.Contents() // auto and lost are in use
	s, h = load(t, storetest.New(marked))
	if got := s.Names(); !slices.Equal(got, []string{"auto", "lost"}) {
		t.Fatalf("names: got %q", got)
	}
	st = storetest.New(marked)
	s, h = load(t, st)
	must(t, s.Remove("auto"))
	must(t, s.Add("auto", 9, true))
	must(t, s.Add("off", 9, true))
	s.Mark(1<<20, 3<<10)
	s.Mark(6<<20, 1<<10)
	must(t, s.Disable("off"))
	must(t, s.Save(ctx, allocator(t, st, h)))
	b = st.Contents()
	clean(t, b)
	return b
}

// overlay is an image without bitmaps and with a backing file, whose name lies
// where the extension of bitmaps would be.
func overlay(t *testing.T) []byte {
	path := filepath.Join(t.TempDir(), "top")
	base := write(t, make([]byte, 1<<20))
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "raw", path, "8m")
	return read(t, path)
}

func touch(t *testing.T, s *bitmaps.Set) {
	s.Mark(2<<20, 3<<20)
	s.Mark(7<<20, 512)
}

var scenarios = []scenario{
	{"torn payload and one more", func(t *testing.T) []byte { return torn(t, three(t, "4k")) }, func(t *testing.T, s *bitmaps.Set) {
		must(t, s.Add("one more", 9, true))
		touch(t, s)
	}, nil},
	{"torn payload and one less", func(t *testing.T) []byte { return torn(t, three(t, "4k")) }, func(t *testing.T, s *bitmaps.Set) {
		must(t, s.Remove("lost"))
		touch(t, s)
	}, nil},
	{"enable", func(t *testing.T) []byte { return three(t, "4k") }, touch,
		func(t *testing.T, s *bitmaps.Set) { must(t, s.Enable("off")) }},
	{"disable", func(t *testing.T) []byte { return three(t, "4k") }, touch,
		func(t *testing.T, s *bitmaps.Set) { must(t, s.Disable("auto")) }},
	{"remove before Begin", func(t *testing.T) []byte { return three(t, "4k") }, touch,
		func(t *testing.T, s *bitmaps.Set) { must(t, s.Remove("auto")) }},
	{"small clusters", func(t *testing.T) []byte { return three(t, "512") }, touch, nil},
	{"large clusters", func(t *testing.T) []byte { return three(t, "64k") }, touch, nil},
	{"torn payload", func(t *testing.T) []byte { return torn(t, three(t, "4k")) }, touch, nil},
	{"clear", func(t *testing.T) []byte { return three(t, "4k") }, func(t *testing.T, s *bitmaps.Set) { must(t, s.Clear("auto")) }, nil},
	{"merge", func(t *testing.T) []byte { return three(t, "4k") }, func(t *testing.T, s *bitmaps.Set) {
		touch(t, s)
		must(t, s.Merge("off", "auto"))
		must(t, s.Remove("auto"))
	}, nil},
	{"remove one", func(t *testing.T) []byte { return three(t, "4k") }, func(t *testing.T, s *bitmaps.Set) {
		must(t, s.Remove("lost"))
		must(t, s.Remove("auto"))
		touch(t, s)
	}, nil},
	{"remove all", func(t *testing.T) []byte { return three(t, "4k") }, func(t *testing.T, s *bitmaps.Set) {
		for _, name := range s.Names() {
			must(t, s.Remove(name))
		}
	}, nil},
	{"remove all before others", func(t *testing.T) []byte {
		return reheaded(t, three(t, "4k"), func(h *format.Header) {
			h.Extensions = append(h.Extensions, format.Extension{Type: 0x12345678, Data: []byte("something")})
		})
	}, func(t *testing.T, s *bitmaps.Set) {
		for _, name := range s.Names() {
			must(t, s.Remove(name))
		}
	}, nil},
	{"add the first", func(t *testing.T) []byte { return create(t, "cluster_size=4k", "8m") }, addFirst, nil},
	{"add the first before a name", overlay, addFirst, nil},
	{"add the first to a torn place", func(t *testing.T) []byte {
		return reheaded(t, overlay(t), func(h *format.Header) {
			h.Unknown = make([]byte, 360)
		})
	}, addFirst, nil},
}

func addFirst(t *testing.T, s *bitmaps.Set) {
	must(t, s.Add("auto", 9, true))
	must(t, s.Begin(ctx))
	touch(t, s)
}

// judge says what may be in a file that a crash left.
type judge struct {
	*testing.T
	header *format.Header      // as it was
	right  map[string][]string // what each bitmap may be, by name
}

// contents is all bits of a bitmap as text.
func contents(t testing.TB, s *bitmaps.Set, h *format.Header, name string) string {
	return fmt.Sprint(described(t, s, h, name))
}

// judge fails unless the image in st can be used, and its bitmaps are right,
// marked or absent. It reports whether bitmaps are left that can be used.
func (j *judge) judge(what string, st *storetest.Mem) (usable int) {
	j.Helper()
	if r := audit(j, st); r.Corruptions != 0 || r.Errors != 0 {
		j.Fatalf("%s: %v", what, r.Problems)
	}
	s, h := load(j, st)
	x, y := *h, *j.header
	for _, h := range []*format.Header{&x, &y} {
		h.Autoclear, h.Bitmaps, h.StaleBitmaps = h.Autoclear&^format.AutoclearBitmaps, nil, false
		h.RefTableOffset, h.RefTableClusters = 0, 0
	}
	if !reflect.DeepEqual(x, y) {
		j.Fatalf("%s: header: got %+v, want %+v", what, x, y)
	}
	for _, m := range s.List() {
		if !m.Usable {
			continue
		}
		usable++
		if got := contents(j, s, h, m.Name); !slices.Contains(j.right[m.Name], got) {
			j.Fatalf("%s: bitmap %q: got %s, want %s", what, m.Name, got, j.right[m.Name])
		}
	}
	return usable
}

// TestPowerCutLeavesNoStaleBitmap cuts the power before each Sync of Begin and
// Save, and after the last.
func TestPowerCutLeavesNoStaleBitmap(t *testing.T) {
	seed := rand.Uint64()
	for _, tt := range scenarios {
		t.Run(tt.name, func(t *testing.T) {
			st := storetest.NewCrash(storetest.New(tt.image(t)))
			s, h := load(t, st)
			first := *h
			sp := allocator(t, st, h)
			j := &judge{t, &first, map[string][]string{}}
			old := j.note(s, h)
			states, rnd := 0, rand.New(rand.NewPCG(seed, 0))
			st.SetHook(func(c storetest.Call) {
				// What a power cut can leave before is among what it can leave now.
				if c.Op != storetest.Sync || c.Done {
					return
				}
				for name, m := range st.Crashes(rnd, 32) {
					j.judge(fmt.Sprintf("seed %d, %v, %s", seed, c, name), m)
					states++
				}
			})
			if tt.before != nil {
				tt.before(t, s)
			}
			must(t, s.Begin(ctx))
			// From here on the disk is written to: what was right before no longer is,
			// but for a bitmap that writes do not change.
			j.written(s)
			tt.change(t, s)
			j.note(s, h)
			must(t, s.Save(ctx, sp))
			must(t, st.Sync(ctx))
			st.SetHook(nil)
			if states < 30 {
				t.Errorf("%d states judged", states)
			}
			for name, right := range j.right {
				j.right[name] = right[len(right)-1:]
			}
			if got, want := j.judge("at the end", storetest.New(st.Contents())), usable(s); got != want {
				t.Errorf("%d bitmaps can be used, want %d", got, want)
			}
			clean(t, st.Contents())
			if n := len(old); n > 0 || len(s.Names()) > 0 {
				same(t, st.Contents(), s, h)
			}
		})
	}
}

func usable(s *bitmaps.Set) (n int) {
	for _, m := range s.List() {
		if m.Usable {
			n++
		}
	}
	return n
}

// written forgets what was right before the disk was written to.
func (j *judge) written(s *bitmaps.Set) {
	delete(j.right, "auto")
	for _, m := range s.List() {
		if m.Auto {
			delete(j.right, m.Name)
		}
	}
}

// note adds what the bitmaps are to what may be found.
func (j *judge) note(s *bitmaps.Set, h *format.Header) map[string][]string {
	for _, m := range s.List() {
		if m.Usable {
			j.right[m.Name] = append(j.right[m.Name], contents(j, s, h, m.Name))
		}
	}
	return j.right
}

// TestFailureLeavesNoStaleBitmap fails each call of Begin and Save, tries once
// more, and gives up.
func TestFailureLeavesNoStaleBitmap(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range scenarios {
		t.Run(tt.name, func(t *testing.T) {
			image := tt.image(t)
			failed := 0
			for n := 1; ; n += everyCall {
				st := storetest.New(image)
				s, h := load(t, st)
				first := *h
				sp := allocator(t, st, h)
				j := &judge{t, &first, map[string][]string{}}
				j.note(s, h)
				if tt.before != nil {
					tt.before(t, s)
				}
				calls := st.Calls()
				st.FailCall(n, boom)
				err := s.Begin(ctx)
				if err != nil {
					failed++
					j.judge(fmt.Sprintf("begin failed at call %d", n), storetest.New(st.Contents()))
					st.Reopen()
					must(t, s.Begin(ctx))
				}
				if err == nil && st.Calls()-calls >= n {
					t.Fatalf("call %d failed and Begin did not", n)
				}
				j.written(s)
				tt.change(t, s)
				j.note(s, h)
				failed += saveAgain(t, s, st, sp, j, n, boom)
				if st.Calls()-calls < n {
					break
				}
			}
			if failed*everyCall < 8 {
				t.Errorf("%d calls failed", failed)
			}
		})
	}
}

// saveAgain saves until it succeeds or cannot. It returns 1 if it failed.
func saveAgain(t *testing.T, s *bitmaps.Set, st *storetest.Mem, sp *space.Space, j *judge, n int, boom error) int {
	t.Helper()
	err := s.Save(ctx, sp)
	if err == nil {
		j.judge(fmt.Sprintf("call %d failed", n), storetest.New(st.Contents()))
		return 0
	}
	if !errors.Is(err, boom) {
		t.Fatalf("call %d: save: got %v, want boom", n, err)
	}
	j.judge(fmt.Sprintf("save failed at call %d", n), storetest.New(st.Contents()))
	st.Reopen()
	if err := s.Save(ctx, sp); err == nil {
		j.judge(fmt.Sprintf("saved after call %d failed", n), storetest.New(st.Contents()))
		if r := audit(t, st); r.Leaks != 0 {
			t.Errorf("saved after call %d failed: %v", n, r.Problems)
		}
		if got := usable(s); got > 0 {
			again, _ := load(t, storetest.New(st.Contents()))
			if usable(again) != got {
				t.Errorf("call %d: %d bitmaps can be used after the second save, want %d", n, usable(again), got)
			}
		}
	}
	return 1
}

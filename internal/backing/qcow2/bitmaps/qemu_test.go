package bitmaps_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

var ctx = context.Background()

// run runs a program of QEMU.
func run(t testing.TB, program string, args ...string) []byte {
	t.Helper()
	c := exec.Command(program, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", program, args, err, out, stderr.Bytes())
	}
	return out
}

// create makes an image and runs commands of qemu-img bitmap, whose last
// argument is left out, and of qemu-io.
func create(t testing.TB, options, size string, commands ...[]string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
	for _, c := range commands {
		qemu(t, path, c)
	}
	return read(t, path)
}

// qemu runs one command on the image at path.
func qemu(t testing.TB, path string, c []string) {
	t.Helper()
	switch c[0] {
	case "io":
		args := []string{"-f", "qcow2"}
		for _, op := range c[1:] {
			args = append(args, "-c", op)
		}
		run(t, "qemu-io", append(args, path)...)
	case "merge":
		run(t, "qemu-img", "bitmap", "--merge", c[2], "-f", "qcow2", path, c[1])
	default:
		args := append([]string{"bitmap", "--" + c[0]}, c[1:len(c)-1]...)
		run(t, "qemu-img", append(args, "-f", "qcow2", path, c[len(c)-1])...)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// change runs commands on the image b.
func change(t testing.TB, b []byte, commands ...[]string) []byte {
	t.Helper()
	path := write(t, b)
	for _, c := range commands {
		qemu(t, path, c)
	}
	return read(t, path)
}

func header(t testing.TB, st store.Store) *format.Header {
	t.Helper()
	b := make([]byte, 64<<10)
	n, err := st.ReadAt(ctx, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	h, err := format.ParseHeader(b[:n])
	if err != nil {
		t.Fatalf("header: %v", err)
	}
	return h
}

// load loads the bitmaps of the image in st.
func load(t testing.TB, st store.Store) (*bitmaps.Set, *format.Header) {
	t.Helper()
	h := header(t, st)
	s, err := bitmaps.Load(ctx, st, h, int64(h.Size), bitmaps.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return s, h
}

// audit checks the image in st.
func audit(t testing.TB, st store.Store) *check.Report {
	t.Helper()
	r, err := check.Run(ctx, st, header(t, st), check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// allocator makes the account of the image in st.
func allocator(t testing.TB, st store.Store, h *format.Header) *space.Space {
	t.Helper()
	r := audit(t, st)
	if r.Corruptions != 0 {
		t.Fatalf("the image is corrupt: %v", r.Problems)
	}
	sp, err := space.New(st, h, r, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return sp
}

// save saves, and closes the image as its writer does.
func save(t testing.TB, s *bitmaps.Set, st store.Store, sp *space.Space) {
	t.Helper()
	if err := s.Save(ctx, sp); err != nil {
		t.Fatalf("save: %v", err)
	}
	if err := sp.Trim(ctx); err != nil {
		t.Fatal(err)
	}
	if err := st.Sync(ctx); err != nil {
		t.Fatal(err)
	}
}

// extent is a range of a bitmap.
type extent struct {
	Off   int64  `json:"offset"`
	Len   int64  `json:"length"`
	Value uint32 `json:"type"`
}

// described is the whole of a bitmap, as Describe has it.
func described(t testing.TB, s *bitmaps.Set, h *format.Header, name string) []extent {
	t.Helper()
	var list []extent
	var off int64
	err := s.Describe(bitmaps.Prefix+name, 0, int64(h.Size), func(x backing.Status) bool {
		list = append(list, extent{off, x.Len, x.Value})
		off += x.Len
		return true
	})
	if err != nil {
		t.Fatalf("describe %q: %v", name, err)
	}
	return list
}

// exported is the whole of a bitmap of the image b, as QEMU has it. It refuses
// to export one that is enabled.
func exported(t testing.TB, b []byte, name string) []extent {
	t.Helper()
	path := write(t, b)
	run(t, "qemu-img", "bitmap", "--disable", "-f", "qcow2", path, name)
	out := run(t, "nbdinfo", "--json", "--map=qemu:dirty-bitmap:"+name, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path, "]")
	var list, merged []extent
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("nbdinfo: %v: %s", err, out)
	}
	for _, e := range list {
		if last := len(merged) - 1; last >= 0 && merged[last].Value == e.Value {
			merged[last].Len += e.Len
			continue
		}
		merged = append(merged, e)
	}
	return merged
}

// same compares all bitmaps of a Set with what QEMU says of the image b.
func same(t testing.TB, b []byte, s *bitmaps.Set, h *format.Header) {
	t.Helper()
	for _, m := range s.List() {
		if !m.Usable {
			continue
		}
		want := exported(t, b, m.Name)
		if got := described(t, s, h, m.Name); !slices.Equal(got, want) {
			t.Errorf("bitmap %q: got %v, want %v", m.Name, got, want)
		}
	}
}

// info is what qemu-img info says of a bitmap.
type info struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"`
}

func infos(t testing.TB, b []byte) []info {
	t.Helper()
	var x struct {
		Specific struct {
			Data struct {
				Bitmaps []info `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	out := run(t, "qemu-img", "info", "-f", "qcow2", "--output=json", write(t, b))
	if err := json.Unmarshal(out, &x); err != nil {
		t.Fatalf("qemu-img info: %v: %s", err, out)
	}
	return x.Specific.Data.Bitmaps
}

// clean fails unless QEMU finds nothing wrong with the image b.
func clean(t testing.TB, b []byte) {
	t.Helper()
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", write(t, b))
}

// shapes are images whose bitmaps take parts of a page, several clusters, and
// parts of a cluster.
var shapes = []struct {
	options, size, granularity string
	disk                       int64
}{
	{"cluster_size=64k", "1G", "64k", 1 << 30},
	{"cluster_size=512", "40000k", "512", 40000 << 10},
	{"cluster_size=4k,refcount_bits=64", "700m", "4k", 700 << 20},
	{"cluster_size=2m", "5000000k", "1m", 5000000 << 10},
	{"cluster_size=64k,extended_l2=on", "100003k", "512", 100003 << 10},
	{"cluster_size=1k,refcount_bits=1", "30m", "1k", 30 << 20},
}

func TestLoadAgreesWithQemu(t *testing.T) {
	for _, tt := range shapes {
		t.Run(tt.options, func(t *testing.T) {
			b := create(t, tt.options, tt.size,
				[]string{"add", "-g", tt.granularity, "first"},
				[]string{"io", "write 0 1k", fmt.Sprintf("write %d 1k", tt.disk/2), fmt.Sprintf("write %d 1k", tt.disk-1024)},
				[]string{"add", "-g", tt.granularity, "second"},
				[]string{"io", fmt.Sprintf("write -z 0 %d", min(tt.disk/3, 2000<<20)), "write 3m 5k"},
				[]string{"disable", "first"},
				[]string{"add", "--disable", "empty"})
			s, h := load(t, storetest.New(b))
			if got, want := s.Names(), []string{"first", "second", "empty"}; !slices.Equal(got, want) {
				t.Errorf("names: got %q, want %q", got, want)
			}
			same(t, b, s, h)
		})
	}
}

func TestSaveAgreesWithQemu(t *testing.T) {
	for _, tt := range shapes {
		t.Run(tt.options, func(t *testing.T) {
			b := create(t, tt.options, tt.size,
				[]string{"add", "-g", tt.granularity, "first"}, []string{"add", "off"},
				[]string{"io", "write 0 1k", "write 7m 1k"}, []string{"disable", "off"})
			st := storetest.New(b)
			s, h := load(t, st)
			sp := allocator(t, st, h)
			if s.Begun() {
				t.Error("begun before Begin")
			}
			if err := s.Begin(ctx); err != nil || !s.Begun() {
				t.Fatalf("begin: %v, begun %v", err, s.Begun())
			}
			if got := infos(t, st.Contents()); !slices.Contains(got[0].Flags, "in-use") || slices.Contains(got[1].Flags, "in-use") {
				t.Errorf("after Begin: got %v, want the first in use", got)
			}
			s.Mark(tt.disk/2, tt.disk/4)
			s.Mark(tt.disk-1, 1)
			s.Mark(9<<20, 700)
			if err := s.Add("new", 0, true); err != nil {
				t.Fatal(err)
			}
			s.Mark(11<<20, 7<<20)
			save(t, s, st, sp)
			if s.Begun() {
				t.Error("begun after Save")
			}
			b = st.Contents()
			clean(t, b)
			for _, m := range infos(t, b) {
				if auto := slices.Contains(m.Flags, "auto"); slices.Contains(m.Flags, "in-use") || auto != (m.Name != "off") {
					t.Errorf("after Save: %v", m)
				}
			}
			same(t, b, s, h)
			again, h2 := load(t, storetest.New(b))
			same(t, b, again, h2)
			if *h.Bitmaps != *h2.Bitmaps || h.Autoclear != h2.Autoclear {
				t.Errorf("header: got %v %x, the file has %v %x", h.Bitmaps, h.Autoclear, h2.Bitmaps, h2.Autoclear)
			}
			// QEMU goes on with what was saved.
			theirs := change(t, b, []string{"io", "write 13m 3k"})
			third, h3 := load(t, storetest.New(theirs))
			same(t, theirs, third, h3)
			if got := described(t, third, h3, "first"); !slices.ContainsFunc(got, func(e extent) bool {
				return e.Value == 1 && e.Off <= 13<<20 && e.Off+e.Len >= 13<<20+3<<10
			}) {
				t.Errorf("what qemu wrote is not marked: %v", got)
			}
			calls := st.Count(storetest.Write)
			if err := s.Save(ctx, sp); err != nil || st.Count(storetest.Write) != calls {
				t.Errorf("second save: %v, %d writes, want none", err, st.Count(storetest.Write)-calls)
			}
		})
	}
}

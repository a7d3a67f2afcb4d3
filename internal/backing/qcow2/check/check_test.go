package check

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// image is a file that qemu-img made.
type image struct {
	testing.TB
	path string
}

// create makes an image of size with options, and runs qemu-io commands.
func create(t testing.TB, options, size string, ops ...string) image {
	t.Helper()
	i := image{t, filepath.Join(t.TempDir(), "image")}
	args := []string{"create", "-q", "-f", "qcow2"}
	if options != "" {
		args = append(args, "-o", options)
	}
	i.run("qemu-img", append(args, i.path, size)...)
	return i.io(ops...)
}

func (i image) run(program string, args ...string) {
	i.Helper()
	c := exec.Command(program, args...)
	c.Dir = filepath.Dir(i.path)
	if out, err := c.CombinedOutput(); err != nil {
		i.Fatalf("%s %q: %v: %s", program, args, err, out)
	}
}

func (i image) io(ops ...string) image {
	i.Helper()
	for _, op := range ops {
		i.run("qemu-io", "-f", "qcow2", "-c", op, i.path)
	}
	return i
}

// snap makes a snapshot.
func (i image) snap(name string) image {
	i.Helper()
	i.run("qemu-img", "snapshot", "-c", name, i.path)
	return i
}

// patch writes the bytes of hexadecimal digits at off.
func (i image) patch(off int64, digits string) image {
	i.Helper()
	b, err := hex.DecodeString(digits)
	if err != nil {
		i.Fatal(err)
	}
	f, err := os.OpenFile(i.path, os.O_WRONLY, 0)
	if err != nil {
		i.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		i.Fatal(err)
	}
	return i
}

func (i image) bytes() []byte {
	i.Helper()
	b, err := os.ReadFile(i.path)
	if err != nil {
		i.Fatal(err)
	}
	return b
}

// check runs Run.
func (i image) check() *Report {
	i.Helper()
	b := i.bytes()
	h, err := format.ParseHeader(b)
	if err != nil {
		i.Fatalf("the header of %s: %v", i.path, err)
	}
	r, err := Run(context.Background(), storetest.New(b), h, Options{})
	if err != nil {
		i.Fatalf("check of %s: %v", i.path, err)
	}
	wrong, unsound := format.Corrupt(""), r.Corruptions+r.Errors
	for _, p := range r.Problems {
		if strings.Contains(p.Text, "the entry is incomplete") {
			unsound--
		}
	}
	short, err := Run(context.Background(), storetest.New(b), h, Options{Sound: true})
	switch {
	case errors.As(err, &wrong) != (unsound > 0):
		i.Errorf("the check for a sound image says %v, the other has %d corruptions%s", err, r.Corruptions, texts(r))
	case err == nil && r.Corruptions == 0 && short.numbers() != r.numbers():
		i.Errorf("the check for a sound image has %+v, the other %+v", short.numbers(), r.numbers())
	}
	return r
}

// numbers are the fields of qemu-img check --output=json.
type numbers struct {
	Corruptions int64 `json:"corruptions"`
	Leaks       int64 `json:"leaks"`
	Errors      int64 `json:"check-errors"`
	Total       int64 `json:"total-clusters"`
	Allocated   int64 `json:"allocated-clusters"`
	Fragmented  int64 `json:"fragmented-clusters"`
	Compressed  int64 `json:"compressed-clusters"`
	End         int64 `json:"image-end-offset"`
}

func (r *Report) numbers() numbers {
	return numbers{
		r.Corruptions, r.Leaks, r.Errors, r.TotalClusters, r.AllocatedClusters,
		r.FragmentedClusters, r.CompressedClusters, r.ImageEnd,
	}
}

// qemu is what qemu-img check says; ok is false where it says nothing.
func (i image) qemu() (n numbers, ok bool) {
	i.Helper()
	c := exec.Command("qemu-img", "check", "-f", "qcow2", "--output=json", i.path)
	c.Dir = filepath.Dir(i.path)
	out, err := c.Output()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		i.Fatal(err)
	}
	if len(out) == 0 {
		return n, false
	}
	if err := json.Unmarshal(out, &n); err != nil {
		i.Fatalf("qemu-img check: %v: %s", err, out)
	}
	return n, true
}

func texts(r *Report) string {
	b := new(strings.Builder)
	for _, p := range r.Problems {
		fmt.Fprintf(b, "\n\t%s", p.Text)
	}
	return b.String()
}

// agree holds our numbers against those of qemu-img, and against want where
// they are meant to differ.
func (i image) agree(want *numbers) {
	i.Helper()
	r := i.check()
	theirs, ok := i.qemu()
	if want == nil {
		if !ok {
			i.Fatalf("qemu-img has no answer, ours is %+v%s", r.numbers(), texts(r))
		}
		want = &theirs
	} else if ok && theirs == *want {
		i.Errorf("qemu-img answers %+v as well: it is no difference", theirs)
	}
	if r.numbers() != *want {
		i.Errorf("got %+v, want %+v (qemu-img: %+v)%s", r.numbers(), *want, theirs, texts(r))
	}
}

const fill = "write -P 0x11 0 64k"

func TestSoundImagesAgreeWithQEMU(t *testing.T) {
	busy := []string{
		"write -P 1 0 300k", "write -P 2 900k 100k", "write -z 64k 64k", "discard 128k 64k",
		"write -P 3 32k 4k", "write -P 4 1200k 20k", "write -z -u 1M 8k",
	}
	for _, tt := range []struct{ options, size string }{
		{"", "64M"}, {"", "0"}, {"cluster_size=512", "2M"}, {"cluster_size=4k", "8M"},
		{"cluster_size=2M", "64M"}, {"compat=0.10", "64M"}, {"compat=0.10,cluster_size=1k", "4M"},
		{"refcount_bits=1", "64M"}, {"refcount_bits=2,cluster_size=512", "2M"}, {"refcount_bits=4", "64M"},
		{"refcount_bits=8,cluster_size=512", "2M"}, {"refcount_bits=32,cluster_size=512", "2M"},
		{"refcount_bits=64,cluster_size=512", "2M"}, {"refcount_bits=64,cluster_size=2M", "64M"},
		{"extended_l2=on", "64M"}, {"extended_l2=on,cluster_size=16k", "64M"},
		{"preallocation=metadata", "64M"}, {"preallocation=full,cluster_size=512", "2M"},
		{"lazy_refcounts=on", "64M"}, {"data_file=data", "64M"}, {"data_file=data,data_file_raw=on", "64M"},
		{"data_file=data,cluster_size=512", "2M"}, {"data_file=data,extended_l2=on,cluster_size=16k", "64M"},
	} {
		t.Run(tt.options+" "+tt.size, func(t *testing.T) {
			i := create(t, tt.options, tt.size)
			i.agree(nil)
			if tt.size == "0" {
				return
			}
			i.io(busy...).agree(nil)
			if strings.Contains(tt.options, "data_file") || strings.Contains(tt.options, "refcount_bits=1") {
				return
			}
			i.snap("one").io("write -P 9 8k 200k").agree(nil)
			i.snap("two").io("write -P 8 1M 64k").agree(nil)
			i.run("qemu-img", "snapshot", "-d", "one", i.path)
			i.agree(nil)
			if i.check().Corruptions != 0 || i.check().Leaks != 0 {
				t.Errorf("found %s in a sound image", texts(i.check()))
			}
		})
	}
}

func TestCompressedImagesAgreeWithQEMU(t *testing.T) {
	for _, options := range []string{
		"", "cluster_size=512", "cluster_size=4k,refcount_bits=64", "compression_type=zstd", "extended_l2=on",
		"compat=0.10,cluster_size=2M", "cluster_size=4k,refcount_bits=8",
	} {
		t.Run(options, func(t *testing.T) {
			i := create(t, options, "4M")
			plain := filepath.Join(t.TempDir(), "plain")
			b := bytes.Repeat([]byte("0123456789abcde\n"), 1<<18)
			for k := range b {
				if k%7 == 0 {
					b[k] = byte(k >> 9)
				}
			}
			if err := os.WriteFile(plain, b, 0o600); err != nil {
				t.Fatal(err)
			}
			i.run("qemu-img", "convert", "-c", "-n", "-f", "raw", "-O", "qcow2", plain, i.path)
			i.agree(nil)
			if i.check().CompressedClusters == 0 {
				t.Error("no cluster is compressed")
			}
			i.io("write -P 5 64k 9k").snap("one").io("write -P 7 0 70k").agree(nil)
		})
	}
}

func TestBitmapsAgreeWithQEMU(t *testing.T) {
	i := create(t, "cluster_size=4k", "64M")
	i.run("qemu-img", "bitmap", "--add", "-g", "512", i.path, "fine")
	i.run("qemu-img", "bitmap", "--add", i.path, "coarse")
	i.io("write -P 1 0 3M", "write -P 1 40M 64k")
	i.agree(nil)
	used := i.check().Used.Len()
	i.run("qemu-img", "bitmap", "--remove", i.path, "fine")
	i.agree(nil)
	if now := i.check().Used.Len(); now >= used {
		t.Errorf("%d clusters are used without the bitmap, %d with it", now, used)
	}
}

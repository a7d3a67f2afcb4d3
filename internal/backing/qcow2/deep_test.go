package qcow2_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// deepChain makes five images of different sizes and clusters, each with some
// bytes of its own, and returns their paths, the lowest first.
func deepChain(t *testing.T, dir string) []string {
	t.Helper()
	r := random(t)
	var paths []string
	for i, l := range []struct{ options, size string }{
		{"cluster_size=64k", "5M"},
		{"cluster_size=4k", "3M"},
		{"cluster_size=512", "7M"},
		{"cluster_size=128k,extended_l2=on", "6M"},
		{"cluster_size=64k", "8M"},
	} {
		path := filepath.Join(dir, fmt.Sprint(i))
		args := []string{"create", "-q", "-f", "qcow2", "-o", l.options}
		if i > 0 {
			args = append(args, "-b", paths[i-1], "-F", "qcow2")
		}
		qemu(t, dir, "qemu-img", append(args, path, l.size)...)
		args = []string{"-f", "qcow2"}
		for j := range 12 {
			command := fmt.Sprintf("write -P %d", i*16+j+1)
			if i > 0 && j%5 == 4 {
				command = "write -z"
			} else if j%6 == 5 && i < 3 {
				command = fmt.Sprintf("write -c -P %d", i*16+j+1)
			}
			off, n := r.Int64N(2<<20)&^511, (1+r.Int64N(200<<10))&^511
			if j%6 == 5 && i < 3 { // only clusters that are not there yet can be written compressed
				off, n = (2304+int64(j)/6*128)<<10, 128<<10
			}
			args = append(args, "-c", fmt.Sprintf("%s %d %d", command, off, max(n, 512)))
		}
		qemu(t, dir, "qemu-io", append(args, path)...)
		paths = append(paths, path)
	}
	return paths
}

func TestDeepChainReadsAsQEMUReadsIt(t *testing.T) {
	dir := t.TempDir()
	paths := deepChain(t, dir)
	file := files(t)
	o := quiet()
	for i, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if i == len(paths)-1 {
			o.ReadOnly = true
			d, err := qcow2.Open(t.Context(), file(b), o)
			if err != nil {
				t.Fatal(err)
			}
			compareWithQEMU(t, d, dir, path)
			break
		}
		if o.Backing, err = qcow2.OpenImage(t.Context(), file(b), o); err != nil {
			t.Fatal(err)
		}
	}
}

// compareWithQEMU reads the whole disk, first in one piece, then in random
// ones and through Map.
func compareWithQEMU(t *testing.T, d backing.Device, dir, path string) {
	t.Helper()
	rawFile := filepath.Join(dir, "raw")
	qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, rawFile)
	want, err := os.ReadFile(rawFile)
	if err != nil {
		t.Fatal(err)
	}
	mustMatch(t, d, 0, want)
	r := random(t)
	mapped := 0
	for range 500 {
		off, n := somewhere(r, int64(len(want)))
		mustMatch(t, d, off, want[off:off+n])
		var m backing.Mapping
		if d.Map(engine.OpRead, off, n, &m) == nil {
			mapped++
			if got := readRuns(t, &m, n); string(got) != string(want[off:off+n]) {
				t.Fatalf("map at %d+%d: wrong bytes", off, n)
			}
			m.Release()
		}
	}
	if mapped == 0 {
		t.Error("map: nothing was mappable")
	}
}

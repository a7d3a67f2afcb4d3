package format

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// qemuImg runs qemu-img in dir.
func qemuImg(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("qemu-img", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
	}
}

// firstCluster reads the first cluster of a file, or what the file has of it.
func firstCluster(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := ClusterSize(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:min(n, int64(len(b)))]
}

// Every kind of image that qemu-img makes, and what its header must say.
func TestHeadersOfQEMURoundTrip(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []string
		then    [][]string
		check   func(h *Header) bool
	}{
		{"v3", nil, nil, func(h *Header) bool {
			return h.Version == 3 && h.Size == 64<<20 && h.ClusterBits == 16 && len(h.FeatureNames) > 5
		}},
		{"v2", []string{"-o", "compat=0.10"}, nil, func(h *Header) bool {
			return h.Version == 2 && h.Length == 72 && h.RefcountOrder == 4
		}},
		{"v2 with backing", []string{"-o", "compat=0.10", "-b", "base", "-F", "raw"}, nil, func(h *Header) bool {
			return h.Backing == "base" && h.BackingFormat == "raw"
		}},
		{"backing", []string{"-b", "base", "-F", "raw"}, nil, func(h *Header) bool {
			return h.Backing == "base" && h.BackingFormat == "raw"
		}},
		{"zstd", []string{"-o", "compression_type=zstd"}, nil, func(h *Header) bool {
			return h.Compression == Zstd && h.Incompat == IncompatCompression
		}},
		{"extended", []string{"-o", "extended_l2=on"}, nil, func(h *Header) bool {
			g := h.Geometry()
			return g.Extended && g.Subs == 32
		}},
		{"data file", []string{"-o", "data_file=data,data_file_raw=on"}, nil, func(h *Header) bool {
			return h.DataFile == "data" && h.Autoclear == AutoclearRawData && h.Geometry().DataFile
		}},
		{"lazy refcounts of 1 bit", []string{"-o", "lazy_refcounts=on,refcount_bits=1"}, nil, func(h *Header) bool {
			return h.Compat == CompatLazyRefcounts && h.RefcountOrder == 0
		}},
		{"smallest clusters", []string{"-o", "cluster_size=512"}, nil, func(h *Header) bool {
			return h.ClusterBits == 9 && len(h.FeatureNames) == 0
		}},
		{"largest clusters", []string{"-o", "cluster_size=2M"}, nil, func(h *Header) bool {
			return h.ClusterBits == 21
		}},
		{"bitmap", nil, [][]string{{"bitmap", "--add", "image", "b0"}}, func(h *Header) bool {
			return h.Autoclear == AutoclearBitmaps && h.BitmapsErr == nil && h.Bitmaps != nil && h.Bitmaps.Count == 1
		}},
		{"snapshots", nil, [][]string{{"snapshot", "-c", "s1", "image"}, {"snapshot", "-c", "s2", "image"}}, func(h *Header) bool {
			return h.Snapshots == 2 && h.SnapshotsOffset != 0
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			qemuImg(t, dir, "create", "-q", "-f", "raw", "base", "64M")
			qemuImg(t, dir, append(append([]string{"create", "-q", "-f", "qcow2"}, tt.options...), "image", "64M")...)
			for _, args := range tt.then {
				qemuImg(t, dir, args...)
			}
			b := firstCluster(t, filepath.Join(dir, "image"))
			h, err := ParseHeader(b)
			if err != nil {
				t.Fatal(err)
			}
			if !tt.check(h) {
				t.Errorf("wrong header: %+v", h)
			}
			got, err := h.Encode()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, b) {
				t.Errorf("encoded header differs:\ngot  %x\nwant %x", got[:min(len(got), 1024)], b[:min(len(b), 1024)])
			}
			fi, err := os.Stat(filepath.Join(dir, "image"))
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Within(fi.Size(), true); err != nil {
				t.Errorf("Within the file of qemu-img: %v", err)
			}
		})
	}
}

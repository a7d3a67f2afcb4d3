package open_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// TestThresholdIsOfTheFileWithTheGuestsData: the image, raw or qcow2, or the data
// file that it names, and never what is below it. Offsets are those in that file.
func TestThresholdIsOfTheFileWithTheGuestsData(t *testing.T) {
	const at, cluster = 2 << 20, 64 << 10 // qcow2 sets storage aside below that
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "disk.raw"), make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", "8M")
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "external.qcow2", "8M")
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2")
	for _, tt := range []struct {
		image, format, file string
		off                 int64 // of a write to the disk
		beyond              bool  // in the file that is at that offset
	}{
		{"disk.raw", "raw", "disk.raw", at - cluster, false},
		{"disk.raw", "raw", "disk.raw", 4 << 20, true},
		{"disk.qcow2", "qcow2", "disk.qcow2", 4 << 20, false}, // the first free cluster is before
		{"external.qcow2", "qcow2", "data", 0, false},
		{"external.qcow2", "qcow2", "data", 4 << 20, true},
		{"top.qcow2", "qcow2", "top.qcow2", 7 << 20, false},
	} {
		for _, cache := range []string{open.CacheWriteback, open.CacheNone, open.CacheUnsafe, open.CacheWritethrough} {
			t.Run(fmt.Sprintf("%s at %d, %s", tt.image, tt.off, cache), func(t *testing.T) {
				s, _ := newSpec(t)
				s.Format, s.Path, s.Cache = tt.format, filepath.Join(dir, tt.image), cache
				if tt.format == "qcow2" {
					s.Backing = open.Policy{Mode: open.SameDir}
				}
				told, file := int64(0), filepath.Join(dir, tt.file)
				th := raw.NewThreshold(at, func(_, beyond int64) { told = beyond })
				s.Threshold = th
				d := mustOpen(t, s)
				write := func(off, n int64) {
					t.Helper()
					p := make([]byte, n)
					p[0] = 1
					if err := d.WriteAt(t.Context(), p, off, 0); err != nil {
						t.Fatal(err)
					}
				}
				write(tt.off, cluster)
				want := int64(0)
				if tt.beyond {
					want = tt.off + cluster - at
				}
				if told != want || (th.At() == 0) != tt.beyond {
					t.Fatalf("a write at %d: told %d, armed at %d; want %d", tt.off, told, th.At(), want)
				}
				if tt.format != "qcow2" || tt.file == "data" {
					return
				}
				for off := int64(0); off < 4<<20; off += cluster {
					write(off, cluster) // the file grows as it is written
				}
				st, err := os.Stat(file)
				if err != nil || told <= 0 || at+told > st.Size() {
					t.Errorf("4M were written: told %d, the file has %d bytes, %v", told, st.Size(), err)
				}
			})
		}
	}
}

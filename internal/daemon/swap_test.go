package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// TestSwapOnTheDiskIsFound: the device, which has the size that the disk had
// when it was attached, a partition of it and what stands on it, and nothing
// that cannot be the disk.
func TestSwapOnTheDiskIsFound(t *testing.T) {
	const size = 1 << 30
	const header = "Filename\tType\tSize\tUsed\tPriority\n"
	for _, tt := range []struct{ name, swaps, want string }{
		{"no swap", header, ""},
		{"another device", header + "/dev/sda2 partition 1 0 -2\n", ""},
		{"the device", header + "/dev/sda2 partition 1 0 -2\n/dev/nbd0 partition 1 0 -3\n", "/dev/nbd0"},
		{"a partition", header + "/dev/nbd0p12 partition 1 0 -3\n", "/dev/nbd0p12"},
		{"a larger disk's device", header + "/dev/nbd1 partition 1 0 -3\n", ""},
		{"a device without a size", header + "/dev/nbd2 partition 1 0 -3\n", "/dev/nbd2"},
		{"a volume on the device", header + "/dev/dm-1 partition 1 0 -3\n", "/dev/dm-1"},
		{"a volume on another", header + "/dev/dm-2 partition 1 0 -3\n", ""},
		{"a volume on itself", header + "/dev/dm-3 partition 1 0 -3\n", "/dev/dm-3"},
		{"a file", header + "/swap\\040file file 1 0 -3\n", ""},
		{"half a line", header + "/dev/nbd0", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
			root := fstest.MapFS{
				"proc/swaps":                        file(tt.swaps),
				"sys/class/block/nbd0/size":         file("2097152\n"),
				"sys/class/block/nbd1/size":         file("4194304\n"),
				"sys/class/block/nbd2/size":         file("many\n"),
				"sys/class/block/dm-0/slaves/nbd0":  file(""),
				"sys/class/block/dm-1/slaves/sda2":  file(""),
				"sys/class/block/dm-1/slaves/dm-0":  file(""),
				"sys/class/block/dm-2/slaves/nbd1":  file(""),
				"sys/class/block/dm-3/slaves/dm-3":  file(""),
				"sys/class/block/sda2/partition":    file("2"),
				"sys/class/block/nbd0p12/partition": file("12"),
			}
			if got := swapOn(root, size); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			for _, more := range []int64{4095, 64 << 10, size / 2} {
				if got := swapOn(root, size+more); got != tt.want {
					t.Errorf("with a disk that has %d bytes more: got %q, want %q", more, got, tt.want)
				}
			}
		})
	}
	if got := swapOn(fstest.MapFS{}, size); got != "" {
		t.Errorf("without /proc/swaps: got %q", got)
	}
}

func TestHeadroomIsHeldAgainstTheRule(t *testing.T) {
	file := filepath.Join(t.TempDir(), "min_free_kbytes")
	for _, tt := range []struct{ have, want string }{
		{"8192\n", ""},
		{"67584\n", ""},
		{"8191\n", "the kernel keeps 8191 KiB free, a server of swap needs 8192: sysctl -w vm.min_free_kbytes=8192"},
		{"0\n", "sysctl -w vm.min_free_kbytes=8192"},
		{"many\n", "invalid syntax"},
	} {
		if err := os.WriteFile(file, []byte(tt.have), 0o600); err != nil {
			t.Fatal(err)
		}
		m := checkHeadroom(file)
		if tt.want == "" && m != nil || tt.want != "" && (m == nil || !strings.Contains(m.Error(), tt.want)) {
			t.Errorf("%q: got %v, want %q", tt.have, m, tt.want)
		}
	}
	if m := checkHeadroom(file + ".none"); m == nil {
		t.Error("a kernel that does not tell is taken for one with headroom")
	}
}

func TestHolesAreSeen(t *testing.T) {
	dir := t.TempDir()
	full, holes := filepath.Join(dir, "full"), filepath.Join(dir, "holes")
	if err := os.WriteFile(full, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(full, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil { // some file systems count blocks then
		t.Fatal(err)
	}
	if err := os.WriteFile(holes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(holes, 1<<20); err != nil {
		t.Fatal(err)
	}
	if hasHoles(full) || !hasHoles(holes) {
		t.Errorf("holes: %v in a full file, %v in an empty one", hasHoles(full), hasHoles(holes))
	}
}

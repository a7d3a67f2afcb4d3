package daemon

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func sysFile(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

func sysLink(to string) *fstest.MapFile {
	return &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink}
}

// sysWith has block devices, with the places of their folders in sys/devices,
// and those that some stand on. A place inside of that of a disk is that of a
// partition.
func sysWith(devices map[string]string, slaves map[string][]string) fstest.MapFS {
	root := fstest.MapFS{}
	for name, at := range devices {
		root["sys/class/block/"+name] = sysLink("../../devices/" + at)
		root["sys/devices/"+at+"/dev"] = sysFile("")
		if path.Base(path.Dir(path.Dir(at))) == "block" {
			root["sys/devices/"+at+"/partition"] = sysFile("1")
			continue
		}
		root["sys/devices/"+at+"/slaves"] = &fstest.MapFile{Mode: fs.ModeDir}
		for _, s := range slaves[name] {
			root["sys/devices/"+at+"/slaves/"+s] = sysLink("../../../../class/block/" + s)
		}
	}
	return root
}

// TestSwapIsNotSafeOnWhatTakesMemoryFarBelow: a loop device is one under any
// number of partitions, volumes and arrays.
func TestSwapIsNotSafeOnWhatTakesMemoryFarBelow(t *testing.T) {
	devices, slaves := map[string]string{}, map[string][]string{
		"dm-0": {"loop1"}, "dm-1": {"sda2", "dm-0"}, "dm-2": {"sda2", "nvme0n1"}, "md0": {"sdb", "loop1p1"}, "dm-3": {"gone"},
	}
	for _, name := range []string{"dm-0", "dm-1", "dm-2", "dm-3", "md0", "loop1", "zram0", "ram3", "nbd12", "nvme0n1", "sda", "sdb", "ramdisk"} {
		devices[name] = "virtual/block/" + name
	}
	devices["sda2"], devices["loop1p1"], devices["nbd12p1"], devices["md0p1"] = "virtual/block/sda/sda2", "virtual/block/loop1/loop1p1", "virtual/block/nbd12/nbd12p1", "virtual/block/md0/md0p1"
	for i := range limits.SwapDepth + 1 { // a chain of one too many
		name := fmt.Sprint("dm-", 10+i)
		devices[name], slaves[name] = "virtual/block/"+name, []string{fmt.Sprint("dm-", 11+i)}
	}
	devices[fmt.Sprint("dm-", 11+limits.SwapDepth)] = fmt.Sprint("virtual/block/dm-", 11+limits.SwapDepth)
	root := sysWith(devices, slaves)
	for name, want := range map[string]string{
		"sda": "", "sda2": "", "nvme0n1": "", "dm-2": "", "ramdisk": "",
		"loop1": "the loop device loop1", "loop1p1": "the loop device loop1", "zram0": "the zram device zram0",
		"ram3": "the RAM disk ram3", "nbd12": "the NBD device nbd12", "nbd12p1": "the NBD device nbd12",
		"dm-0": "the loop device loop1", "dm-1": "the loop device loop1", "md0": "the loop device loop1", "md0p1": "the loop device loop1",
		"dm-3": "not all is known", "none": "nothing is known",
		"dm-10": "more than 8 devices", "dm-11": "",
	} {
		if _, there := devices[name]; there {
			root["sys/dev/block/259:7"] = sysLink("../../devices/" + devices[name])
		} else {
			delete(root, "sys/dev/block/259:7")
		}
		err := checkSwapDisk(root, "/disk", unix.Mkdev(259, 7))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
}

// TestDisksOfThisMachineAreKnown: what sys has here is read as the made one is.
func TestDisksOfThisMachineAreKnown(t *testing.T) {
	root := os.DirFS("/")
	all, err := fs.ReadDir(root, "sys/dev/block")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		var major, minor uint32
		if _, err := fmt.Sscanf(e.Name(), "%d:%d", &major, &minor); err != nil {
			t.Fatal(err)
		}
		name, err := deviceName(root, major, minor)
		if err != nil {
			t.Fatal(err)
		}
		err = checkSwapDisk(root, name, unix.Mkdev(major, minor))
		t.Log(name, err)
		switch bad := strings.TrimRight(name, "p0123456789"); {
		case slices.Contains([]string{"loop", "nbd", "zram", "ram"}, bad) && err == nil:
			t.Errorf("%s is taken for a place for swap", name)
		case slices.Contains([]string{"sd", "vd", "nvme0n"}, bad) && err != nil:
			t.Errorf("%s is refused: %v", name, err)
		}
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

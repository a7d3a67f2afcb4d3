package daemon

import (
	"io/fs"
	"syscall"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"
)

// TestSwapOnTheDiskIsFound: the device, which has the size that the disk had
// when it was attached, a partition of it, what stands on it and files there, and
// nothing that cannot be the disk.
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
		{"the device by another name", header + "/run/disk partition 1 0 -3\n", "/run/disk"},
		{"another by another name", header + "/dev/mapper/swap partition 1 0 -3\n", ""},
		{"a device of which nothing is known", header + "/dev/sdz partition 1 0 -3\n", "/dev/sdz"},
		{"a file on the device", header + "/mnt/swapfile file 1 0 -3\n", "/mnt/swapfile"},
		{"a file on a volume on the device", header + "/vol/swapfile file 1 0 -3\n", "/vol/swapfile"},
		{"a file on another", header + "/a\\040\\011\\012\\134040 file 1 0 -3\n", ""},
		{"a file on a file system of several devices", header + "/btrfs/swapfile file 1 0 -3\n", "/btrfs/swapfile"},
		{"a file that is not seen from here", header + "/gone\\040(deleted) file 1 0 -3\n", "/gone\\040(deleted)"},
		{"half a line", header + "/dev/nbd0", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := sysWith(map[string]string{
				"nbd0": "virtual/block/nbd0", "nbd1": "virtual/block/nbd1", "nbd2": "virtual/block/nbd2",
				"nbd0p12": "virtual/block/nbd0/nbd0p12",
				"sda2":    "pci0000:00/block/sda/sda2", "sda": "pci0000:00/block/sda",
				"dm-0": "virtual/block/dm-0", "dm-1": "virtual/block/dm-1", "dm-2": "virtual/block/dm-2", "dm-3": "virtual/block/dm-3",
			}, map[string][]string{"dm-0": {"nbd0"}, "dm-1": {"sda2", "dm-0"}, "dm-2": {"nbd1"}, "dm-3": {"dm-3"}})
			root["proc/swaps"] = sysFile(tt.swaps)
			for number, name := range map[string]string{"43:0": "nbd0", "8:2": "sda2", "253:1": "dm-1"} {
				root["sys/dev/block/"+number] = sysLink("../../class/block/" + name)
			}
			root["mnt/swapfile"], root["vol/swapfile"] = onDevice(unix.Mkdev(43, 0)), onDevice(unix.Mkdev(253, 1))
			root["a \t\n\\040"], root["btrfs/swapfile"] = onDevice(unix.Mkdev(8, 2)), onDevice(unix.Mkdev(0, 45))
			root["run/disk"], root["dev/mapper/swap"] = deviceNode(unix.Mkdev(43, 0)), deviceNode(unix.Mkdev(8, 2))
			root["sys/devices/virtual/block/nbd0/size"] = sysFile("2097152\n")
			root["sys/devices/virtual/block/nbd1/size"] = sysFile("4194304\n")
			root["sys/devices/virtual/block/nbd2/size"] = sysFile("many\n")
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

// onDevice is a file on the file system of a device.
func onDevice(dev uint64) *fstest.MapFile { return &fstest.MapFile{Sys: &syscall.Stat_t{Dev: dev}} }

// deviceNode is a node of a block device, on a file system in memory.
func deviceNode(dev uint64) *fstest.MapFile {
	return &fstest.MapFile{Mode: fs.ModeDevice, Sys: &syscall.Stat_t{Dev: unix.Mkdev(0, 5), Rdev: dev}}
}

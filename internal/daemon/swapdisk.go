package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// disksBelow calls is with the names, as in sys/class/block, of the disks that a
// block device is a partition of or stands on, itself among them, until is
// returns true, and names that disk. One that has more than limits.SwapDepth
// others between it and the device is named without being asked for. root has
// sys. An error is that of a device of which sys does not tell.
func disksBelow(root fs.FS, name string, is func(disk string) bool) (found string, err error) {
	return descend(root, name, is, limits.SwapDepth)
}

func descend(root fs.FS, name string, is func(disk string) bool, depth int) (found string, err error) {
	disk, err := wholeDisk(root, name)
	if err != nil {
		return "", err
	}
	if is(disk) || depth < 0 {
		return disk, nil
	}
	below, err := fs.ReadDir(root, "sys/class/block/"+disk+"/slaves")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	for _, b := range below {
		if found, err := descend(root, b.Name(), is, depth-1); found != "" || err != nil {
			return found, err
		}
	}
	return "", nil
}

// wholeDisk is the disk of a partition, and the name of anything else. The
// folder of a partition lies in that of its disk.
func wholeDisk(root fs.FS, name string) (string, error) {
	link := "sys/class/block/" + name
	at, err := fs.ReadLink(root, link)
	if err != nil {
		return "", err
	}
	switch _, err := fs.Stat(root, link+"/partition"); {
	case err == nil:
		return path.Base(path.Dir(at)), nil
	case errors.Is(err, fs.ErrNotExist):
		return name, nil
	default:
		return "", err
	}
}

// deviceName is the name in sys/class/block of a block device.
func deviceName(root fs.FS, major, minor uint32) (string, error) {
	at, err := fs.ReadLink(root, fmt.Sprintf("sys/dev/block/%d:%d", major, minor))
	return path.Base(at), err
}

// Package kernel makes the nbd driver of Linux use an export as /dev/nbdN.
//
// The export is negotiated here, on as many connections as are wanted, and the
// sockets are handed to the driver by generic netlink
// (linux/nbd-netlink.h), which then speaks to the server by itself. The driver
// takes TCP and Unix sockets without encryption only: for others a Relay
// stands between. A driver that loses its server forgets about it, unless a
// Keeper makes new connections for it.
//
// What the driver, sysfs and the server say is bounded and checked before it is
// used; texts of theirs are data.
package kernel

import (
	"errors"
	"fmt"
	"math"
	"path"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	// ErrNoModule is returned when the running kernel has no nbd driver.
	ErrNoModule = errors.New("the kernel's nbd driver is not loaded (load it: modprobe nbd)")

	// ErrPermission is returned to who may not configure devices.
	ErrPermission = errors.New("nbd devices are for those with CAP_SYS_ADMIN, such as root")

	// ErrNoDevice is returned for a device that does not exist or has no
	// server.
	ErrNoDevice = errors.New("no such device, or it is not attached")

	// ErrBusy is returned for a device that has a server, or that is mounted
	// or otherwise in use.
	ErrBusy = errors.New("device is in use")

	// ErrReply is matched by every error about an answer of the driver or a
	// file of sysfs that is not as it has to be.
	ErrReply = errors.New("answer of the kernel makes no sense")

	// ErrRefused is matched by what would not be safe, or cannot work.
	ErrRefused = errors.New("refused")
)

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}

func senseless(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrReply, fmt.Sprintf(format, args...))
}

// Any lets the kernel choose a device.
const Any = -1

// Name is the name of a device below /dev and /sys/block.
func Name(index int) string { return "nbd" + strconv.Itoa(index) }

// ParseDevice reads "/dev/nbdN" or "nbdN", N in decimal without leading zeroes
// and at most limits.DeviceIndex.
func ParseDevice(s string) (index int, err error) {
	name := s
	if strings.HasPrefix(s, "/") {
		dir, base := path.Split(s)
		if dir != "/dev/" {
			return 0, fmt.Errorf("%q is not /dev/nbdN", s)
		}
		name = base
	}
	digits, ok := strings.CutPrefix(name, "nbd")
	n, err := strconv.ParseUint(digits, 10, 32)
	if !ok || err != nil || strconv.FormatUint(n, 10) != digits {
		return 0, fmt.Errorf("%q is not /dev/nbdN", s)
	}
	if n > limits.DeviceIndex {
		return 0, fmt.Errorf("%q: the highest number is %d", s, limits.DeviceIndex)
	}
	return int(n), nil
}

// blockSize is the logical block size for a server whose smallest request is
// least bytes, wanted being 0 for the smallest that does.
func blockSize(wanted, least uint32) (uint32, error) {
	least = max(least, 512)
	if wanted == 0 {
		wanted = least
	}
	switch {
	case wanted < 512 || wanted > limits.DeviceBlock || wanted&(wanted-1) != 0:
		return 0, refused("a block size of %d bytes: the kernel has powers of two from 512 to %d", wanted, limits.DeviceBlock)
	case wanted < least:
		return 0, refused("a block size of %d bytes: the server takes no requests below %d", wanted, least)
	}
	return wanted, nil
}

// usable is the part of size that the kernel can use in blocks of block bytes.
func usable(size int64, block uint32) (uint64, error) {
	if size < int64(block) {
		return 0, refused("an export of %d bytes is smaller than one block of %d", size, block)
	}
	return uint64(size) &^ (uint64(block) - 1) & math.MaxInt64, nil
}

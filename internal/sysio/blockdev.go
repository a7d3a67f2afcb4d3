package sysio

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BlockSize asks a block device for its size in bytes.
func BlockSize(fd uintptr) (int64, syscall.Errno) {
	var n uint64
	_, _, e := syscall.Syscall(unix.SYS_IOCTL, fd, unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n)))
	return int64(n), e
}

// BlockDiscard tells a block device that the contents of the range, which
// lies on logical blocks, do not matter any more. What is read afterwards is
// undefined. It may take long.
func BlockDiscard(fd uintptr, off, n int64) syscall.Errno {
	r := [2]uint64{uint64(off), uint64(n)}
	_, _, e := syscall.Syscall(unix.SYS_IOCTL, fd, unix.BLKDISCARD, uintptr(unsafe.Pointer(&r)))
	return e
}

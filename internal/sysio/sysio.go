// Package sysio makes the system calls of the data path that the standard
// packages do not offer without an allocation or a scheduler hand-off.
//
// A call whose name starts with Try never sleeps: it works on a non-blocking
// socket or asks the page cache only (RWF_NOWAIT). Those skip the Go
// scheduler's bookkeeping for blocking calls, which at these sizes costs as
// much as the copy. All others may block and tell the scheduler so.
//
// Buffers belong to the caller and are not kept.
package sysio

import (
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rwfNowait is RWF_NOWAIT of preadv2(2); x/sys/unix has it as RWF_NOWAIT.
const rwfNowait = unix.RWF_NOWAIT

func base(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// TryRecv reads from a non-blocking socket. n is 0 at end of stream; EAGAIN
// says that nothing is there.
func TryRecv(fd uintptr, p []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall(unix.SYS_READ, fd, base(p), uintptr(len(p)))
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// TrySend writes to a non-blocking socket and never raises SIGPIPE. more
// announces that further bytes follow at once, so that a short header does
// not leave as a packet of its own (MSG_MORE).
func TrySend(fd uintptr, p []byte, more bool) (int, syscall.Errno) {
	flags := uintptr(unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT)
	if more {
		flags |= unix.MSG_MORE
	}
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, fd, base(p), uintptr(len(p)), flags, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// TryYield lets another thread that waits for this CPU have it; it returns at
// once when there is none.
func TryYield() { syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// Vector is a reusable list of buffers for TrySendv. Its zero value is empty.
type Vector struct {
	all []unix.Iovec // the backing array of iov
	iov []unix.Iovec // what is left to send
	msg unix.Msghdr
}

// MaxVector is how many buffers one TrySendv takes (IOV_MAX).
const MaxVector = 1024

// Len is the number of buffers in the vector.
func (v *Vector) Len() int { return len(v.iov) }

// Grow makes room for n buffers in an empty vector: Add of so many does not
// allocate.
func (v *Vector) Grow(n int) { v.all = slices.Grow(v.all, n) }

// Add appends p, which must stay alive and unchanged until Reset. An empty p
// is left out. Add must not be called between Skip and Reset.
func (v *Vector) Add(p []byte) {
	if len(p) == 0 {
		return
	}
	var i unix.Iovec
	i.Base = unsafe.SliceData(p)
	i.SetLen(len(p))
	v.all = append(v.all, i)
	v.iov = v.all
}

// Skip forgets the first n bytes, which were sent.
func (v *Vector) Skip(n int) {
	k := 0
	for k < len(v.iov) && uint64(n) >= uint64(v.iov[k].Len) {
		n -= int(v.iov[k].Len)
		k++
	}
	rest := v.iov[k:]
	if n > 0 {
		rest[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(rest[0].Base), n))
		rest[0].SetLen(int(rest[0].Len) - n)
	}
	v.iov = rest
}

// Reset empties the vector and forgets its buffers.
func (v *Vector) Reset() {
	clear(v.all)
	v.all = v.all[:0]
	v.iov = v.all
}

// TrySendv writes the buffers of v to a non-blocking socket in one call, as
// TrySend does.
func TrySendv(fd uintptr, v *Vector) (int, syscall.Errno) {
	if len(v.iov) == 0 {
		return 0, 0
	}
	v.msg.Iov = unsafe.SliceData(v.iov)
	v.msg.SetIovlen(len(v.iov))
	n, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&v.msg)),
		unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	v.msg.Iov = nil
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// TryPread reads from the page cache only. EAGAIN says that the first byte
// is not there; a short count says that a later one is not, or end of file.
func TryPread(fd uintptr, p []byte, off int64) (int, syscall.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	n, _, e := syscall.RawSyscall6(unix.SYS_PREADV2, fd, uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), 0, rwfNowait)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// Pread reads and may wait for the device.
func Pread(fd uintptr, p []byte, off int64) (int, syscall.Errno) {
	n, _, e := syscall.Syscall6(unix.SYS_PREAD64, fd, base(p), uintptr(len(p)), uintptr(off), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// Pwrite writes and may wait.
func Pwrite(fd uintptr, p []byte, off int64) (int, syscall.Errno) {
	n, _, e := syscall.Syscall6(unix.SYS_PWRITE64, fd, base(p), uintptr(len(p)), uintptr(off), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// TrySendfile moves up to n bytes of file from off to the non-blocking socket
// without copying them. The range must be in the page cache, where it does not
// wait; EAGAIN says that the socket is full, 0 that the file ends before off.
func TrySendfile(sock, file uintptr, off int64, n int) (int, syscall.Errno) {
	o := off
	r, _, e := syscall.RawSyscall6(unix.SYS_SENDFILE, sock, file, uintptr(unsafe.Pointer(&o)), uintptr(n), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(r), 0
}

// sysCachestat is cachestat(2), Linux 6.5; the number is the same on all
// architectures.
const sysCachestat = 451

type cachestatRange struct{ off, len uint64 }

type cachestat struct{ cached, dirty, writeback, evicted, recentlyEvicted uint64 }

// TryCached counts the pages of [off, off+n) that are in the page cache.
// ENOSYS says that the kernel is older than 6.5.
func TryCached(fd uintptr, off, n int64) (pages int64, e syscall.Errno) {
	r := cachestatRange{uint64(off), uint64(n)}
	var st cachestat
	_, _, e = syscall.RawSyscall6(sysCachestat, fd, uintptr(unsafe.Pointer(&r)),
		uintptr(unsafe.Pointer(&st)), 0, 0, 0)
	return int64(st.cached), e
}

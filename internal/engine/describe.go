package engine

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/sysio"
)

// fallbackAlign serves direct files whose needs the kernel does not tell: no
// common filesystem wants more.
const fallbackAlign = 4096

// Describe finds out whether f is open for direct I/O and which alignment it
// needs then, 1 otherwise. It refuses what is neither a regular file nor a
// block device. It is for implementations of Engine.
func Describe(f *os.File) (direct bool, align int, err error) {
	fd := int(f.Fd())
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_DIOALIGN, &st)
	if err != nil {
		return false, 0, fmt.Errorf("statx %q: %w", f.Name(), err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFREG && kind != unix.S_IFBLK {
		return false, 0, fmt.Errorf("open %q: not a regular file or block device", f.Name())
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return false, 0, fmt.Errorf("fcntl %q: %w", f.Name(), err)
	}
	if flags&unix.O_DIRECT == 0 {
		return false, 1, nil
	}
	// STATX_DIOALIGN is Linux 6.1 and not in every filesystem.
	align = int(max(st.Dio_mem_align, st.Dio_offset_align))
	if st.Mask&unix.STATX_DIOALIGN != 0 && align > 0 {
		return true, align, nil
	}
	if kind == unix.S_IFBLK {
		if n, err := unix.IoctlGetInt(fd, unix.BLKSSZGET); err == nil && n > 0 {
			return true, n, nil
		}
	}
	return true, fallbackAlign, nil
}

// diskOf is the number of the device that f is on, or is.
func diskOf(f *os.File) uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0 // shared with others of which nothing is known
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return st.Rdev
	}
	return st.Dev
}

// remoteFiles are the file systems whose answers come from another process or
// host, with the numbers of statfs(2).
var remoteFiles = []int64{
	unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.V9FS_MAGIC,
	unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.CODA_SUPER_MAGIC,
}

// Remote reports whether a transfer of f is to be kept from whoever has others to
// make: its file system may wait for an answer from elsewhere in a call that asks
// it not to wait. FUSE does; before Linux 6.5 a ring relied on the others not to.
// What cannot be asked counts as one of them.
func Remote(f *os.File) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return true
	}
	return slices.Contains(remoteFiles, int64(uint32(st.Type)))
}

// cachedChunk bounds one copy out of the page cache: the goroutine cannot be
// preempted in it, and a collection waits for it (a tenth of a millisecond).
const cachedChunk = 1 << 20

// ReadCached is ReadNow of every engine: it asks the page cache, which needs
// neither a ring nor a worker.
func ReadCached(f *File, p []byte, off int64) int {
	if f.Direct {
		return 0
	}
	n := 0
	for n < len(p) {
		m, e := sysio.TryPread(f.FD(), p[n:min(len(p), n+cachedChunk)], off+int64(n))
		if e != 0 || m == 0 {
			break
		}
		n += m
	}
	return n
}

package raw

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/sysio"
)

const (
	// defaultPreferred and maxPreferred bound what a file may prefer: some
	// devices announce absurd optimal sizes.
	defaultPreferred = 4096
	maxPreferred     = 1 << 20

	// safeAlign satisfies every device whose alignment cannot be asked for.
	safeAlign = 4096
)

// geometry is what does not change while a file is open.
type geometry struct {
	block      bool  // a block device
	size       int64 // when it was opened
	sector     int64 // block device: logical block size
	direct     bool  // open with O_DIRECT
	align      int64 // direct: alignment of memory, offset and length; else 1
	preferred  int64
	rotational bool
	fastZero   bool // block device: it makes zeroes itself
	late       bool // the file system is one of lateErrors
	mute       bool // it is one of muteReadOnly

	// id is equal for two names of one image.
	id ID
}

// ID tells images apart, whatever their names: it is that of a file, or of a block
// device, which many nodes may name.
type ID struct {
	block    bool
	dev, ino uint64
}

// Identify is the ID of an open file.
func Identify(f *os.File) (ID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return ID{}, os.NewSyscallError("stat", err)
	}
	return IDIn(&st), nil
}

// IDIn is the ID of the file that st describes.
func IDIn(st *unix.Stat_t) ID {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return ID{block: true, dev: st.Rdev}
	}
	return ID{dev: st.Dev, ino: st.Ino}
}

// survey looks at an open file.
func survey(f *os.File, o Options) (geometry, error) {
	g := geometry{align: 1, sector: fileBlock}
	fd := f.Fd()
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil {
		return g, err
	}
	g.id = IDIn(&st)
	disk, optimal := st.Dev, int64(st.Blksize)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		g.block = true
		disk, optimal = st.Rdev, queueNumber(st.Rdev, "optimal_io_size")
		g.fastZero = queueNumber(disk, "write_zeroes_max_bytes") > 0
	default:
		return g, &backing.Error{Op: "open", Path: o.Path, Off: -1, Kind: backing.ErrInvalid,
			Err: errors.New("neither a regular file nor a block device")}
	}
	g.rotational = queueNumber(disk, "rotational") > 0
	g.preferred = preferred(optimal)
	var err error
	if g.size, err = currentSize(fd, g.block); err != nil {
		return g, err
	}
	if g.block {
		err = g.surveyBlock(fd, o)
	} else {
		g.late, g.mute, err = manners(fd)
	}
	if err != nil {
		return g, err
	}
	return g, g.surveyDirect(fd, o)
}

// lateErrors are the file systems, with the numbers of statfs(2), where the error
// of a write to the page cache may be that of an earlier one, whose page could
// not be written back, and which no sync of the open file tells any more. NFS:
// nfs_file_write passes on what background writes met (file_check_and_advance_wb_err).
// Ceph: ceph_write_iter syncs every write while a pool is nearly full.
var lateErrors = []int64{unix.NFS_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC}

// muteReadOnly are the file systems, with the numbers of statfs(2), that drop what is
// written to files that were open when they became read-only, and have a sync of them
// succeed (ext4_sync_file), as after an emergency remount.
var muteReadOnly = []int64{unix.EXT4_SUPER_MAGIC}

// manners reports whether an open file is on one of lateErrors, and of muteReadOnly.
func manners(fd uintptr) (late, mute bool, err error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(fd), &st); err != nil {
		return false, false, os.NewSyscallError("statfs", err)
	}
	fs := int64(uint32(st.Type))
	return slices.Contains(lateErrors, fs), slices.Contains(muteReadOnly, fs), nil
}

// surveyBlock asks what only block devices answer.
func (g *geometry) surveyBlock(fd uintptr, o Options) error {
	ro, err := unix.IoctlGetInt(int(fd), unix.BLKROGET)
	if err != nil {
		return err
	}
	if ro != 0 && !o.ReadOnly {
		return &backing.Error{Op: "open", Path: o.Path, Off: -1, Kind: backing.ErrReadOnly,
			Err: errors.New("the block device is set read-only")}
	}
	n, err := unix.IoctlGetInt(int(fd), unix.BLKSSZGET)
	if err != nil {
		return err
	}
	g.sector = int64(n)
	g.preferred = max(g.preferred, preferred(g.sector))
	return nil
}

// surveyDirect finds the alignment that direct I/O needs.
func (g *geometry) surveyDirect(fd uintptr, o Options) error {
	fl, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	g.direct = fl&unix.O_DIRECT != 0
	if !g.direct {
		if o.Direct {
			return &backing.Error{Op: "open", Path: o.Path, Off: -1, Kind: backing.ErrNotSupported,
				Err: errors.New("file was not opened for direct I/O")}
		}
		return nil
	}
	var sx unix.Statx_t
	err = unix.Statx(int(fd), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &sx)
	switch {
	case err == nil && sx.Mask&unix.STATX_DIOALIGN != 0:
		g.align = int64(max(sx.Dio_mem_align, sx.Dio_offset_align))
		if sx.Dio_offset_align == 0 {
			return &backing.Error{Op: "open", Path: o.Path, Off: -1, Kind: backing.ErrNotSupported,
				Err: errors.New("file system has no direct I/O for this file")}
		}
	case g.block:
		g.align = g.sector
	default:
		g.align, err = probeAlign(fd, o)
		if err != nil {
			return err
		}
	}
	g.preferred = max(g.preferred, g.align)
	return nil
}

// endsDirectly refuses a file whose last block ends beyond the largest offset:
// past the page cache it cannot be transferred as a whole.
func (g *geometry) endsDirectly(path string) error {
	if g.size <= math.MaxInt64&^(g.align-1) {
		return nil
	}
	return &backing.Error{Op: "open", Path: path, Off: -1, Kind: backing.ErrNotSupported,
		Err: fmt.Errorf("the end of a file of %d bytes can be reached through the page cache only", g.size)}
}

// probeAlign tries whether a read of 512 bytes, into memory aligned no better
// than that, is taken. File systems before Linux 6.1, and tmpfs, do not tell.
func probeAlign(fd uintptr, o Options) (int64, error) {
	if o.Buffers == nil {
		return safeAlign, nil
	}
	b, err := o.Buffers.Get(context.Background(), safeAlign)
	if err != nil {
		return 0, err
	}
	defer b.Release()
	if _, e := sysio.Pread(fd, b.Bytes()[512:1024], 512); e != 0 {
		return safeAlign, nil
	}
	return 512, nil
}

// preferred makes a power of two within bounds of what the system names.
func preferred(n int64) int64 {
	if n&(n-1) != 0 {
		return defaultPreferred
	}
	return min(max(n, defaultPreferred), maxPreferred)
}

// currentSize is the size in bytes now.
func currentSize(fd uintptr, block bool) (int64, error) {
	if block {
		n, e := sysio.BlockSize(fd)
		return n, errnoError(e)
	}
	var st unix.Stat_t
	err := unix.Fstat(int(fd), &st)
	return st.Size, err
}

func errnoError(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// queueNumber reads an attribute of the queue of a device, or of the disk that
// a partition is a part of; 0 if there is none.
func queueNumber(dev uint64, name string) int64 {
	at := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(dev), unix.Minor(dev))
	for _, dir := range []string{"queue/", "../queue/"} {
		if b, err := os.ReadFile(at + dir + name); err == nil {
			n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64) // 0 on nonsense
			return n
		}
	}
	return 0
}

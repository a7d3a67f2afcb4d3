package copier

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// fileRequests are worth having in flight to a file: the page cache and a
// device queue profit, more only costs threads.
const fileRequests = 16

// File is a regular file or a block device, locked as QEMU does it.
type File struct {
	f       *os.File
	size    int64
	created bool
	unlock  func()
}

// OpenFile opens a source. Unless lock says otherwise it is refused while
// somebody else writes to it, and keeps others from that.
func OpenFile(path string, lock raw.LockMode) (*File, error) {
	d, err := openFile(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if err := d.lock(raw.Options{Path: path, ReadOnly: true, Lock: lock}); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func openFile(path string, flag int) (*File, error) {
	// O_NONBLOCK keeps a FIFO from holding the open.
	f, err := raw.PastLease(func() (*os.File, error) {
		return os.OpenFile(path, flag|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	})
	if err != nil {
		return nil, err
	}
	return &File{f: f}, nil
}

// lock locks the file, whose size is asked for then.
func (d *File) lock(o raw.Options) (err error) {
	if d.unlock, err = raw.Lock(d.f, o); err != nil {
		return err
	}
	d.size, err = d.f.Seek(0, io.SeekEnd)
	return err
}

// Created reports whether a Claim has made the file.
func (d *File) Created() bool { return d.created }

// File is the open file, which stays the Disk's.
func (d *File) File() *os.File { return d.f }

// Same reports whether both are one file, or one block device.
func (d *File) Same(o *File) (bool, error) {
	a, err := raw.Identify(d.f)
	if err != nil {
		return false, err
	}
	b, err := raw.Identify(o.f)
	return a == b, err
}

// Dup is another descriptor of the same open file, whose lock is that of the
// Disk. The caller closes it before the Disk.
func (d *File) Dup() (*os.File, error) {
	fd, err := unix.FcntlInt(d.f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), d.f.Name()), nil
}

// Size implements Disk.
func (d *File) Size() int64 { return d.size }

// Shape implements Disk.
func (d *File) Shape() Shape { return Shape{Align: 1, MaxIO: limits.MaxIO, Requests: fileRequests} }

// Close implements Disk.
func (d *File) Close() error {
	if d.unlock != nil {
		d.unlock()
	}
	return d.f.Close()
}

// ReadAt implements Disk. The context is looked at between requests only: a
// file answers.
func (d *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	n, err := d.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// WriteAt implements Disk.
func (d *File) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, off)
	return err
}

// Zero implements Disk.
func (d *File) Zero(ctx context.Context, off, n int64, allocate bool) error {
	mode := uint32(unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE)
	if allocate {
		mode = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_ZERO_RANGE
	}
	err := d.fallocate(ctx, mode, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return writeZeroes(ctx, d, off, n)
	}
	return err
}

// fallocate goes on after signals: the runtime sends itself many.
func (d *File) fallocate(ctx context.Context, mode uint32, off, n int64) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := unix.Fallocate(int(d.f.Fd()), mode, off, n)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Flush implements Disk. It makes the name of a file durable that a Claim has made,
// and asks the kernel to forget the pages, so that a verification reads what the
// storage has.
func (d *File) Flush(context.Context) error {
	if err := d.f.Sync(); err != nil {
		return err
	}
	if d.created {
		if err := d.SyncName(); err != nil {
			return err
		}
	}
	unix.Fadvise(int(d.f.Fd()), 0, 0, unix.FADV_DONTNEED)
	return nil
}

// SyncName makes the name of the file durable, as raw.SyncName does.
func (d *File) SyncName() error { return raw.SyncName(d.f) }

// Extents implements Disk. What the file system cannot tell apart is data, as is
// what lies beyond the end of a file that shrank: who reads that finds out.
func (d *File) Extents(ctx context.Context, yield func(Extent) bool) error {
	for off := int64(0); off < d.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := d.f.Seek(off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // a hole to the end, or none of it is left
			if data, err = d.f.Seek(0, io.SeekEnd); err != nil {
				return err
			}
			data = max(data, off)
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			data = off
		case err != nil:
			return err
		}
		if data = min(data, d.size); data > off && !yield(Extent{Off: off, Len: data - off, Zero: true}) {
			return nil
		}
		if off = data; off == d.size {
			return nil
		}
		hole, err := d.f.Seek(off, unix.SEEK_HOLE)
		if err != nil {
			hole = d.size
		}
		hole = min(max(hole, off+1), d.size)
		if !yield(Extent{Off: off, Len: hole - off}) {
			return nil
		}
		off = hole
	}
	return nil
}

// writeZeroes is Zero for a disk without a command for it.
func writeZeroes(ctx context.Context, d Disk, off, n int64) error {
	s := d.Shape()
	p := make([]byte, min(n, max(1<<20, s.Align), s.MaxIO))
	for n > 0 {
		step := min(n, int64(len(p)))
		if err := d.WriteAt(ctx, p[:step], off); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

package copier

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// fileRequests are worth having in flight to a file: the page cache and a
// device queue profit, more only costs threads.
const fileRequests = 16

// File is a regular file or a block device.
type File struct {
	f       *os.File
	size    int64
	created bool
}

// OpenFile opens a source.
func OpenFile(path string) (*File, error) { return openFile(path, os.O_RDONLY) }

// CreateFile opens a destination, or makes a sparse file of size bytes if
// there is none.
func CreateFile(path string, size int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return openFile(path, os.O_RDWR)
	}
	if err != nil {
		return nil, err
	}
	d := &File{f: f, size: size, created: true}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, d.Discard())
	}
	return d, nil
}

func openFile(path string, flag int) (*File, error) {
	// O_NONBLOCK keeps a FIFO from holding the open.
	f, err := os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	size, err := measure(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open %q: %w", path, err)
	}
	return &File{f: f, size: size}, nil
}

// measure is the size of a file or block device.
func measure(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if m := st.Mode(); !m.IsRegular() && m.Type() != os.ModeDevice {
		return 0, errors.New("neither a regular file nor a block device")
	}
	return f.Seek(0, io.SeekEnd)
}

// Created reports whether CreateFile has made the file.
func (d *File) Created() bool { return d.created }

// File is the open file, which stays the Disk's.
func (d *File) File() *os.File { return d.f }

// Same reports whether both are one file.
func (d *File) Same(o *File) bool {
	a, err := d.f.Stat()
	if err != nil {
		return false
	}
	b, err := o.f.Stat()
	return err == nil && os.SameFile(a, b)
}

// Discard closes the file and removes it if CreateFile has made it.
func (d *File) Discard() error {
	err := d.f.Close()
	if d.created {
		err = errors.Join(err, os.Remove(d.f.Name()))
	}
	return err
}

// Size implements Disk.
func (d *File) Size() int64 { return d.size }

// Shape implements Disk.
func (d *File) Shape() Shape { return Shape{Align: 1, MaxIO: limits.MaxIO, Requests: fileRequests} }

// Close implements Disk.
func (d *File) Close() error { return d.f.Close() }

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

// Flush implements Disk. It also asks the kernel to forget the pages, so that
// a verification reads what the storage has.
func (d *File) Flush(context.Context) error {
	if err := d.f.Sync(); err != nil {
		return err
	}
	unix.Fadvise(int(d.f.Fd()), 0, 0, unix.FADV_DONTNEED)
	return nil
}

// Extents implements Disk. What the file system cannot tell apart is data.
func (d *File) Extents(ctx context.Context, yield func(Extent) bool) error {
	for off := int64(0); off < d.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := d.f.Seek(off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // a hole to the end
			data = d.size
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

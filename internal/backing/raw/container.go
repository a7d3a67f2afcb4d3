package raw

import (
	"context"
	"errors"
	"math"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// What follows is for the formats that keep their own structure in the file:
// to them it is a container whose end moves. Offsets and lengths are in bytes.

// Fixed reports that the end cannot move: a block device.
func (d *Device) Fixed() bool { return d.geo.block }

// Sector is the logical sector of a block device in bytes; 0 for a file.
func (d *Device) Sector() int64 {
	if !d.geo.block {
		return 0
	}
	return d.geo.sector
}

// End asks the file where it ends now.
func (d *Device) End() (int64, error) {
	if err := d.usable(); err != nil {
		return 0, err
	}
	n, err := currentSize(d.file.FD(), d.geo.block)
	return n, d.failed("size", -1, 0, err)
}

// ReadSome fills p and returns how much of it the file had; that is less than
// len(p), without an error, only where the file never had more: what it had when
// it was opened, or was written since, and has no more is ErrIO.
func (d *Device) ReadSome(ctx context.Context, p []byte, off int64) (int, error) {
	if err := inRange(off, int64(len(p))); err != nil {
		return 0, d.failed("read", off, int64(len(p)), err)
	}
	if err := d.usable(); err != nil {
		return 0, err
	}
	end := d.size.Load() // before the read, or what is appended meanwhile would be missed
	n, err := d.al.ReadAt(ctx, p, off)
	if err == nil && n < len(p) && off+int64(n) < end {
		err = d.shorter(off+int64(n), end)
	}
	return n, d.failed("read", off, int64(len(p)), err)
}

// Append is WriteAt, of a range that may go beyond the end of the file and
// then moves it. ErrNoSpace where a block device ends.
func (d *Device) Append(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	n := int64(len(p))
	if err := inRange(off, n); err != nil {
		return d.failed("write", off, n, err)
	}
	if off+n <= d.size.Load() {
		return d.WriteAt(ctx, p, off, f)
	}
	if d.geo.block {
		if end, err := d.End(); err != nil || off+n > end {
			d.threshold.writes(off + n)
			return d.failed("write", off, n, errors.Join(err, unix.ENOSPC))
		}
	}
	if !d.al.Fits(off, n) {
		d.tail.Store(true)
	}
	err := d.WriteAt(ctx, p, off, f)
	if err == nil {
		d.grown(off + n)
	}
	return err
}

// grown makes known that the file reaches end at least.
func (d *Device) grown(end int64) {
	for old := d.size.Load(); end > old && !d.size.CompareAndSwap(old, end); old = d.size.Load() {
	}
}

// Truncate moves the end of the file. What is cut off must not be in use: no
// Mapping of it may be open, no transfer in flight. A Device that shrank in
// this way must not be served to guests byte for byte.
func (d *Device) Truncate(size int64) error {
	if err := d.writable(); err != nil {
		return err
	}
	if d.geo.block {
		return backing.ErrNotSupported
	}
	if size < 0 {
		return d.failed("truncate", size, 0, unix.EINVAL)
	}
	if !d.al.Fits(size, 0) {
		d.tail.Store(true)
	}
	defer d.seen.changed()
	for {
		err := unix.Ftruncate(int(d.file.FD()), size)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil {
			d.size.Store(size)
		}
		return d.failed("truncate", size, 0, err)
	}
}

// Punch gives the storage of a range back, which then reads as zeroes. The end
// of the file stays where it is. ErrNotSupported has touched nothing.
func (d *Device) Punch(ctx context.Context, off, n int64) error {
	if err := inRange(off, n); err != nil {
		return d.failed("punch", off, n, err)
	}
	if d.geo.block {
		return d.Zero(ctx, off, n, backing.FastZero)
	}
	if err := d.writable(); err != nil {
		return err
	}
	defer d.seen.changed()
	return d.finish(ctx, "punch", off, n, 0, d.punch(ctx, off, n))
}

// inRange refuses what no file can have.
func inRange(off, n int64) error {
	if off < 0 || n < 0 || off > math.MaxInt64-n {
		return unix.EINVAL
	}
	return nil
}

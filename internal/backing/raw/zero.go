package raw

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/sysio"
)

// zeroStep bounds one zeroing call on a block device, where the kernel may
// have to write: the caller can give up in between.
const zeroStep = 64 << 20

// fileBlock is the unit to which trims of a file are rounded.
const fileBlock = 4096

// pageSize is the unit of the page cache.
var pageSize = int64(os.Getpagesize())

// zeroes is what is written to the parts of blocks.
var zeroes [fileBlock]byte

// punches asks the file system, about a range behind the end of the file,
// whether it can punch holes. Contents and size stay as they are.
func punches(fd uintptr) bool {
	size, err := currentSize(fd, false)
	if err != nil {
		return false
	}
	past := (size + fileBlock - 1) &^ (fileBlock - 1)
	return unix.Fallocate(int(fd), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, past+fileBlock, fileBlock) == nil
}

// Zero deallocates the range, or with NoHole leaves it allocated. It never
// relies on discarded blocks to read as zeroes.
func (d *Device) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if err := d.writable(); err != nil {
		return err
	}
	defer d.seen.changed()
	zero := d.zeroFile
	if d.geo.block {
		zero = d.zeroBlocks
	}
	return d.finish(ctx, "zero", off, n, f, zero(ctx, off, n, f))
}

// Trim deallocates the whole blocks inside the range.
func (d *Device) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	if err := d.writable(); err != nil {
		return err
	}
	defer d.seen.changed()
	return d.finish(ctx, "trim", off, n, f, d.trim(ctx, off, n))
}

// finish ends a Zero or Trim: durably if that was asked for.
func (d *Device) finish(ctx context.Context, op string, off, n int64, f backing.Flags, err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return backing.ErrNotSupported
	}
	if err == nil && (f&backing.FUA != 0 || d.opt.Writethrough) {
		return d.Flush(ctx)
	}
	return d.failed(op, off, n, err)
}

// zeroFile punches if a hole is allowed. Both operations are fast, and leave
// the range untouched when the file system does not know them.
func (d *Device) zeroFile(ctx context.Context, off, n int64, f backing.Flags) error {
	if f&backing.NoHole == 0 {
		if err := d.punch(ctx, off, n); !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return d.zeroRange(ctx, off, n)
}

// punch is OpPunch. Of a block device it zeroes the range only if the device
// can do that itself.
func (d *Device) punch(ctx context.Context, off, n int64) error {
	if d.noPunch.Load() {
		return unix.EOPNOTSUPP
	}
	err := d.operate(ctx, engine.OpPunch, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		d.noPunch.Store(true)
	}
	return err
}

// zeroRange is OpZero. For a block device it is the same as BLKZEROOUT: the
// kernel writes zeroes where the device cannot make them.
func (d *Device) zeroRange(ctx context.Context, off, n int64) error {
	if d.noZero.Load() {
		return unix.EOPNOTSUPP
	}
	err := d.operate(ctx, engine.OpZero, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) { // what is written in its place counts
		d.noZero.Store(true)
		return err
	}
	d.threshold.writes(off + n)
	return err
}

// operate keeps partial writes of the same blocks away meanwhile: they would
// write back what they read before.
func (d *Device) operate(ctx context.Context, op engine.Op, off, n int64) error {
	l, err := d.al.Share(ctx, off, n)
	if err != nil {
		return err
	}
	if l != nil {
		defer l.Release()
	}
	return d.pastPages(ctx, off, n, func() error { return d.al.Do(ctx, op, off, n) })
}

// pastPages makes try zero or trim the range. Of a block device that somebody else
// has opened with O_EXCL, if only for a moment, the kernel drops no pages that are
// not written back, and says EBUSY (truncate_bdev_range): that is done then.
func (d *Device) pastPages(ctx context.Context, off, n int64, try func() error) error {
	err := try()
	for range limits.BusyRetries {
		if !d.geo.block || !errors.Is(err, unix.EBUSY) {
			break
		}
		if err := d.fdatasync(context.WithoutCancel(ctx), "flush", off, n); err != nil {
			return err
		}
		err = try()
	}
	return err
}

// zeroBlocks zeroes the whole blocks inside the range, then writes zeroes to
// the parts of blocks at its ends: a FastZero that is refused has touched
// nothing.
func (d *Device) zeroBlocks(ctx context.Context, off, n int64, f backing.Flags) error {
	block := d.geo.sector
	if f&backing.FastZero != 0 && d.cached() {
		block = max(block, pageSize) // of parts of pages the kernel makes zeroes at once
	}
	lo, hi := d.inward(off, n, block)
	if lo >= hi {
		if f&backing.FastZero != 0 {
			return unix.EOPNOTSUPP
		}
		return d.writeZeroes(ctx, off, off+n)
	}
	if err := d.zeroWhole(ctx, lo, hi, f); err != nil {
		return err
	}
	if err := d.writeZeroes(ctx, off, lo); err != nil {
		return err
	}
	return d.writeZeroes(ctx, hi, off+n)
}

// zeroWhole zeroes [lo, hi), which lies on blocks.
func (d *Device) zeroWhole(ctx context.Context, lo, hi int64, f backing.Flags) error {
	if f&backing.FastZero != 0 {
		if f&backing.NoHole != 0 {
			return unix.EOPNOTSUPP // no call zeroes without both unmapping and falling back
		}
		return d.punchOrKeep(ctx, lo, hi-lo)
	}
	for lo < hi {
		n := min(hi-lo, zeroStep)
		err := error(unix.EOPNOTSUPP)
		if f&backing.NoHole == 0 {
			err = d.punch(ctx, lo, n)
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = d.zeroRange(ctx, lo, n)
		}
		if err != nil {
			return err
		}
		lo += n
	}
	return nil
}

// punchOrKeep is punch of a range that has what was written to it if the device
// refuses. The kernel drops the pages of the range before it asks the device, those
// that are not written back too (blkdev_fallocate): that is done first, until the
// device has shown that it does not refuse.
func (d *Device) punchOrKeep(ctx context.Context, off, n int64) error {
	if d.cached() && !d.noPunch.Load() && !d.punched.Load() {
		if err := d.fdatasync(context.WithoutCancel(ctx), "flush", off, n); err != nil {
			return err
		}
	}
	err := d.punch(ctx, off, n)
	if err == nil {
		d.punched.Store(true)
	}
	return err
}

// writeZeroes writes [lo, hi).
func (d *Device) writeZeroes(ctx context.Context, lo, hi int64) error {
	for lo < hi {
		p := zeroes[:min(hi-lo, fileBlock)]
		d.threshold.writes(lo + int64(len(p)))
		if err := d.al.WriteAt(ctx, p, lo); err != nil {
			return err
		}
		lo += int64(len(p))
	}
	return nil
}

func (d *Device) trim(ctx context.Context, off, n int64) error {
	if !d.geo.block {
		if lo, hi := d.inward(off, n, fileBlock); lo < hi {
			return d.punch(ctx, lo, hi-lo)
		}
		return nil
	}
	lo, hi := d.inward(off, n, d.geo.sector)
	if lo >= hi {
		return nil
	}
	if d.noDiscard.Load() {
		return unix.EOPNOTSUPP
	}
	l, err := d.al.Share(ctx, lo, hi-lo)
	if err != nil {
		return err
	}
	if l != nil {
		defer l.Release()
	}
	err = d.pastPages(ctx, lo, hi-lo, func() error { return errnoError(sysio.BlockDiscard(d.file.FD(), lo, hi-lo)) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		d.noDiscard.Store(true)
	}
	return err
}

// inward gives the whole blocks inside a range; lo ≥ hi says that there are
// none. A range may end at the largest offset that there is.
func (d *Device) inward(off, n, block int64) (lo, hi int64) {
	before := -off & (block - 1)
	if before >= n {
		return 0, 0
	}
	return off + before, (off + n) &^ (block - 1)
}

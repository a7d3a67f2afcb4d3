// Package raw serves a regular file or a block device byte for byte.
package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Options says how a file is served. The zero value is a writable file in the
// page cache, locked where the file system knows locks.
type Options struct {
	Path     string // for errors and logs only
	ReadOnly bool   // f may be open for writing all the same

	// Direct demands that f was opened with O_DIRECT. Without it, the flag
	// of f decides.
	Direct bool

	// Writethrough makes every write durable before it is answered.
	Writethrough bool

	// Container says that the file holds an image of a format with a structure
	// of its own: nobody else may move its end, and QEMU expects that to be
	// locked too.
	Container bool

	Lock    LockMode
	For     string        // whom the image is opened for: those are told who cannot open it meanwhile
	Buffers *bufpool.Pool // needed for direct files only
	Log     *slog.Logger  // nil: slog.Default

	// Lost, if not nil, is why the device is poisoned from the beginning, unless it is
	// ReadOnly: a write was lost when the file was open before.
	Lost error

	// Poisoned, if not nil, is called once when the device is, with what it
	// was that failed. It does not wait for anything.
	Poisoned func(err error)
}

// Device is an open file or block device. It has the errors, poison included,
// of one open file: all connections share it.
type Device struct {
	opt    Options
	eng    engine.Engine
	file   *engine.File
	al     *backing.Aligned
	unlock func()
	geo    geometry
	caps   backing.Caps
	locked bool // nobody else writes: what was seen of the file stays true

	size   atomic.Int64 // bytes, never falls
	growth growth
	shrunk atomic.Bool // the file was found shorter than size; said once
	tail   atomic.Bool // direct: parts of blocks were written at a moving end
	closed atomic.Bool

	threshold *Threshold // nil for none; set before the first write

	sync     syncer
	durables durables
	poison   atomic.Pointer[backing.Error] // set once
	seen     extents
	seeks    chan struct{} // has one for each who asks the file for its extents

	punched atomic.Bool // a block device made zeroes itself

	// What the kernel once refused with EOPNOTSUPP is not asked again.
	noPunch, noZero, noDiscard, noSeek atomic.Bool
}

// Open takes over f, also when it fails. f must be a regular file or a block
// device, open for writing unless o.ReadOnly. Errors: ErrLocked, ErrReadOnly
// (a block device that is switched to read-only), ErrInvalid (neither file nor
// block device), ErrNotSupported (no direct I/O here).
func Open(f *os.File, e engine.Engine, o Options) (*Device, error) {
	d := &Device{opt: o, eng: e, unlock: func() {}, seeks: make(chan struct{}, limits.ExtentSeeks)}
	if d.opt.Log == nil {
		d.opt.Log = slog.Default()
	}
	if err := d.open(f); err != nil {
		d.unlock()
		if d.file != nil {
			_ = d.file.Close() // the error that matters is err
		} else {
			_ = f.Close()
		}
		return nil, d.wrap("open", -1, 0, err)
	}
	return d, nil
}

func (d *Device) open(f *os.File) (err error) {
	if d.geo, err = survey(f, d.opt); err != nil {
		return err
	}
	d.size.Store(d.geo.size)
	if d.opt.Lost != nil && !d.opt.ReadOnly {
		d.poison.Store(&backing.Error{Op: "open", Path: d.opt.Path, Off: -1, Kind: backing.ErrPoisoned, Err: d.opt.Lost})
	}
	if d.locked, d.unlock, err = lockImage(f, d.geo, d.opt); err != nil {
		return err
	}
	if d.file, err = d.eng.Open(f); err != nil {
		return err
	}
	d.file.OnError = func(op engine.Op, err error) error { return d.explain(op.String(), err) }
	if d.geo.direct {
		d.geo.align = max(d.geo.align, int64(d.file.Align))
		d.file.Align = int(d.geo.align)
		if err := d.geo.endsDirectly(d.opt.Path); err != nil {
			return err
		}
	}
	d.al, err = backing.NewAligned(context.Background(), d.eng, d.file, d.geo.align, d.opt.Buffers)
	if err != nil {
		return err
	}
	d.caps = d.capabilities()
	return nil
}

// capabilities finds out what the file can do. Only what a refusal cannot
// hurt is left to the first use.
func (d *Device) capabilities() backing.Caps {
	c := backing.CanFlush | backing.CanMultiConn | backing.CanExtents
	if d.geo.rotational {
		c |= backing.IsRotational
	}
	if !d.geo.direct {
		c |= backing.CanCache
	}
	if d.opt.ReadOnly {
		return c
	}
	c |= backing.CanWrite | backing.CanFUA | backing.CanTrim | backing.CanZero
	if d.geo.block && d.geo.fastZero || !d.geo.block && punches(d.file.FD()) {
		c |= backing.CanFastZero
	}
	return c
}

// ReadAt fills p. What lies beyond the end of a file that shrank is ErrIO.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.usable(); err != nil {
		return err
	}
	n, err := d.al.ReadAt(ctx, p, off)
	if err == nil && n < len(p) {
		err = d.shorter(off+int64(n), d.size.Load())
	}
	return d.failed("read", off, int64(len(p)), err)
}

// shorter is the error of who found the file to end before size. It is logged once.
func (d *Device) shorter(end, size int64) error {
	if d.shrunk.CompareAndSwap(false, true) {
		d.opt.Log.Error("image is shorter than it was", "path", d.opt.Path, "end", end, "size", size)
	}
	return fmt.Errorf("file is shorter than it was: %w", io.ErrUnexpectedEOF)
}

// WriteAt writes p, durably with FUA or when the device writes through.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if err := d.writable(); err != nil {
		return err
	}
	d.threshold.writes(off + int64(len(p)))
	defer d.seen.changed()
	var err error
	if f&backing.FUA != 0 || d.opt.Writethrough {
		err = d.writeDurably(ctx, p, off)
	} else {
		err = d.al.WriteAt(ctx, p, off)
	}
	return d.failed("write", off, int64(len(p)), err)
}

// Cache starts reading the range into the page cache.
func (d *Device) Cache(_ context.Context, off, n int64) error {
	if d.geo.direct {
		return backing.ErrNotSupported
	}
	if err := d.usable(); err != nil {
		return err
	}
	err := unix.Fadvise(int(d.file.FD()), off, n, unix.FADV_WILLNEED)
	return d.failed("cache", off, n, err)
}

// Map names the range of the file itself.
func (d *Device) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if size := d.size.Load(); off < 0 || n <= 0 || off > size || n > size-off || !d.al.Fits(off, n) {
		return backing.ErrNotMappable
	}
	if err := d.usable(); err != nil {
		return err
	}
	var lease backing.Lease
	if op != engine.OpRead {
		if err := d.writable(); err != nil {
			return err
		}
		if op != engine.OpWrite || d.opt.Writethrough {
			return backing.ErrNotMappable
		}
		if lease = d.leaseWrite(off, n); lease == nil {
			return backing.ErrNotMappable
		}
		d.threshold.writes(off + n)
	}
	m.Runs[0], m.N, m.Lease = backing.Run{File: d.file, Off: off, Len: n}, 1, lease
	if op == engine.OpRead && n >= limits.HoleRead && d.knownHole(off, n) {
		m.Runs[0] = backing.Run{Len: n}
	}
	return nil
}

// leaseWrite announces a write that goes past the device, or returns nil when
// a part of one of its blocks is being written.
func (d *Device) leaseWrite(off, n int64) backing.Lease {
	l, ok := d.al.TryShare(off, n, (*mappedWrite)(d))
	if !ok {
		return nil
	}
	d.seen.mapped.Add(1)
	return l
}

// mappedWrite is the lease of a mapped write.
type mappedWrite Device

// Release makes the write known to Extents.
func (l *mappedWrite) Release() {
	l.seen.changed()
	l.seen.mapped.Add(-1)
}

// Close gives up the locks and the file, once: further calls do nothing. It does
// not flush. All else that is called later fails, but for Info.
func (d *Device) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	d.al.Close()
	d.unlock()
	return d.file.Close()
}

// usable tells that the device was closed, or nil.
func (d *Device) usable() error {
	if d.closed.Load() {
		return &backing.Error{Op: "use", Path: d.opt.Path, Off: -1, Kind: backing.ErrIO, Err: os.ErrClosed}
	}
	return nil
}

// writable tells why the device takes no writes, or nil.
func (d *Device) writable() error {
	if d.opt.ReadOnly {
		return backing.ErrReadOnly
	}
	if err := d.usable(); err != nil {
		return err
	}
	return d.poisoned()
}

// poisoned is nil until a write was lost.
func (d *Device) poisoned() error {
	if e := d.poison.Load(); e != nil {
		return e
	}
	return nil
}

// lost poisons the device because of err. The kernel reports the loss of
// cached pages once: a later success would say nothing.
func (d *Device) lost(op string, err error) {
	e := &backing.Error{Op: op, Path: d.opt.Path, Off: -1, Kind: backing.ErrPoisoned, Err: err}
	if d.poison.CompareAndSwap(nil, e) {
		d.opt.Log.Error("acknowledged writes may be lost, image takes no more writes until it is opened anew",
			"path", d.opt.Path, "op", op, "error", err)
		if d.opt.Poisoned != nil {
			d.opt.Poisoned(e)
		}
	}
}

// failed wraps the error of a transfer.
func (d *Device) failed(op string, off, n int64, err error) error {
	return d.wrap(op, off, n, d.explain(op, err))
}

// explain tells a device that went away from one that is full, or failed. It does
// not come back with what was written to it. Linux gives a device that was pulled
// out the size 0: reads of it end at once, and writes find no space. So do writes
// beyond the end of one that shrank, and zeroing there is invalid. A write to the
// page cache of one of lateErrors counts as the loss of earlier ones, even for lack
// of room: a guest that waits for that would go on without them.
func (d *Device) explain(op string, err error) error {
	if err == nil || backing.GaveUp(err) {
		return err
	}
	if d.geo.block {
		end, size, shrank := d.shrank()
		switch {
		case !shrank:
		case end == 0:
			err = fmt.Errorf("%w: %v", unix.ENODEV, err)
		case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL):
			err = d.shorter(end, size)
		}
	}
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		d.lost("transfer", err)
	} else if d.geo.late && d.cached() && op == engine.OpWrite.String() {
		d.lost(op, err)
		return d.poisoned()
	}
	return err
}

// wrap gives err its place, unless it has one or the caller gave up waiting.
func (d *Device) wrap(op string, off, n int64, err error) error {
	return backing.WrapIn(op, d.opt.Path, off, n, err)
}

package backing

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Checked tops every chain. It holds what one connection was told (size,
// block size, capabilities) and checks each call against it, once: no device
// below sees a range outside the disk, a call that it cannot do or a flag that
// it was not offered.
type Checked struct {
	dev  Device
	info Info
}

// NewChecked snapshots the device's Info, without the capabilities in deny.
// Denying CanWrite makes a read-only view.
func NewChecked(dev Device, deny Caps) *Checked {
	info := dev.Info()
	if deny&CanWrite != 0 {
		deny |= CanTrim | CanZero | CanFastZero | CanFUA
	}
	info.Caps &^= deny
	return &Checked{dev: dev, info: info}
}

// Info is the snapshot.
func (c *Checked) Info() Info { return c.info }

// check allows off, n inside the disk and on block boundaries; numbers that
// were too large for a signed integer come in negative. need is the
// capability without which the call is refused as kind.
func (c *Checked) check(off, n int64, need Caps, kind Kind) error {
	switch {
	case !c.info.Caps.Has(need):
		return kind
	case n == 0:
		return ErrInvalid
	case off < 0 || n < 0 || off > c.info.Size || n > c.info.Size-off:
		return ErrOutOfRange
	case (off|n)&(c.info.MinBlock-1) != 0:
		return ErrAlignment
	}
	return nil
}

// checkFlags allows FUA where writes are durable at all.
func (c *Checked) checkFlags(f, allowed Flags) error {
	if f&^allowed != 0 || f&FUA != 0 && !c.info.Caps.Has(CanFUA) {
		return ErrInvalid
	}
	return nil
}

func (c *Checked) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := c.check(off, int64(len(p)), 0, ""); err != nil {
		return err
	}
	return c.dev.ReadAt(ctx, p, off)
}

// MayWrite tells whether WriteAt would be let through, before the bytes are
// there.
func (c *Checked) MayWrite(off, n int64, f Flags) error {
	if err := c.check(off, n, CanWrite, ErrReadOnly); err != nil {
		return err
	}
	return c.checkFlags(f, FUA)
}

func (c *Checked) WriteAt(ctx context.Context, p []byte, off int64, f Flags) error {
	if err := c.MayWrite(off, int64(len(p)), f); err != nil {
		return err
	}
	return c.dev.WriteAt(ctx, p, off, f)
}

func (c *Checked) Zero(ctx context.Context, off, n int64, f Flags) error {
	if err := c.check(off, n, CanWrite, ErrReadOnly); err != nil {
		return err
	}
	if err := c.checkFlags(f, FUA|NoHole|FastZero); err != nil {
		return err
	}
	if f&FastZero != 0 && !c.info.Caps.Has(CanFastZero) {
		return ErrInvalid
	}
	return c.dev.Zero(ctx, off, n, f)
}

func (c *Checked) Trim(ctx context.Context, off, n int64, f Flags) error {
	if err := c.check(off, n, CanWrite, ErrReadOnly); err != nil {
		return err
	}
	if !c.info.Caps.Has(CanTrim) {
		return ErrInvalid
	}
	if err := c.checkFlags(f, FUA); err != nil {
		return err
	}
	return c.dev.Trim(ctx, off, n, f)
}

func (c *Checked) Flush(ctx context.Context) error { return c.dev.Flush(ctx) }

// Cache is a hint: no more than the first limits.CacheMost bytes are read.
func (c *Checked) Cache(ctx context.Context, off, n int64) error {
	if err := c.check(off, n, 0, ""); err != nil {
		return err
	}
	return c.dev.Cache(ctx, off, min(n, limits.CacheMost))
}

func (c *Checked) Extents(ctx context.Context, off, n int64, f Flags, yield func(Extent) bool) error {
	if err := c.check(off, n, 0, ""); err != nil {
		return err
	}
	if err := c.checkFlags(f, ReqOne|AsRead|Partial); err != nil {
		return err
	}
	return c.dev.Extents(ctx, off, n, f, yield)
}

func (c *Checked) Map(op engine.Op, off, n int64, m *Mapping) error {
	var err error
	if op == engine.OpWrite {
		err = c.check(off, n, CanWrite, ErrReadOnly)
	} else {
		err = c.check(off, n, 0, "")
	}
	if err != nil {
		return err
	}
	return c.dev.Map(op, off, n, m)
}

// Close does nothing: a view does not own the device.
func (c *Checked) Close() error { return nil }

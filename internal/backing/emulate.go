package backing

import (
	"context"
	"errors"
	"os"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// zeroes is what is written where a device cannot zero.
var zeroes [256 << 10]byte

// Emulate gives a format what it lacks: zeroing by writes, FUA by flush, one
// data extent for a device that knows no holes, and a Trim and Cache that do
// nothing. Info shows the sum. It also gives it an end: what is called after Close
// fails, and Close works once, whatever the format has in memory.
type Emulate struct {
	Passthrough
	native Caps
	closed atomic.Bool
}

// NewEmulate stands above the format.
func NewEmulate(dev Device) *Emulate {
	return &Emulate{Passthrough: Passthrough{Next: dev}, native: dev.Info().Caps}
}

// Info adds the emulated capabilities of a writable device.
func (e *Emulate) Info() Info {
	i := e.Next.Info()
	i.Caps |= CanExtents | CanCache | CanFlush
	if i.Caps.Has(CanWrite) {
		i.Caps |= CanZero | CanFUA | CanTrim
	}
	return i
}

// Close closes the format, once.
func (e *Emulate) Close() error {
	if e.closed.Swap(true) {
		return nil
	}
	return e.Next.Close()
}

// errClosed is the answer of a disk that was closed.
var errClosed error = &Error{Op: "use", Off: -1, Kind: ErrIO, Err: os.ErrClosed}

// usable is errClosed after Close.
func (e *Emulate) usable() error {
	if e.closed.Load() {
		return errClosed
	}
	return nil
}

// Map forwards: emulation changes no bytes.
func (e *Emulate) Map(op engine.Op, off, n int64, m *Mapping) error {
	if err := e.usable(); err != nil {
		return err
	}
	return e.Next.Map(op, off, n, m)
}

func (e *Emulate) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := e.usable(); err != nil {
		return err
	}
	return e.Next.ReadAt(ctx, p, off)
}

func (e *Emulate) Flush(ctx context.Context) error {
	if err := e.usable(); err != nil {
		return err
	}
	return e.Next.Flush(ctx)
}

func (e *Emulate) WriteAt(ctx context.Context, p []byte, off int64, f Flags) error {
	if err := e.usable(); err != nil {
		return err
	}
	if f&FUA == 0 || e.native.Has(CanFUA) {
		return e.Next.WriteAt(ctx, p, off, f)
	}
	if err := e.Next.WriteAt(ctx, p, off, f&^FUA); err != nil {
		return err
	}
	return e.Next.Flush(ctx)
}

// Zero falls back to writing zeroes, unless the caller wanted it fast. What it
// has not begun to write when ctx ends stays as it is.
func (e *Emulate) Zero(ctx context.Context, off, n int64, f Flags) error {
	if err := e.usable(); err != nil {
		return err
	}
	var err error = ErrNotSupported
	if e.native.Has(CanZero) {
		fua := f & FUA
		if !e.native.Has(CanFUA) {
			fua = 0
		}
		err = e.Next.Zero(ctx, off, n, f&^FUA|fua)
		if err == nil && f&FUA != fua {
			err = e.Next.Flush(ctx)
		}
	}
	if !errors.Is(err, ErrNotSupported) || f&FastZero != 0 {
		return err
	}
	for n > 0 {
		if err := ctx.Err(); err != nil { // a write into the page cache does not look
			return err
		}
		// Pieces end on boundaries, whatever the beginning: a device writes
		// whole blocks at once.
		p := zeroes[:min(n, int64(len(zeroes))-off%int64(len(zeroes)))]
		if err := e.Next.WriteAt(ctx, p, off, 0); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	if f&FUA != 0 {
		return e.Next.Flush(ctx)
	}
	return nil
}

// Trim is a hint: what the device cannot do is done by doing nothing.
func (e *Emulate) Trim(ctx context.Context, off, n int64, f Flags) error {
	if err := e.usable(); err != nil {
		return err
	}
	if e.native.Has(CanTrim) {
		fua := f & FUA
		if !e.native.Has(CanFUA) {
			fua = 0
		}
		if err := e.Next.Trim(ctx, off, n, fua); err != nil && !errors.Is(err, ErrNotSupported) {
			return err
		} else if err == nil && f&FUA == fua {
			return nil
		}
	}
	if f&FUA != 0 {
		return e.Next.Flush(ctx)
	}
	return nil
}

// Cache is a hint too.
func (e *Emulate) Cache(ctx context.Context, off, n int64) error {
	if err := e.usable(); err != nil {
		return err
	}
	if !e.native.Has(CanCache) {
		return nil
	}
	if err := e.Next.Cache(ctx, off, n); !errors.Is(err, ErrNotSupported) {
		return err
	}
	return nil
}

func (e *Emulate) Extents(ctx context.Context, off, n int64, f Flags, yield func(Extent) bool) error {
	if err := e.usable(); err != nil {
		return err
	}
	if !e.native.Has(CanExtents) {
		yield(Extent{Len: n})
		return nil
	}
	return e.Next.Extents(ctx, off, n, f, yield)
}

func (e *Emulate) Describe(ctx context.Context, name string, off, n int64, f Flags, yield func(Status) bool) error {
	if err := e.usable(); err != nil {
		return err
	}
	return e.Passthrough.Describe(ctx, name, off, n, f, yield)
}

func (e *Emulate) Resize(ctx context.Context, size int64) error {
	if err := e.usable(); err != nil {
		return err
	}
	return e.Passthrough.Resize(ctx, size)
}

package layer

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// WindowOptions name a stretch of a disk, in bytes.
type WindowOptions struct {
	Off  int64
	Size int64 // 0: to the end of the disk, also when that grows
}

// Window shows a stretch of a disk as a disk.
type Window struct {
	backing.Passthrough
	off, size int64 // size is 0 if the window follows the end of the disk
}

// NewWindow shows the stretch of dev that o names. Errors: ErrOutOfRange if dev
// does not have it all, or nothing of it; ErrAlignment if it does not lie on
// the blocks of dev.
func NewWindow(dev backing.Device, o WindowOptions) (*Window, error) {
	i := dev.Info()
	fail := func(k backing.Kind) (*Window, error) {
		return nil, &backing.Error{Op: "make window", Off: o.Off, Len: o.Size, Kind: k}
	}
	switch {
	case o.Off < 0 || o.Size < 0 || o.Off >= i.Size || o.Size > i.Size-o.Off:
		return fail(backing.ErrOutOfRange)
	case (o.Off|o.Size)&(i.MinBlock-1) != 0:
		return fail(backing.ErrAlignment)
	}
	return &Window{Passthrough: backing.Passthrough{Next: dev}, off: o.Off, size: o.Size}, nil
}

// Info has the size of the window, and a preferred block that keeps the blocks
// of the disk in step with those of the window.
func (w *Window) Info() backing.Info {
	i := w.Next.Info()
	if i.Size -= w.off; w.size != 0 {
		i.Size = w.size
	}
	for i.Preferred > max(512, i.MinBlock) && w.off&(i.Preferred-1) != 0 {
		i.Preferred /= 2
	}
	return i
}

func (w *Window) ReadAt(ctx context.Context, p []byte, off int64) error {
	return w.Next.ReadAt(ctx, p, w.off+off)
}

func (w *Window) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return w.Next.WriteAt(ctx, p, w.off+off, f)
}

func (w *Window) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return w.Next.Zero(ctx, w.off+off, n, f)
}

func (w *Window) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return w.Next.Trim(ctx, w.off+off, n, f)
}

func (w *Window) Cache(ctx context.Context, off, n int64) error {
	return w.Next.Cache(ctx, w.off+off, n)
}

func (w *Window) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	return w.Next.Extents(ctx, w.off+off, n, f, yield)
}

// Describe forwards the question in the addresses of the disk.
func (w *Window) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return w.Passthrough.Describe(ctx, name, w.off+off, n, f, yield)
}

// Resize grows the disk so that a window which follows its end has size bytes.
// A window of a fixed size stays: ErrNotSupported.
func (w *Window) Resize(ctx context.Context, size int64) error {
	if w.size != 0 {
		return &backing.Error{Op: "resize", Off: -1, Kind: backing.ErrNotSupported}
	}
	if size < 0 || size > maxOff-w.off {
		return &backing.Error{Op: "resize", Off: -1, Kind: backing.ErrOutOfRange}
	}
	return w.Passthrough.Resize(ctx, size+w.off)
}

// Map forwards the request in the addresses of the disk.
func (w *Window) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	return w.Next.Map(op, w.off+off, n, m)
}

package layer

import (
	"context"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Swap stands on a device that can be exchanged for another: one with the same
// contents, as when an overlay is put above an image. Whoever exchanges it must
// know that no request is in flight and no Mapping open, as Pause does.
type Swap struct {
	next atomic.Pointer[backing.Device]
}

// NewSwap stands on dev.
func NewSwap(dev backing.Device) *Swap {
	s := new(Swap)
	s.next.Store(&dev)
	return s
}

// To makes dev the device below and returns the one that was, which the caller
// closes. Neither may be nil.
func (s *Swap) To(dev backing.Device) (old backing.Device) { return *s.next.Swap(&dev) }

// Below is the device below now.
func (s *Swap) Below() backing.Device { return *s.next.Load() }

func (s *Swap) dev() backing.Passthrough { return backing.Passthrough{Next: *s.next.Load()} }

func (s *Swap) Info() backing.Info { return s.dev().Info() }

func (s *Swap) ReadAt(ctx context.Context, p []byte, off int64) error {
	return s.dev().ReadAt(ctx, p, off)
}

func (s *Swap) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return s.dev().WriteAt(ctx, p, off, f)
}

func (s *Swap) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return s.dev().Zero(ctx, off, n, f)
}

func (s *Swap) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return s.dev().Trim(ctx, off, n, f)
}

func (s *Swap) Flush(ctx context.Context) error { return s.dev().Flush(ctx) }

func (s *Swap) Cache(ctx context.Context, off, n int64) error { return s.dev().Cache(ctx, off, n) }

func (s *Swap) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	return s.dev().Extents(ctx, off, n, f, yield)
}

// Descriptions are those of the device below now: the list changes with it.
func (s *Swap) Descriptions() []string { return s.dev().Descriptions() }

func (s *Swap) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	return s.dev().Describe(ctx, name, off, n, f, yield)
}

func (s *Swap) Resize(ctx context.Context, size int64) error { return s.dev().Resize(ctx, size) }

// Map forwards: nothing is changed on the way.
func (s *Swap) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	return (*s.next.Load()).Map(op, off, n, m)
}

func (s *Swap) Close() error { return s.dev().Close() }

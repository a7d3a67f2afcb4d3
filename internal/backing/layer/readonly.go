package layer

import (
	"context"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// ReadOnlyOptions choose between a disk that is read-only for good and one that
// is switched.
type ReadOnlyOptions struct {
	// Switched keeps the capabilities as they are, so that guests which were
	// told of them stay right, and refuses writes while Set says so.
	Switched bool
}

// ReadOnly refuses changes with ErrReadOnly.
type ReadOnly struct {
	backing.Transparent
	switched bool
	on       atomic.Bool
}

// NewReadOnly makes dev read-only. A switched layer begins read-only too.
func NewReadOnly(dev backing.Device, o ReadOnlyOptions) *ReadOnly {
	l := &ReadOnly{Transparent: over(dev), switched: o.Switched}
	l.on.Store(true)
	return l
}

// over is the lower part of a layer.
func over(dev backing.Device) backing.Transparent {
	return backing.Transparent{Passthrough: backing.Passthrough{Next: dev}}
}

// Set refuses or allows writes from now on; ErrInvalid if the layer is not a
// switched one. Writes that have begun are not waited for: Pause does that.
func (l *ReadOnly) Set(on bool) error {
	if !l.switched {
		return invalid("set read-only", "the disk is read-only for good")
	}
	l.on.Store(on)
	return nil
}

// On tells whether writes are refused.
func (l *ReadOnly) On() bool { return l.on.Load() }

// Info has no capability to write, except that of a switched layer.
func (l *ReadOnly) Info() backing.Info {
	i := l.Next.Info()
	if !l.switched {
		i.Caps &^= writing
	}
	return i
}

func (l *ReadOnly) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if l.on.Load() {
		return backing.ErrReadOnly
	}
	return l.Next.WriteAt(ctx, p, off, f)
}

func (l *ReadOnly) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if l.on.Load() {
		return backing.ErrReadOnly
	}
	return l.Next.Zero(ctx, off, n, f)
}

func (l *ReadOnly) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	if l.on.Load() {
		return backing.ErrReadOnly
	}
	return l.Next.Trim(ctx, off, n, f)
}

// Resize is refused as a write is.
func (l *ReadOnly) Resize(ctx context.Context, size int64) error {
	if l.on.Load() {
		return &backing.Error{Op: "resize", Off: -1, Kind: backing.ErrReadOnly}
	}
	return l.Passthrough.Resize(ctx, size)
}

// Map forwards reads, and writes while they are allowed.
func (l *ReadOnly) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op != engine.OpRead && l.on.Load() {
		return backing.ErrReadOnly
	}
	return l.Next.Map(op, off, n, m)
}

package layer

import (
	"context"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// ReadOnly refuses changes with ErrReadOnly while it is on. Capabilities stay
// as they are, so that guests which were told of them before stay right: who
// comes while it is on is told otherwise by its own backing.Checked.
type ReadOnly struct {
	backing.Transparent
	on atomic.Bool
}

// NewReadOnly puts the switch on dev.
func NewReadOnly(dev backing.Device, on bool) *ReadOnly {
	l := &ReadOnly{Transparent: over(dev)}
	l.on.Store(on)
	return l
}

// over is the lower part of a layer.
func over(dev backing.Device) backing.Transparent {
	return backing.Transparent{Passthrough: backing.Passthrough{Next: dev}}
}

// Set refuses or allows writes from now on. Writes that have begun are not
// waited for: Pause does that.
func (l *ReadOnly) Set(on bool) { l.on.Store(on) }

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

package layer

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Failed stands for a disk that is not there any more: it looks the same, and
// everything that is asked of it is ErrIO. It is no layer: it has nothing below
// it, and nothing to close.
type Failed struct {
	info  backing.Info
	names []string
	err   error
}

// NewFailed looks like dev, which stays the caller's and may be closed, and says
// why it fails.
func NewFailed(dev backing.Device, why error) *Failed {
	return &Failed{info: dev.Info(), names: backing.Passthrough{Next: dev}.Descriptions(),
		err: &backing.Error{Op: "use", Off: -1, Kind: backing.ErrIO, Err: why}}
}

// Info is that of the disk as it was.
func (f *Failed) Info() backing.Info { return f.info }

// Descriptions are those of the disk as it was.
func (f *Failed) Descriptions() []string { return f.names }

// Close has nothing to do.
func (f *Failed) Close() error { return nil }

func (f *Failed) ReadAt(context.Context, []byte, int64) error                 { return f.err }
func (f *Failed) WriteAt(context.Context, []byte, int64, backing.Flags) error { return f.err }
func (f *Failed) Zero(context.Context, int64, int64, backing.Flags) error     { return f.err }
func (f *Failed) Trim(context.Context, int64, int64, backing.Flags) error     { return f.err }
func (f *Failed) Flush(context.Context) error                                 { return f.err }
func (f *Failed) Cache(context.Context, int64, int64) error                   { return f.err }
func (f *Failed) Resize(context.Context, int64) error                         { return f.err }
func (f *Failed) Map(engine.Op, int64, int64, *backing.Mapping) error         { return f.err }
func (f *Failed) Extents(context.Context, int64, int64, backing.Flags, func(backing.Extent) bool) error {
	return f.err
}

func (f *Failed) Describe(context.Context, string, int64, int64, backing.Flags, func(backing.Status) bool) error {
	return f.err
}

package store

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// file is a Store on an open file or block device, with its locks, its poison
// and its cache mode.
type file struct{ dev *raw.Device }

// NewFile takes over dev, which should have been opened as a container
// (raw.Options).
func NewFile(dev *raw.Device) Store { return file{dev} }

func (f file) Size() (int64, error) { return f.dev.End() }

func (f file) Fixed() bool { return f.dev.Fixed() }

func (f file) Sector() int64 { return f.dev.Sector() }

func (f file) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return f.dev.ReadSome(ctx, p, off)
}

func (f file) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	var flags backing.Flags
	if durable {
		flags = backing.FUA
	}
	return f.dev.Append(ctx, p, off, flags)
}

func (f file) Sync(ctx context.Context) error { return f.dev.Flush(ctx) }

// Punch leaves the end of the file where it is.
func (f file) Punch(ctx context.Context, off, n int64) error { return f.dev.Punch(ctx, off, n) }

// Zero leaves the end of the file where it is: what it allocates beyond reads
// as zeroes once the end has moved over it.
func (f file) Zero(ctx context.Context, off, n int64) error {
	return f.dev.Zero(ctx, off, n, backing.NoHole)
}

func (f file) Truncate(size int64) error { return f.dev.Truncate(size) }

func (f file) Extents(ctx context.Context, off, n int64, yield func(backing.Extent) bool) error {
	return f.dev.Extents(ctx, off, n, 0, yield)
}

func (f file) Cache(ctx context.Context, off, n int64) error { return f.dev.Cache(ctx, off, n) }

func (f file) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	return f.dev.Map(op, off, n, m)
}

func (f file) Close() error { return f.dev.Close() }

package mem

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// null reads as zeroes and forgets what is written to it.
type null struct{ size int64 }

// Null makes a disk of size bytes that reads as zeroes and drops every write,
// although it says that it did them: it measures the path in front of it.
func Null(size int64) backing.Device { return null{size} }

func (d null) Info() backing.Info {
	return backing.Info{Size: d.size, MinBlock: 1, Preferred: 4096, Caps: caps}
}

func (null) ReadAt(_ context.Context, p []byte, _ int64) error {
	clear(p)
	return nil
}

func (null) WriteAt(context.Context, []byte, int64, backing.Flags) error { return nil }
func (null) Zero(context.Context, int64, int64, backing.Flags) error     { return nil }
func (null) Trim(context.Context, int64, int64, backing.Flags) error     { return nil }
func (null) Flush(context.Context) error                                 { return nil }
func (null) Cache(context.Context, int64, int64) error                   { return nil }
func (null) Close() error                                                { return nil }

func (null) Extents(_ context.Context, _, n int64, _ backing.Flags, yield func(backing.Extent) bool) error {
	yield(backing.Extent{Len: n, Hole: true, Zero: true})
	return nil
}

// Map names zeroes for a read. Where a write would go has no name.
func (null) Map(op engine.Op, _, n int64, m *backing.Mapping) error {
	if op != engine.OpRead {
		return backing.ErrNotMappable
	}
	m.Runs[0], m.N, m.Lease = backing.Run{Len: n}, 1, nil
	return nil
}

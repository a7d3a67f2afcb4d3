// Package backing says what a guest disk is. A Device is a chain: Checked on
// top, then layers, Emulate, a format (package raw, mem, …) and, below the
// format, Aligned for files that bypass the page cache.
package backing

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Flags modify one call.
type Flags uint8

const (
	// FUA: stable storage before the call returns.
	FUA Flags = 1 << iota
	// NoHole: a zeroed range stays allocated.
	NoHole
	// FastZero: fail with ErrNotSupported at once, contents untouched,
	// unless zeroing is faster than writing.
	FastZero
	// ReqOne: Extents may stop after the first extent.
	ReqOne
	// AsRead: the answer of Extents, if it is one extent of zeroes, is taken
	// for that of a read of the range, and counts as one.
	AsRead
	// Partial: Extents may end before its range, not before its first extent,
	// where going on would read more tables than limits.StatusTables.
	Partial
)

// Caps are the operations that a device does natively.
type Caps uint16

const (
	CanWrite Caps = 1 << iota
	CanFlush
	CanFUA
	CanTrim
	CanZero
	CanFastZero
	CanCache
	CanExtents
	// CanMultiConn: a Flush covers writes of every connection.
	CanMultiConn
	// IsRotational: seeks cost.
	IsRotational
)

// Has reports whether all of want are there.
func (c Caps) Has(want Caps) bool { return c&want == want }

// Info is what a device says of itself.
type Info struct {
	Size      int64 // bytes
	MinBlock  int64 // smallest request the device takes, a power of two ≥ 1
	Preferred int64 // request size without read-modify-write, power of two ≥ 512
	Caps      Caps

	// Sector is the logical sector of the block device that has the disk byte for
	// byte, or had it before there were overlays: a power of two ≥ 512, 0 if there
	// is no such device. Whoever made a partition table on that device counted in it.
	Sector int64
}

// Extent is a run of bytes of one state.
type Extent struct {
	Len  int64
	Hole bool // not allocated
	Zero bool // reads as zeroes
}

// Run is one stretch of a host file. A nil File stands for zeroes. Of a direct
// file it has the alignment, and begins at a multiple of that in the Mapping.
type Run struct {
	File *engine.File
	Off  int64
	Len  int64
}

// Lease keeps the runs of a Mapping from being reused.
type Lease interface{ Release() }

// MaxRuns bounds the runs of one Mapping; what needs more is not mappable.
const MaxRuns = 4

// Mapping is the answer of Map. The zero value is ready for use; it may be
// reused after Release.
type Mapping struct {
	Runs  [MaxRuns]Run
	N     int   // number of Runs
	Lease Lease // may be nil

	// Reused says that after the lease the runs may become another part of the
	// disk. Pages that sendfile(2) has put into a socket show what is written to
	// the file until the peer reads them, and nothing tells when it has: so the
	// data of such runs is to be copied.
	Reused bool
}

// Release ends the lease, if there is one, and empties m.
func (m *Mapping) Release() {
	if l := m.Lease; l != nil {
		m.Lease = nil
		l.Release()
	}
	m.N, m.Reused = 0, false
}

// Device is a guest disk. Offsets and lengths are in bytes; buffers belong to
// the caller and are not kept. Safe for concurrent use. Flush covers every
// write that returned before it, from any connection: that is what allows
// CanMultiConn.
//
// ctx bounds waiting for a turn, never I/O that the kernel has begun.
type Device interface {
	// Info may change from call to call only in that Size grows.
	Info() Info

	// ReadAt fills p.
	ReadAt(ctx context.Context, p []byte, off int64) error

	// WriteAt writes p; it honours FUA.
	WriteAt(ctx context.Context, p []byte, off int64, f Flags) error

	// Zero makes a range read as zeroes; it honours FUA, NoHole, FastZero.
	Zero(ctx context.Context, off, n int64, f Flags) error

	// Trim says that the contents do not matter any more. It rounds inwards
	// and may do nothing; it honours FUA.
	Trim(ctx context.Context, off, n int64, f Flags) error

	// Flush makes every completed write durable. Once it failed, it and all
	// later writes fail.
	Flush(ctx context.Context) error

	// Cache asks for the range to be read ahead.
	Cache(ctx context.Context, off, n int64) error

	// Extents yields the states of [off, off+n) in order, the first at off,
	// none of length 0, the last clipped to the range, until yield returns
	// false. It honours ReqOne, AsRead and Partial.
	Extents(ctx context.Context, off, n int64, f Flags, yield func(Extent) bool) error

	// Map names the host runs behind a guest range and leaves a lease open:
	// until m.Release no run is reused, even if the guest trims it meanwhile.
	// op is OpRead, or OpWrite without FUA. Map never blocks and does no
	// I/O; ErrNotMappable sends the caller to ReadAt or WriteAt.
	Map(op engine.Op, off, n int64, m *Mapping) error

	Close() error
}

// Unsupported refuses all but Info, ReadAt and Close. Backends embed it.
type Unsupported struct{}

func (Unsupported) WriteAt(context.Context, []byte, int64, Flags) error { return ErrReadOnly }
func (Unsupported) Zero(context.Context, int64, int64, Flags) error     { return ErrNotSupported }
func (Unsupported) Trim(context.Context, int64, int64, Flags) error     { return ErrNotSupported }
func (Unsupported) Flush(context.Context) error                         { return nil }
func (Unsupported) Cache(context.Context, int64, int64) error           { return ErrNotSupported }
func (Unsupported) Map(engine.Op, int64, int64, *Mapping) error         { return ErrNotMappable }
func (Unsupported) Extents(context.Context, int64, int64, Flags, func(Extent) bool) error {
	return ErrNotSupported
}

// Passthrough forwards everything but Map, so that a layer which changes
// bytes or addresses cannot be bypassed. Layers embed it.
type Passthrough struct{ Next Device }

func (p Passthrough) Info() Info { return p.Next.Info() }

// Unwrap is the next device.
func (p Passthrough) Unwrap() Device { return p.Next }

func (p Passthrough) ReadAt(ctx context.Context, b []byte, off int64) error {
	return p.Next.ReadAt(ctx, b, off)
}

func (p Passthrough) WriteAt(ctx context.Context, b []byte, off int64, f Flags) error {
	return p.Next.WriteAt(ctx, b, off, f)
}

func (p Passthrough) Zero(ctx context.Context, off, n int64, f Flags) error {
	return p.Next.Zero(ctx, off, n, f)
}

func (p Passthrough) Trim(ctx context.Context, off, n int64, f Flags) error {
	return p.Next.Trim(ctx, off, n, f)
}

func (p Passthrough) Flush(ctx context.Context) error { return p.Next.Flush(ctx) }

func (p Passthrough) Cache(ctx context.Context, off, n int64) error {
	return p.Next.Cache(ctx, off, n)
}

func (p Passthrough) Extents(ctx context.Context, off, n int64, f Flags, yield func(Extent) bool) error {
	return p.Next.Extents(ctx, off, n, f, yield)
}

// Map always answers ErrNotMappable.
func (p Passthrough) Map(engine.Op, int64, int64, *Mapping) error { return ErrNotMappable }

func (p Passthrough) Close() error { return p.Next.Close() }

// Transparent forwards Map too. Layers that only look embed it.
type Transparent struct{ Passthrough }

// Map forwards to the next device.
func (t Transparent) Map(op engine.Op, off, n int64, m *Mapping) error {
	return t.Next.Map(op, off, n, m)
}

// Package store is the host file below an image.
package store

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Store is a host file: a regular file that grows as it is written, or a
// block device of fixed size. Offsets and lengths are in bytes; buffers belong
// to the caller. Safe for concurrent use.
type Store interface {
	// Size is where the file ends now.
	Size() (int64, error)

	// Fixed reports that the size cannot change: a block device. Nothing of
	// it is known to be zero.
	Fixed() bool

	// Sector is the logical sector of a block device in bytes; 0 for a file.
	Sector() int64

	// ReadAt fills p and returns how much of it the file had; that is less
	// than len(p), without an error, only where the file never had more since
	// it was opened. What it had and has no more is an error: nobody may take
	// it for zeroes.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)

	// WriteAt writes p and moves the end of the file, if need be. With
	// durable the bytes are on stable storage when it returns.
	WriteAt(ctx context.Context, p []byte, off int64, durable bool) error

	// Sync makes all writes durable that returned before it. Once it failed,
	// it and all later writes fail.
	Sync(ctx context.Context) error

	// Punch gives storage back; the range then reads as zeroes. Zero makes
	// a range read as zeroes and keeps it allocated. Either may answer
	// backing.ErrNotSupported, with the contents untouched.
	Punch(ctx context.Context, off, n int64) error
	Zero(ctx context.Context, off, n int64) error

	// Truncate moves the end of the file.
	Truncate(size int64) error

	// Extents yields data and holes of a range that lies in the file.
	Extents(ctx context.Context, off, n int64, yield func(backing.Extent) bool) error

	// Cache asks for a range to be read ahead.
	Cache(ctx context.Context, off, n int64) error

	// Map names the engine's file behind a range, as backing.Device does: it
	// never blocks, and ErrNotMappable sends the caller to ReadAt or WriteAt.
	// A range beyond the end of the file is not mappable.
	Map(op engine.Op, off, n int64, m *backing.Mapping) error

	// Close does not flush.
	Close() error
}

package open

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// What follows stands directly above the files of an image with CacheUnsafe,
// because the operator asked for it: the host's disk is never asked to make
// anything durable, and the image is lost if the host fails. A format above it
// still brings its tables to the file when it flushes, as QEMU does with
// BDRV_O_NO_FLUSH: the file is right for all who read it while the host goes on.

// careless is a raw image.
type careless struct{ backing.Transparent }

func (c careless) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	return c.Next.WriteAt(ctx, p, off, f&^backing.FUA)
}

func (c careless) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	return c.Next.Zero(ctx, off, n, f&^backing.FUA)
}

func (c careless) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	return c.Next.Trim(ctx, off, n, f&^backing.FUA)
}

func (c careless) Flush(context.Context) error { return nil }

// carelessStore is a file of an image that has a format.
type carelessStore struct{ store.Store }

func (c carelessStore) WriteAt(ctx context.Context, p []byte, off int64, _ bool) error {
	return c.Store.WriteAt(ctx, p, off, false)
}

func (c carelessStore) Sync(context.Context) error { return nil }

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// imageDisk is the disk in an image, for reading.
type imageDisk struct {
	image *open.Image
	dev   backing.Device // closes image
	done  func() error
}

func (f *chainFlags) openDisk(ctx context.Context, path, format string) (*imageDisk, error) {
	i, done, err := f.openChain(ctx, path, format)
	if err != nil {
		return nil, err
	}
	return &imageDisk{image: i, dev: i.Device(), done: done}, nil
}

// Uses reports whether the bytes of the disk are in d, or what says where they
// are.
func (m *imageDisk) Uses(d *copier.File) (bool, error) { return m.image.Has(d.File()) }

// Size implements copier.Disk.
func (m *imageDisk) Size() int64 { return m.dev.Info().Size }

// Shape implements copier.Disk.
func (m *imageDisk) Shape() copier.Shape {
	return copier.Shape{Align: m.dev.Info().MinBlock, MaxIO: limits.MaxIO, Requests: chainWorkers}
}

// ReadAt implements copier.Disk.
func (m *imageDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	return m.dev.ReadAt(ctx, p, off)
}

// Extents implements copier.Disk.
func (m *imageDisk) Extents(ctx context.Context, yield func(copier.Extent) bool) error {
	off := int64(0)
	if m.Size() == 0 {
		return nil
	}
	return m.dev.Extents(ctx, 0, m.Size(), 0, func(e backing.Extent) bool {
		x := copier.Extent{Off: off, Len: e.Len, Zero: e.Zero}
		off += e.Len
		return yield(x)
	})
}

// WriteAt implements copier.Disk.
func (m *imageDisk) WriteAt(context.Context, []byte, int64) error { return errSourceOnly }

// Zero implements copier.Disk.
func (m *imageDisk) Zero(context.Context, int64, int64, bool) error { return errSourceOnly }

// Flush implements copier.Disk.
func (m *imageDisk) Flush(context.Context) error { return errSourceOnly }

// Close implements copier.Disk.
func (m *imageDisk) Close() error { return errors.Join(m.dev.Close(), m.done()) }

var errSourceOnly = fmt.Errorf("%w: the image was opened for reading", copier.ErrRefused)

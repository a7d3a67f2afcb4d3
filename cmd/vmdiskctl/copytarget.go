package main

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// targetImage is the disk in a qcow2 image that is written to.
type targetImage struct {
	path string
	made bool // by this command, which removes it again when it fails
	dev  backing.Device
	done func() error
}

// targetImage makes an image for the disk src, or opens the one that is there.
// No file is opened because that one names it.
func (f *copyFlags) targetImage(ctx context.Context, path string, src copier.Disk) (*targetImage, error) {
	d := &targetImage{path: path}
	_, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = f.makeImage(ctx, path, src.Size())
		d.made, f.DestinationIsZero = true, true
	case err == nil && f.newLayout:
		err = usage("flags that say how an image is built are for new ones")
	case err == nil:
		err = fileIsNotSource(path, src)
	}
	if err != nil {
		return nil, err
	}
	if d.dev, d.done, err = (&chainFlags{}).openForWriting(ctx, path); err != nil {
		return nil, errors.Join(err, d.remove())
	}
	return d, nil
}

// makeImage makes an image whose disk has size bytes, in whole sectors, and
// reads as zeroes.
func (f *copyFlags) makeImage(ctx context.Context, path string, size int64) (err error) {
	o, err := f.layoutFlags.options()
	if err != nil {
		return err
	}
	if o.Size, err = wholeSectors(size); err != nil {
		return err
	}
	if _, err := create.Measure(o); err != nil {
		return usageError{err}
	}
	var files newFiles
	defer func() { err = files.close(err) }()
	st, err := files.open(path, false)
	if err != nil {
		return err
	}
	return create.Image(ctx, st, o)
}

func fileIsNotSource(path string, src copier.Disk) error {
	d, err := copier.OpenFile(path)
	if err != nil {
		return err
	}
	return errors.Join(notSource(d, src), d.Close())
}

// Size implements copier.Disk.
func (d *targetImage) Size() int64 { return d.dev.Info().Size }

// Shape implements copier.Disk. Zeroes are worth it where they keep the image
// from having a cluster.
func (d *targetImage) Shape() copier.Shape {
	i := d.dev.Info()
	return copier.Shape{Align: i.MinBlock, MaxIO: limits.MaxIO, Requests: chainWorkers, Granule: i.Preferred}
}

// ReadAt implements copier.Disk.
func (d *targetImage) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.dev.ReadAt(ctx, p, off)
}

// WriteAt implements copier.Disk.
func (d *targetImage) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.dev.WriteAt(ctx, p, off, 0)
}

// Zero implements copier.Disk.
func (d *targetImage) Zero(ctx context.Context, off, n int64, allocate bool) error {
	var f backing.Flags
	if allocate {
		f = backing.NoHole
	}
	return d.dev.Zero(ctx, off, n, f)
}

// Flush implements copier.Disk.
func (d *targetImage) Flush(ctx context.Context) error { return d.dev.Flush(ctx) }

// Extents implements copier.Disk: nobody asks a destination.
func (d *targetImage) Extents(_ context.Context, yield func(copier.Extent) bool) error {
	if n := d.Size(); n > 0 {
		yield(copier.Extent{Len: n})
	}
	return nil
}

// Close implements copier.Disk. An image that is not whole goes.
func (d *targetImage) Close() error {
	err := errors.Join(d.dev.Close(), d.done())
	if err != nil {
		err = errors.Join(err, d.remove())
	}
	return err
}

// Discard closes the image and removes it if it was made for the copy.
func (d *targetImage) Discard() error {
	return errors.Join(d.dev.Close(), d.done(), d.remove())
}

func (d *targetImage) remove() error {
	if !d.made {
		return nil
	}
	return os.Remove(d.path)
}

package main

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// targetImage is the disk in a qcow2 image that is written to.
type targetImage struct {
	file *copier.File // locks it
	dev  backing.Device
	done func() error
}

// targetImage makes an image for the disk src, or opens the one that is there.
// No file is opened because that one names it.
func (f *copyFlags) targetImage(ctx context.Context, path string, src copier.Disk) (*targetImage, error) {
	claim := copier.Claim{Mode: 0o600, Container: true, Lock: raw.LockOn, Refuse: notSource(src)}
	file, err := claim.Open(path)
	if err != nil {
		return nil, err
	}
	d := &targetImage{file: file}
	switch {
	case file.Created():
		err = f.makeImage(ctx, file, src.Size())
		f.DestinationIsZero = true
	case f.newLayout:
		err = usage("flags that say how an image is built are for new ones")
	}
	if err == nil {
		d.dev, d.done, err = (&chainFlags{}).openForWriting(ctx, path, file.File())
	}
	if err != nil {
		return nil, errors.Join(err, file.Discard())
	}
	return d, nil
}

// makeImage makes an image whose disk has size bytes, in whole sectors, and
// reads as zeroes.
func (f *copyFlags) makeImage(ctx context.Context, file *copier.File, size int64) error {
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
	e := engine.NewPool(1)
	defer e.Close()
	st, err := storeIn(file, e)
	if err != nil {
		return err
	}
	if err := errors.Join(create.Image(ctx, st, o), st.Close()); err != nil {
		return err
	}
	return file.SyncName()
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
	if err := errors.Join(d.dev.Close(), d.done()); err != nil {
		return errors.Join(err, d.file.Discard())
	}
	return d.file.Close()
}

// Discard closes the image and removes it if it was made for the copy.
func (d *targetImage) Discard() error {
	return errors.Join(d.dev.Close(), d.done(), d.file.Discard())
}

package main

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// chainFlags are the flags of commands that read what a chain of images has.
// They mean what they mean to vmdiskd.
type chainFlags struct {
	backing                 string
	backingFiles, dataFiles []string
	snapshot                string
	lenient                 bool

	lock raw.LockMode // of images that are read
}

// chainFlagNames are the flags that add makes.
var chainFlagNames = []string{"backing", "backing-file", "data-file", "snapshot", "lenient"}

func (f *chainFlags) add(c *cobra.Command) {
	f.addFiles(c)
	n := c.Flags()
	n.StringVar(&f.snapshot, "snapshot", "", "ID or name of a snapshot within the image, instead of the disk")
	n.BoolVar(&f.lenient, "lenient", false, "read damaged places of a qcow2 image as QEMU does")
}

// addFiles adds only those that say which files may be opened.
func (f *chainFlags) addFiles(c *cobra.Command) {
	n := c.Flags()
	n.StringVar(&f.backing, "backing", "", "files that the image may name: deny (the default), same-dir, beneath=DIR or explicit")
	n.StringArrayVar(&f.backingFiles, "backing-file", nil, "PATH[:FORMAT] of the backing file, instead of what the image says; again for the next below")
	n.StringArrayVar(&f.dataFiles, "data-file", nil, "PATH of the external data file, instead of what the image says")
}

// check refuses flags that c was given in vain.
func (f *chainFlags) check(c *cobra.Command, format string) error {
	for _, name := range chainFlagNames {
		if c.Flags().Changed(name) && format != formatQcow2 {
			return usage("--%s is for qcow2 images", name)
		}
	}
	if c.Flags().Changed("snapshot") && f.snapshot == "" {
		return usage("--snapshot: want an ID or a name")
	}
	return nil
}

// openChain opens an image for reading with those that it stands on, all with
// the locks that QEMU knows, unless f says otherwise. done gives back what closing the image does not.
func (f *chainFlags) openChain(ctx context.Context, path, format string) (i *open.Image, done func() error, err error) {
	policy, err := open.ParsePolicy(f.backing, f.backingFiles, f.dataFiles)
	if err != nil {
		return nil, nil, usageError{err}
	}
	e := engine.NewPool(chainWorkers)
	i, err = open.OpenImage(ctx, open.Spec{
		Path: path, Format: format, ReadOnly: true, Engine: e, Backing: policy, Snapshot: f.snapshot, Lenient: f.lenient, Lock: f.lock,
	})
	if err != nil {
		return nil, nil, errors.Join(err, e.Close())
	}
	return i, e.Close, nil
}

// openForWriting opens a qcow2 image for writing and those that it stands on for
// reading, as openChain does. If held is not nil it is the image, locked by the
// caller, who closes it afterwards.
func (f *chainFlags) openForWriting(ctx context.Context, path string, held *os.File) (dev backing.Device, done func() error, err error) {
	policy, err := open.ParsePolicy(f.backing, f.backingFiles, f.dataFiles)
	if err != nil {
		return nil, nil, usageError{err}
	}
	e := engine.NewPool(chainWorkers)
	spec := open.Spec{Path: path, Format: formatQcow2, Engine: e, Backing: policy}
	if held != nil {
		spec.Files, spec.Lock = map[string]*os.File{path: held}, raw.LockOff
	}
	dev, err = open.Open(ctx, spec)
	if err != nil {
		return nil, nil, errors.Join(err, e.Close())
	}
	return dev, e.Close, nil
}

// chainWorkers read or write side by side, as many as a file is worth.
const chainWorkers = 16

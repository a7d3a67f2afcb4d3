package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Formats of images. What a file contains never decides which it is: a guest
// could have written it.
const (
	formatQcow2 = "qcow2"
	formatRaw   = "raw"
)

func newImage(terminal *os.File) *cobra.Command {
	c := &cobra.Command{
		Use:   "image",
		Short: "Make, look at and change image files",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return usage("a command is missing: see vmdiskctl %s --help", c.Name())
		},
	}
	c.AddCommand(newImageCreate(), newImageCheck(terminal), newImageInfo(), newImageMap(), newImageResize(), newImageSnapshot())
	return c
}

// imageFlags are the flags of all commands that look at one image.
type imageFlags struct {
	format string
	json   bool
}

func (f *imageFlags) add(c *cobra.Command) {
	n := c.Flags()
	n.StringVarP(&f.format, "format", "f", formatQcow2, "format of the file, never guessed: qcow2 or raw")
	n.BoolVar(&f.json, "json", false, "write JSON")
	flagWords(c, "format", formatQcow2, formatRaw)
}

func (f *imageFlags) check() error {
	if f.format != formatQcow2 && f.format != formatRaw {
		return usage("--format is %q, allowed are qcow2 and raw", f.format)
	}
	return nil
}

// openImage opens the file below an image, with the locks that QEMU knows or
// without. No file that is named in it is opened. done gives all back.
func openImage(path string, readOnly bool, lock raw.LockMode) (st store.Store, done func() error, err error) {
	o := raw.Options{Path: path, ReadOnly: readOnly, Container: true, Lock: lock}
	f, err := openImageFile(o)
	if err != nil {
		return nil, nil, err
	}
	e := engine.NewPool(1)
	dev, err := raw.Open(f, e, o)
	if err != nil {
		return nil, nil, errors.Join(err, e.Close())
	}
	st = store.NewFile(dev)
	return st, func() error { return errors.Join(st.Close(), e.Close()) }, nil
}

// openImageFile opens a regular file or a block device as raw.Open wants it, but locks
// nothing.
func openImageFile(o raw.Options) (*os.File, error) {
	if err := checkImageFile(os.Stat(o.Path)); err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	// O_NONBLOCK: what takes the place of the file meanwhile may be a FIFO.
	f, err := raw.PastLease(func() (*os.File, error) {
		return os.OpenFile(o.Path, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkImageFile(f.Stat()), raw.Unclaimed(f, o)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func checkImageFile(i fs.FileInfo, err error) error {
	if err != nil {
		return err
	}
	mode := i.Mode()
	if !mode.IsRegular() && mode&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		return fmt.Errorf("%q is neither a regular file nor a block device", i.Name())
	}
	return nil
}

// withImage opens the image at path for as long as f runs.
func withImage(ctx context.Context, path string, readOnly bool, f func(store.Store) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	st, done, err := openImage(path, readOnly, raw.LockAuto)
	if err != nil {
		return err
	}
	return errors.Join(f(st), done())
}

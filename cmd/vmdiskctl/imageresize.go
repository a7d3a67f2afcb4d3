package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// resizeFlags are the flags of image resize.
type resizeFlags struct {
	imageFlags
	chainFlags
	shrink bool
}

func newImageResize() *cobra.Command {
	f := &resizeFlags{}
	c := &cobra.Command{
		Use:   "resize FILE [+]SIZE",
		Short: "Make the disk in an image larger",
		Long: `Make the disk in an image larger: to SIZE, or by SIZE after a plus sign. SIZE is
in bytes, or with a suffix K, M, G, T. What is new reads as zeroes. Nobody else
may have the image open. Disks do not shrink.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c, args[0], args[1])
		},
	}
	f.imageFlags.add(c)
	f.addFiles(c)
	c.Flags().BoolVar(&f.shrink, "shrink", false, "refused: what a guest has at the end of its disk would be lost")
	return c
}

func (f *resizeFlags) run(c *cobra.Command, path, word string) error {
	if err := f.imageFlags.check(); err != nil {
		return err
	}
	if err := f.chainFlags.check(c, f.format); err != nil {
		return err
	}
	if f.shrink {
		return usage("--shrink is not offered: it would cut off what a guest has at the end of its disk; copy what is needed to a new, smaller image")
	}
	want, err := parseResize(word)
	if err != nil {
		return err
	}
	size, err := f.resize(c.Context(), path, want)
	if err != nil {
		return err
	}
	if f.json {
		return reported(writeJSON(c.OutOrStdout(), created{Filename: path, Format: f.format, VirtualSize: size}))
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "%s: %s, %d bytes\n", path, f.format, size)
	return reported(err)
}

// newSize is a size in bytes, or what comes on top of the old one.
type newSize struct {
	n    int64
	more bool
}

func parseResize(s string) (newSize, error) {
	var b byteSize
	if strings.HasPrefix(s, "-") {
		return newSize{}, usage("size %q: disks do not shrink", s)
	}
	number, more := strings.CutPrefix(s, "+")
	if err := b.Set(number); err != nil {
		return newSize{}, usageError{err}
	}
	return newSize{n: int64(b), more: more}, nil
}

// of is the size that a disk of old bytes shall have.
func (s newSize) of(old int64) (int64, error) {
	switch {
	case s.more && s.n > math.MaxInt64-old:
		return 0, usage("a disk of %d bytes and %d more is too large", old, s.n)
	case s.more:
		return old + s.n, nil
	case s.n < old:
		return 0, fmt.Errorf("%w: the disk has %d bytes and cannot shrink to %d", copier.ErrRefused, old, s.n)
	}
	return s.n, nil
}

// resize says which size the disk has then.
func (f *resizeFlags) resize(ctx context.Context, path string, want newSize) (size int64, err error) {
	if f.format == formatRaw {
		err = withImage(ctx, path, false, func(st store.Store) error {
			size, err = resizeRaw(ctx, st, want)
			return err
		})
		return size, err
	}
	dev, done, err := f.openForWriting(ctx, path, nil)
	if err != nil {
		return 0, err
	}
	size, err = want.of(dev.Info().Size)
	if err == nil {
		err = resizeDevice(ctx, dev, size)
	}
	return size, errors.Join(err, dev.Close(), done())
}

func resizeDevice(ctx context.Context, dev backing.Device, size int64) error {
	r, ok := dev.(backing.Resizer)
	if !ok {
		return backing.ErrNotSupported
	}
	return r.Resize(ctx, size)
}

// resizeRaw moves the end of a file.
func resizeRaw(ctx context.Context, st store.Store, want newSize) (int64, error) {
	if st.Fixed() {
		return 0, fmt.Errorf("%w: a block device has the size that it has", copier.ErrRefused)
	}
	old, err := st.Size()
	if err != nil {
		return 0, err
	}
	size, err := want.of(old)
	if err != nil || size == old {
		return size, err
	}
	if err := st.Truncate(size); err != nil {
		return 0, err
	}
	return size, st.Sync(ctx)
}

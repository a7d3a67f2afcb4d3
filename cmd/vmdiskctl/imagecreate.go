package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// layoutFlags say how a new qcow2 image is built.
type layoutFlags struct {
	compat       string
	clusterSize  byteSize
	refcountBits int
	compression  string
	extended     bool
}

// layoutNames are the flags that add makes.
var layoutNames = []string{"compat", "cluster-size", "refcount-bits", "compression-type", "extended-l2"}

func (f *layoutFlags) add(c *cobra.Command) {
	f.clusterSize = create.DefaultClusterSize
	n := c.Flags()
	n.StringVar(&f.compat, "compat", "1.1", "version of the qcow2 format: 0.10 or 1.1")
	n.Var(&f.clusterSize, "cluster-size", "size of a cluster, 512 to 2M")
	n.IntVar(&f.refcountBits, "refcount-bits", create.DefaultRefcountBits, "width of refcounts, 1 to 64")
	n.StringVar(&f.compression, "compression-type", "zlib", "zlib or zstd")
	n.BoolVar(&f.extended, "extended-l2", false, "allocate in subclusters")
	flagWords(c, "compat", "0.10", "1.1")
	flagWords(c, "compression-type", "zlib", "zstd")
}

// options translates the flags.
func (f *layoutFlags) options() (create.Options, error) {
	o := create.Options{ClusterSize: int64(f.clusterSize), RefcountBits: f.refcountBits, ExtendedL2: f.extended}
	switch f.compat {
	case "0.10":
		o.Version = 2
	case "1.1":
		o.Version = 3
	default:
		return o, usage("--compat is %q, allowed are 0.10 and 1.1", f.compat)
	}
	switch f.compression {
	case "zlib":
		o.Compression = format.Deflate
	case "zstd":
		o.Compression = format.Zstd
	default:
		return o, usage("--compression-type is %q, allowed are zlib and zstd", f.compression)
	}
	if f.clusterSize == 0 || f.refcountBits == 0 {
		return o, usage("--cluster-size and --refcount-bits cannot be 0")
	}
	return o, nil
}

// createFlags are the flags of image create.
type createFlags struct {
	layoutFlags
	format        string
	backing       string
	backingFormat string
	preallocation string
	dataFile      string
	dataFileRaw   bool
	force, json   bool
}

func newImageCreate() *cobra.Command {
	f := &createFlags{}
	c := &cobra.Command{
		Use:   "create FILE [SIZE]",
		Short: "Make a new image",
		Long: `Make a new image. FILE must not exist, unless --force is given; it is removed
again when the command fails. SIZE is in bytes, or with a suffix K, M, G, T;
with a backing file it may be left out and is then that of the backing file. The
size of a qcow2 image is rounded up to 512 bytes.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c, args)
		},
	}
	f.layoutFlags.add(c)
	n := c.Flags()
	n.StringVarP(&f.format, "format", "f", formatQcow2, "qcow2 or raw")
	n.StringVar(&f.backing, "backing-file", "", "backing file, relative to the folder of FILE")
	n.StringVar(&f.backingFormat, "backing-format", "", "format of the backing file: qcow2 or raw")
	n.StringVar(&f.preallocation, "preallocation", "off", "off, metadata, falloc or full")
	n.StringVar(&f.dataFile, "data-file", "", "file for the guest's data, relative to the folder of FILE")
	n.BoolVar(&f.dataFileRaw, "data-file-raw", false, "the data file is a raw image of the disk")
	n.BoolVar(&f.force, "force", false, "overwrite files that exist")
	n.BoolVar(&f.json, "json", false, "say in JSON what was made")
	flagWords(c, "format", formatQcow2, formatRaw)
	flagWords(c, "backing-format", formatQcow2, formatRaw)
	flagWords(c, "preallocation", "off", "metadata", "falloc", "full")
	return c
}

// options translates the flags; the size and the data file are still missing.
func (f *createFlags) options() (create.Options, error) {
	o, err := f.layoutFlags.options()
	o.Backing, o.BackingFormat = f.backing, f.backingFormat
	o.DataFile, o.DataFileRaw = f.dataFile, f.dataFileRaw
	o.Preallocation = create.Preallocation(f.preallocation)
	return o, err
}

// qcow2Only are the flags that a raw image has no use for.
var qcow2Only = append([]string{"backing-file", "backing-format", "data-file", "data-file-raw"}, layoutNames...)

func (f *createFlags) run(c *cobra.Command, args []string) error {
	o, err := f.options()
	if err != nil {
		return err
	}
	if o.Size, err = f.size(c.Context(), args); err != nil {
		return err
	}
	var length int64
	switch f.format {
	case formatQcow2:
		length, err = create.Measure(o)
	case formatRaw:
		for _, name := range qcow2Only {
			if c.Flags().Changed(name) {
				return usage("--%s is for qcow2 images", name)
			}
		}
		length, err = create.MeasureRaw(o.Size, o.Preallocation)
	default:
		return usage("--format is %q, allowed are qcow2 and raw", f.format)
	}
	if err == nil {
		err = f.make(c.Context(), args[0], length, o, c.OutOrStdout())
	}
	var bad *create.OptionError
	if errors.As(err, &bad) {
		return usageError{err}
	}
	return err
}

// size is what was asked for, or that of the backing file. A qcow2 image has
// whole sectors.
func (f *createFlags) size(ctx context.Context, args []string) (int64, error) {
	if len(args) > 1 {
		var n byteSize
		if err := n.Set(args[1]); err != nil {
			return 0, usageError{err}
		}
		if f.format == formatQcow2 {
			return wholeSectors(int64(n))
		}
		return int64(n), nil
	}
	if f.backing == "" {
		return 0, usage("SIZE is missing")
	}
	return imageSize(ctx, beside(args[0], f.backing), f.backingFormat)
}

// beside is what a name in the image at path means. It is not cleaned: what ".."
// behind a symbolic link is, only the kernel knows.
func beside(path, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	dir, _ := filepath.Split(path)
	return dir + name
}

// make makes the files, of which that of the image has length bytes, reports that to
// w, and removes those again that it made when it fails.
func (f *createFlags) make(ctx context.Context, path string, length int64, o create.Options, w io.Writer) (err error) {
	if f.dataFile != "" && sameFile(path, beside(path, f.dataFile)) {
		return fmt.Errorf("%w: %q cannot be both the image and its data file", copier.ErrRefused, path)
	}
	if f.backing != "" && leadsTo(ctx, beside(path, f.backing), f.backingFormat, path) {
		return fmt.Errorf("%w: the chain of %q has %q in it, and would be a loop", copier.ErrRefused, f.backing, path)
	}
	if f.backing != "" && f.dataFile != "" && sameFile(beside(path, f.backing), beside(path, f.dataFile)) {
		return fmt.Errorf("%w: %q cannot be both backing file and data file", copier.ErrRefused, f.backing)
	}
	var files newFiles
	defer func() { err = files.close(err) }()
	st, err := files.open(path, length, f.force)
	if err != nil {
		return err
	}
	if o.DataFile != "" {
		if o.Data, err = files.open(beside(path, o.DataFile), o.Size, f.force); err != nil {
			return err
		}
	}
	if err := files.empty(); err != nil {
		return err
	}
	if f.format == formatRaw {
		err = create.Raw(ctx, st, o.Size, o.Preallocation)
	} else {
		err = create.Image(ctx, st, o)
	}
	if err != nil {
		return err
	}
	return f.report(w, path, o)
}

// created is what --json says.
type created struct {
	Filename    string `json:"filename"`
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
	ClusterSize int64  `json:"cluster-size,omitempty"`
	BackingFile string `json:"backing-filename,omitempty"`
	DataFile    string `json:"data-file,omitempty"`
}

func (f *createFlags) report(w io.Writer, path string, o create.Options) error {
	if !f.json {
		_, err := fmt.Fprintf(w, "%s: %s, %d bytes\n", path, f.format, o.Size)
		return err
	}
	said := created{Filename: path, Format: f.format, VirtualSize: o.Size}
	if f.format == formatQcow2 {
		said.ClusterSize, said.BackingFile, said.DataFile = o.ClusterSize, o.Backing, o.DataFile
	}
	return writeJSON(w, said)
}

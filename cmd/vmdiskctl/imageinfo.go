package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func newImageInfo() *cobra.Command {
	f := &imageFlags{}
	c := &cobra.Command{
		Use:   "info FILE",
		Short: "Show what the header of an image says",
		Long: `Show what the header of an image says. No other file is opened: a backing file
is only named. When the snapshots within it cannot be read, the rest is shown
and the exit code is 1.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			return withImage(c.Context(), args[0], true, func(st store.Store) error {
				r, err := f.describe(c.Context(), st, args[0])
				if err != nil {
					return err
				}
				return errors.Join(f.print(c.OutOrStdout(), r), r.broken)
			})
		},
	}
	f.add(c)
	return c
}

// imageReport has the names of qemu-img info.
type imageReport struct {
	VirtualSize   int64         `json:"virtual-size"`
	Filename      string        `json:"filename"`
	ClusterSize   int64         `json:"cluster-size,omitempty"`
	Format        string        `json:"format"`
	ActualSize    int64         `json:"actual-size"`
	Specific      *qcow2Details `json:"format-specific,omitempty"`
	FullBacking   string        `json:"full-backing-filename,omitempty"`
	Backing       string        `json:"backing-filename,omitempty"`
	BackingFormat string        `json:"backing-filename-format,omitempty"`
	Dirty         bool          `json:"dirty-flag"`

	Snapshots []snapshotReport `json:"snapshots,omitempty"`
	broken    error            // why the snapshots are not known
}

type qcow2Details struct {
	Type string    `json:"type"`
	Data qcow2Data `json:"data"`
}

// qcow2Data leaves out what version 2 does not have.
type qcow2Data struct {
	Compat       string `json:"compat"`
	Compression  string `json:"compression-type"`
	Lazy         *bool  `json:"lazy-refcounts,omitempty"`
	RefcountBits int    `json:"refcount-bits"`
	Corrupt      *bool  `json:"corrupt,omitempty"`
	Extended     *bool  `json:"extended-l2,omitempty"`
	DataFile     string `json:"data-file,omitempty"`
	DataFileRaw  *bool  `json:"data-file-raw,omitempty"`
}

func (f *imageFlags) describe(ctx context.Context, st store.Store, path string) (*imageReport, error) {
	size, err := st.Size()
	if err != nil {
		return nil, err
	}
	r := &imageReport{VirtualSize: size, Filename: path, Format: f.format}
	if i, err := os.Stat(path); err != nil {
		return nil, err
	} else if s, ok := i.Sys().(*syscall.Stat_t); ok {
		r.ActualSize = s.Blocks * 512
	}
	if f.format == formatRaw {
		return r, nil
	}
	h, err := qcow2.ReadHeader(ctx, st)
	if err != nil {
		return nil, err
	}
	r.VirtualSize, r.ClusterSize = int64(h.Size), int64(1)<<h.ClusterBits
	r.Dirty = h.Incompat&format.IncompatDirty != 0
	r.Backing, r.BackingFormat = h.Backing, h.BackingFormat
	r.FullBacking = beneath(path, h.Backing)
	r.Specific = &qcow2Details{formatQcow2, detailsOf(h)}
	list, _, err := qcow2.ReadSnapshots(ctx, st, h, limits.CheckTable)
	if err != nil {
		r.broken = fmt.Errorf("snapshots of %q: %w", path, err)
		return r, nil
	}
	r.Snapshots = reportSnapshots(list)
	for i := range r.Snapshots {
		r.Snapshots[i].DiskSize = 0 // qemu-img info does not say it
	}
	return r, nil
}

// beneath is what the name in the image at path means: names are relative to
// the directory of the image. A name with a protocol stays as it is.
func beneath(path, name string) string {
	if _, other := format.Protocol(name); other || name == "" {
		return name
	}
	return beside(path, name)
}

func detailsOf(h *format.Header) qcow2Data {
	d := qcow2Data{Compat: "0.10", Compression: "zlib", RefcountBits: 1 << h.RefcountOrder}
	if h.Compression == format.Zstd {
		d.Compression = "zstd"
	}
	if h.Version < 3 {
		return d
	}
	flag := func(word, bit uint64) *bool { set := word&bit != 0; return &set }
	d.Compat = "1.1"
	d.Lazy = flag(h.Compat, format.CompatLazyRefcounts)
	d.Corrupt = flag(h.Incompat, format.IncompatCorrupt)
	d.Extended = flag(h.Incompat, format.IncompatExtendedL2)
	if h.Incompat&format.IncompatDataFile != 0 {
		d.DataFile = h.DataFile
		d.DataFileRaw = flag(h.Autoclear, format.AutoclearRawData)
	}
	return d
}

func (f *imageFlags) print(w io.Writer, r *imageReport) error {
	if f.json {
		return writeJSON(w, r)
	}
	p := &printer{w: w}
	p.print("image: %s\nfile format: %s\n", printable(r.Filename), r.Format)
	p.print("virtual size: %d (%s)\nactual size: %d\n", r.VirtualSize, byteSize(r.VirtualSize), r.ActualSize)
	if r.Specific == nil {
		return p.err
	}
	p.print("cluster_size: %d\n", r.ClusterSize)
	if r.Backing != "" {
		p.print("backing file: %q (%s)\n", r.Backing, fmt.Sprintf("format %q", r.BackingFormat))
	}
	d := &r.Specific.Data
	p.print("compat: %s\ncompression type: %s\nrefcount bits: %d\ndirty: %v\n", d.Compat, d.Compression, d.RefcountBits, r.Dirty)
	for _, x := range []struct {
		name string
		set  *bool
	}{{"lazy refcounts", d.Lazy}, {"corrupt", d.Corrupt}, {"extended l2", d.Extended}, {"data file raw", d.DataFileRaw}} {
		if x.set != nil {
			p.print("%s: %v\n", x.name, *x.set)
		}
	}
	if d.DataFile != "" {
		p.print("data file: %q\n", d.DataFile)
	}
	if len(r.Snapshots) > 0 {
		p.print("snapshots:\n")
		p.snapshots("  ", r.Snapshots)
	}
	return p.err
}

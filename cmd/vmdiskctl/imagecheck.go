package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/progress"
)

// Exit codes of image check, those of qemu-img check: 1 is "not checked".
const (
	exitCorrupt = 2
	exitLeaks   = 3
)

// What --repair repairs.
const (
	repairLeaks   = "leaks"
	repairBitmaps = "bitmaps"
)

// unsound is a check that was done and found something.
type unsound struct {
	corruptions, leaks int64
	mark               string
}

func (u unsound) Error() string {
	text := fmt.Sprintf("%d corruptions and %d leaked clusters found", u.corruptions, u.leaks)
	if u.mark != "" {
		way := "`--repair=leaks` takes the mark away"
		if u.corruptions > 0 {
			way = "`qemu-img check -r all` repairs it"
		}
		text += fmt.Sprintf(", and the image is marked %s: it is not served for writing; %s", u.mark, way)
	}
	return text
}

func (u unsound) code() int {
	if u.corruptions > 0 || u.mark != "" {
		return exitCorrupt
	}
	return exitLeaks
}

type imageCheckFlags struct {
	imageFlags
	repair string
}

func newImageCheck(terminal *os.File) *cobra.Command {
	f := &imageCheckFlags{}
	c := &cobra.Command{
		Use:   "check FILE",
		Short: "Check the metadata of an image",
		Long: `Check the metadata of a qcow2 image: all tables, the references to each cluster
and its refcount. No other file is opened.

An image that is marked dirty, because it was not closed properly, or corrupt is
not served for writing, whatever is found in it. With --repair=leaks the marks
are taken away when nothing is wrong with it, or leaks only.

Damaged bitmaps keep an image from being served for writing, and QEMU from
opening it. --repair=bitmaps drops all bitmaps of such an image: the next backup
is a full one.

Exit codes: 0 clean, 1 could not be checked, 2 corruptions or such a mark,
3 leaked clusters only.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c.Context(), args[0], c.OutOrStdout(), terminal)
		},
	}
	f.add(c)
	c.Flags().StringVar(&f.repair, "repair", "", "what to repair: leaks, or bitmaps and then leaks")
	flagWords(c, "repair", repairLeaks, repairBitmaps)
	return c
}

func (f *imageCheckFlags) run(ctx context.Context, path string, w io.Writer, terminal *os.File) error {
	if err := f.check(); err != nil {
		return err
	}
	switch {
	case f.format != formatQcow2:
		return usage("images of format %q have nothing to check", f.format)
	case f.repair != "" && f.repair != repairLeaks && f.repair != repairBitmaps:
		return usage("--repair is %q, allowed are leaks and bitmaps", f.repair)
	}
	var r *checked
	err := withImage(ctx, path, f.repair == "", func(st store.Store) (err error) {
		r, err = f.checkImage(ctx, st, terminal)
		return err
	})
	if err != nil {
		return err
	}
	if err := f.print(w, path, r); err != nil {
		return err
	}
	switch {
	case r.Errors > 0:
		return fmt.Errorf("%d reads failed", r.Errors)
	case r.Corruptions > 0 || r.Leaks > 0 || r.mark() != "":
		return unsound{r.Corruptions, r.Leaks, r.mark()}
	}
	return nil
}

// checked is an image after its check.
type checked struct {
	*check.Report
	marks uint64 // incompatible features
}

// mark is what the header says against the image, or "".
func (c *checked) mark() string {
	switch {
	case c.marks&format.IncompatCorrupt != 0:
		return "corrupt"
	case c.marks&format.IncompatDirty != 0:
		return "dirty"
	}
	return ""
}

// checkImage checks, repairs if that was asked for and is possible, and then
// checks again.
func (f *imageCheckFlags) checkImage(ctx context.Context, st store.Store, terminal *os.File) (*checked, error) {
	h, err := qcow2.ReadHeader(ctx, st)
	if err != nil {
		return nil, err
	}
	if f.repair == repairBitmaps {
		if h, err = withoutDamagedBitmaps(ctx, st, h); err != nil {
			return nil, err
		}
	}
	o := check.Options{}
	if progress.IsTerminal(terminal) {
		var bar *progress.Bar
		last := int64(0)
		o.Progress = func(done, total int64) {
			if bar == nil {
				bar = progress.New(terminal, total)
			}
			bar.Add(done - last)
			last = done
		}
		defer func() { bar.Close() }()
	}
	r, err := check.Run(ctx, st, h, o)
	if err != nil {
		return nil, err
	}
	if f.repair == "" {
		return &checked{r, h.Incompat}, nil
	}
	return repaired(ctx, st, h, r)
}

// withoutDamagedBitmaps drops bitmaps that cannot be loaded, unless more is wrong
// with the image, and returns its header.
func withoutDamagedBitmaps(ctx context.Context, st store.Store, h *format.Header) (*format.Header, error) {
	dropped, err := qcow2.DropBitmaps(ctx, st, h)
	if err != nil || !dropped {
		return h, err
	}
	return qcow2.ReadHeader(ctx, st)
}

// repaired repairs what r, the check of the image, allows to be repaired, and takes
// the marks away of an image in which a check finds nothing then.
func repaired(ctx context.Context, st store.Store, h *format.Header, r *check.Report) (*checked, error) {
	if r.Leaks+r.Corruptions > 0 {
		if err := check.RepairLeaks(ctx, st, h, r); errors.Is(err, check.ErrCorrupt) {
			return &checked{r, h.Incompat}, nil
		} else if err != nil {
			return nil, err
		}
		var err error
		if h, err = qcow2.ReadHeader(ctx, st); err != nil {
			return nil, err
		}
		if r, err = check.Run(ctx, st, h, check.Options{}); err != nil {
			return nil, err
		}
	}
	if r.Leaks+r.Corruptions+r.Errors == 0 {
		if err := check.ClearMarks(ctx, st, h); err != nil {
			return nil, err
		}
	}
	return &checked{r, h.Incompat}, nil
}

// imageCheckReport is qemu-img's: it leaves out what is 0.
type imageCheckReport struct {
	ImageEnd    int64  `json:"image-end-offset,omitempty"`
	Total       int64  `json:"total-clusters,omitempty"`
	Errors      int64  `json:"check-errors"`
	Allocated   int64  `json:"allocated-clusters,omitempty"`
	Filename    string `json:"filename"`
	Format      string `json:"format"`
	Fragmented  int64  `json:"fragmented-clusters,omitempty"`
	Compressed  int64  `json:"compressed-clusters,omitempty"`
	Corruptions int64  `json:"corruptions,omitempty"`
	Leaks       int64  `json:"leaks,omitempty"`

	// The marks, by the names that qemu-img info has for them.
	Dirty   bool `json:"dirty-flag,omitempty"`
	Corrupt bool `json:"corrupt,omitempty"`
}

func (f *imageCheckFlags) print(w io.Writer, path string, r *checked) error {
	if f.json {
		return writeJSON(w, imageCheckReport{
			ImageEnd: r.ImageEnd, Total: r.TotalClusters, Errors: r.Errors, Allocated: r.AllocatedClusters,
			Filename: path, Format: f.format, Fragmented: r.FragmentedClusters,
			Compressed: r.CompressedClusters, Corruptions: r.Corruptions, Leaks: r.Leaks,
			Dirty: r.marks&format.IncompatDirty != 0, Corrupt: r.marks&format.IncompatCorrupt != 0,
		})
	}
	p := &printer{w: w}
	for _, problem := range r.Problems {
		kind := "error"
		if problem.Leak {
			kind = "leak"
		}
		p.print("%s: %s\n", kind, printable(problem.Text))
	}
	if all := r.Corruptions + r.Leaks + r.Errors; all == 0 {
		p.print("no errors found\n")
	} else {
		p.print("%d corruptions, %d leaked clusters, %d reads failed\n", r.Corruptions, r.Leaks, r.Errors)
	}
	if mark := r.mark(); mark != "" {
		p.print("marked %s: it is not served for writing\n", mark)
	}
	p.print("%d of %d clusters allocated, %d fragmented, %d compressed\n",
		r.AllocatedClusters, r.TotalClusters, r.FragmentedClusters, r.CompressedClusters)
	p.print("image end offset: %d\n", r.ImageEnd)
	return p.err
}

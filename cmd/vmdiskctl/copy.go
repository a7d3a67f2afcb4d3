package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/progress"
)

// copyFlags are the flags of copy.
type copyFlags struct {
	connectFlags
	chainFlags
	copier.Options
	layoutFlags
	sourceFormat      string
	sourceSaid        bool // somebody said sourceFormat
	destinationFormat string
	newLayout         bool // a flag says how the new image is built
	forceShare        bool
	use               copier.Use
	requestSize       byteSize
	progress          bool
	note              func(string)
}

func newCopy(terminal *os.File) *cobra.Command {
	f := &copyFlags{requestSize: 256 << 10}
	c := &cobra.Command{
		Use:   "copy SOURCE DESTINATION",
		Short: "Copy a disk",
		Long: `Copy a disk. SOURCE and DESTINATION are each an NBD URI, a file or a block
device. A destination file that does not exist is made, sparse and of the
right size, and is removed again when the copy fails. A destination that
exists is written in place and must not be smaller than the source. Files that
others use, as a running machine does, are refused as their locks say. With
--source-format=qcow2 the source is the disk in an image and those that it
stands on. With --destination-format=qcow2 the destination is a qcow2 image, in
which zeroes take no space.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if !c.Flags().Changed("progress") {
				f.progress = progress.IsTerminal(terminal)
			}
			f.use.All = c.Flags().Changed("connections")
			f.sourceSaid = c.Flags().Changed("source-format")
			f.note = notesOf(c)
			if err := f.checkSource(c, args[0]); err != nil {
				return err
			}
			if err := f.checkDestination(c, args[1]); err != nil {
				return err
			}
			return f.run(c.Context(), args[0], args[1], terminal)
		},
	}
	f.connectFlags.add(c)
	f.chainFlags.add(c)
	f.layoutFlags.add(c)
	n := c.Flags()
	n.StringVarP(&f.sourceFormat, "source-format", "f", formatRaw, "format of SOURCE when it is a file, never guessed: raw or qcow2")
	n.StringVarP(&f.destinationFormat, "destination-format", "O", formatRaw, "format of DESTINATION when it is a file, never guessed: raw or qcow2")
	n.BoolVarP(&f.forceShare, "force-share", "U", false, "copy a SOURCE that others write to, which need not be whole then")
	n.IntVar(&f.use.Connections, "connections", 4, "connections to a server that allows several")
	n.IntVar(&f.use.Requests, "requests", 16, "requests in flight on each connection")
	n.Var(&f.requestSize, "request-size", "size of a request, with suffix K or M")
	n.BoolVar(&f.Allocated, "allocated", false, "write zeroes so that the whole destination is allocated")
	n.BoolVar(&f.DestinationIsZero, "destination-is-zero", false, "the destination reads as zeroes already")
	n.BoolVar(&f.Options.Flush, "flush", true, "make the destination stable at the end")
	n.BoolVar(&f.Verify, "verify", false, "read both disks again and compare them")
	n.BoolVar(&f.progress, "progress", false, "show a progress bar (default: when stderr is a terminal)")
	flagWords(c, "source-format", formatRaw, formatQcow2)
	flagWords(c, "destination-format", formatRaw, formatQcow2)
	return c
}

func (f *copyFlags) check() error {
	switch {
	case f.use.Connections < 1 || f.use.Connections > limits.ConnectionsPerPeer:
		return usage("--connections is %d, allowed are 1 to %d", f.use.Connections, limits.ConnectionsPerPeer)
	case f.use.Requests < 1 || f.use.Requests > limits.ClientRequests:
		return usage("--requests is %d, allowed are 1 to %d", f.use.Requests, limits.ClientRequests)
	case f.requestSize < 512 || f.requestSize > limits.MaxIO:
		return usage("--request-size is %d, allowed are 512 to %d", f.requestSize, limits.MaxIO)
	}
	f.RequestSize = int64(f.requestSize)
	return nil
}

// checkFileName refuses what would be a file, and was not meant to be one.
func checkFileName(name string) error {
	scheme, _, _ := strings.Cut(name, ":")
	switch {
	case name == "-":
		return usage("a disk is no stream: a file of that name is ./-")
	case isURI(name):
	case scheme != name && slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"}, scheme):
		return usage("%q: NBD URIs begin with %s://; a file of that name is ./%s", name, scheme, name)
	}
	return nil
}

// checkSource refuses what makes no sense for the source called name.
func (f *copyFlags) checkSource(c *cobra.Command, name string) error {
	if err := checkFileName(name); err != nil {
		return err
	}
	switch {
	case f.sourceFormat != formatRaw && f.sourceFormat != formatQcow2:
		return usage("--source-format is %q, allowed are raw and qcow2", f.sourceFormat)
	case f.sourceFormat != formatRaw && isURI(name):
		return usage("--source-format is for files: a server says nothing of formats")
	case f.forceShare && isURI(name):
		return usage("--force-share is for files: who may share an export is the server's to say")
	case f.forceShare:
		f.lock = raw.LockOff
	}
	return f.chainFlags.check(c, f.sourceFormat)
}

// checkDestination refuses what makes no sense for the destination called name.
func (f *copyFlags) checkDestination(c *cobra.Command, name string) error {
	if err := checkFileName(name); err != nil {
		return err
	}
	switch {
	case f.destinationFormat != formatRaw && f.destinationFormat != formatQcow2:
		return usage("--destination-format is %q, allowed are raw and qcow2", f.destinationFormat)
	case f.destinationFormat != formatRaw && isURI(name):
		return usage("--destination-format is for files: a server says nothing of formats")
	}
	for _, flag := range layoutNames {
		if !c.Flags().Changed(flag) {
			continue
		}
		if f.destinationFormat != formatQcow2 {
			return usage("--%s is for --destination-format=qcow2", flag)
		}
		f.newLayout = true
	}
	_, err := f.layoutFlags.options()
	return err
}

func (f *copyFlags) run(ctx context.Context, from, to string, terminal *os.File) (err error) {
	if err := f.check(); err != nil {
		return err
	}
	if from == to {
		return fmt.Errorf("%w: source and destination are one", copier.ErrRefused)
	}
	src, err := f.source(ctx, from)
	if err != nil {
		return fmt.Errorf("source %q: %w", from, err)
	}
	defer src.Close()
	dst, err := f.destination(ctx, to, src)
	if err != nil {
		return destinationError{to, err}
	}
	return finish(ctx, dst, f.copy(ctx, src, dst, terminal))
}

func (f *copyFlags) copy(ctx context.Context, src, dst copier.Disk, terminal *os.File) error {
	if f.progress {
		bar := progress.New(terminal, f.Work(src))
		f.Progress = bar.Add
		defer bar.Close()
	}
	return copier.Copy(ctx, src, dst, f.Options)
}

// finish closes the destination, which is worth nothing after an error: a
// file that was made for the copy goes.
func finish(ctx context.Context, dst copier.Disk, err error) error {
	switch d := dst.(type) {
	case interface{ Discard() error }:
		if err != nil {
			return errors.Join(err, d.Discard())
		}
	case *copier.NBD:
		if err == nil {
			return d.Leave(ctx)
		}
	}
	return errors.Join(err, dst.Close())
}

func (f *copyFlags) source(ctx context.Context, name string) (copier.Disk, error) {
	if isURI(name) {
		return f.export(ctx, name, wire.ContextAllocation)
	}
	if f.sourceFormat == formatQcow2 {
		return f.openDisk(ctx, name, f.sourceFormat)
	}
	d, err := copier.OpenFile(name, f.lock)
	if err == nil && !f.sourceSaid && format.Begins(ctx, d, d.Size()) {
		f.note(fmt.Sprintf("%q begins as a qcow2 image and is copied as raw, because its format was not said: "+
			"-f qcow2 copies the disk in it, -f raw says that it is meant", name))
	}
	return d, err
}

// destination opens what can take the source and is not the source itself.
func (f *copyFlags) destination(ctx context.Context, name string, src copier.Disk) (copier.Disk, error) {
	if isURI(name) {
		d, err := f.export(ctx, name)
		if err == nil && d.ReadOnly() {
			d.Close()
			err = fmt.Errorf("%w: the export is read-only", copier.ErrRefused)
		}
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	if f.destinationFormat == formatQcow2 {
		d, err := f.targetImage(ctx, name, src)
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	d, err := copier.Claim{Mode: 0o600, Refuse: notSource(src)}.CreateFile(name, src.Size())
	if err != nil {
		return nil, err
	}
	if d.Created() {
		f.DestinationIsZero = true
	}
	return d, nil
}

// notSource refuses a file that has bytes of the source.
func notSource(src copier.Disk) func(*copier.File) error {
	return func(d *copier.File) error {
		same, err := false, error(nil)
		switch o := src.(type) {
		case *copier.File:
			same, err = d.Same(o)
		case *imageDisk:
			same, err = o.Uses(d)
		}
		if same && err == nil {
			err = fmt.Errorf("%w: it is the source", copier.ErrRefused)
		}
		return err
	}
}

func (f *copyFlags) export(ctx context.Context, uri string, contexts ...string) (*copier.NBD, error) {
	s, err := f.server(uri)
	if err != nil {
		return nil, err
	}
	connect := func(ctx context.Context) (*client.Client, error) { return s.open(ctx, contexts...) }
	return copier.OpenNBD(ctx, connect, f.use)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// addFlags are the flags of export add.
type addFlags struct {
	ctlFlags
	x       api.AddExport
	grants  []string
	rate    string
	listen  []string
	at      config.Listener // what the Unix sockets among them have
	protect []string
	part    int
	quota   byteSize
	l2Cache byteSize
	sector  byteSize
	send    bool

	threshold byteSize

	window, blockSize, faults string
}

func newExportAdd() *cobra.Command {
	f := &addFlags{}
	c := f.changing(&cobra.Command{
		Use:   "add NAME IMAGE",
		Short: "Make an export",
		Long: `Make an export called NAME of an image: a file or block device that the daemon
may open, or one that is opened here and handed over with --fd. For the formats
mem and null IMAGE is a size. The export is gone when the daemon ends, unless it
is told to --persist.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c, args[0], args[1])
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	})
	f.addImage(c)
	f.addUse(c)
	flagWords(c, "format", formatRaw, formatQcow2, "mem", "null")
	flagWords(c, "cache", "writeback", "none", "writethrough", "directsync", "unsafe")
	flagWords(c, "image-lock", "auto", "on", "off")
	flagWords(c, "backing", string(open.Deny), string(open.SameDir), string(open.Beneath)+"=", string(open.Explicit))
	flagWords(c, "discard", "unmap", "keep", "ignore")
	return c
}

// addImage adds the flags that say what is opened, and how.
func (f *addFlags) addImage(c *cobra.Command) {
	n, x := c.Flags(), &f.x
	n.StringVarP(&x.Format, "format", "f", formatRaw, "format of the image, never guessed: raw, qcow2, mem or null")
	n.BoolVarP(&x.ReadOnly, "readonly", "r", false, "nobody can write")
	n.StringVar(&x.Cache, "cache", "", "writeback (the default), none, writethrough, directsync or unsafe")
	n.StringVar(&x.Lock, "image-lock", "", "auto (the default), on or off")
	n.StringVar(&x.Backing, "backing", "", "files that the image may name: deny (the default), same-dir, beneath=DIR or explicit")
	n.StringArrayVar(&x.BackingFiles, "backing-file", nil, "PATH[:FORMAT] of the backing file, instead of what the image says; again for the next below")
	n.StringArrayVar(&x.DataFiles, "data-file", nil, "PATH of the external data file, instead of what the image says")
	n.StringVar(&x.Snapshot, "snapshot", "", "ID or name of a snapshot within the image, instead of the disk")
	n.StringVar(&x.Discard, "discard", "", "for qcow2: unmap (the default), keep or ignore")
	n.Var(&f.l2Cache, "l2-cache-size", "`SIZE` that the mapping of a qcow2 image may take of the daemon's memory: 64M by default")
	n.BoolVar(&x.Lenient, "lenient", false, "read damaged places of a qcow2 image as QEMU does")
	n.BoolVar(&f.send, "fd", false, "open the files here and hand them over: the daemon needs no right to them")
	n.IntVar(&f.part, "partition", 0, "only partition `N` of the disk, from 1")
	n.Var(&f.sector, "sector-size", "`SIZE` of the sectors that its partition table counts in: by default those of the block device, and 512 for a file")
	n.Var(&f.quota, "overlay", "keep what is written in a temporary overlay of at most this `SIZE`, which is thrown away at the end")
	n.StringVar(&f.window, "window", "", "`OFFSET[+LENGTH]`: only this part of the disk, up to its end without a length")
	n.StringVar(&f.blockSize, "block-size", "", "`SIZES` that clients are told and held to, as 4K or minimum=4K,preferred=64K,maximum=1M")
	n.StringArrayVar(&f.protect, "protect", nil, "`OFFSET+LENGTH` that nobody can write; again for more")
}

// addUse adds the flags that say who may use it, and how.
func (f *addFlags) addUse(c *cobra.Command) {
	n, x := c.Flags(), &f.x
	n.StringVar(&x.Description, "description", "", "what clients that list exports are told")
	n.BoolVar(&x.Default, "default", false, "the empty name opens it too")
	n.BoolVar(&x.RequireTLS, "require-tls", false, "hide it from connections that are not encrypted")
	n.StringArrayVar(&f.listen, "listen", nil, "`URI` of an address at which only this export is; again for more")
	for _, s := range f.socketFlags() {
		n.StringVar(s.to, s.name, "", s.usage)
	}
	n.StringArrayVar(&f.grants, "grant", nil, "who may open it, and how, as rw,uid=1000: see export set; again for more, the first that fits decides")
	n.BoolVar(&x.TrustCID, "vsock-trust-cid", false, "let vsock peers write without a lease, and a key or a token, in their grant")
	n.IntVar(&x.Connections, "max-connections", 0, "clients at a time; 0 for no bound")
	n.StringVar(&f.rate, "rate", "", "bound of throughput, as 10M or bytes=10M,ops=500: see export set")
	n.Var(&f.threshold, "write-threshold", "offset `SIZE` in the image's file: the first write beyond it is an event, see export set")
	n.StringVar(&x.RateGroup, "rate-group", "", "group of the configuration that it shares a bound with")
	n.BoolVar(&x.LogRequests, "log-requests", false, "log every request")
	n.BoolVar(&x.FlushOnClose, "flush-on-close", false, "flush when a client leaves")
	n.StringVar(&f.faults, "faults", "", "`JSON` list of faults, for a daemon with --enable-fault-injection: see export set")
	n.BoolVar(&x.Persist, "persist", false, "keep it when the daemon ends")
}

func (f *addFlags) run(c *cobra.Command, name, image string) error {
	if err := f.checkSockets(c); err != nil {
		return err
	}
	a, err := f.request(c, name, image)
	if err != nil {
		return err
	}
	var files []*os.File
	defer func() {
		for _, x := range files {
			_ = x.Close() // the daemon has its own
		}
	}()
	if f.send {
		if files, err = openAll(&a.Export); err != nil {
			return err
		}
	}
	return f.call(c.Context(), func(ctx context.Context, cl *control.Client) error {
		if f.dryRun {
			return f.rehearse(ctx, c, cl, a)
		}
		e, err := cl.Add(ctx, a, files...)
		if err != nil {
			return err
		}
		return reported(f.printExport(c.OutOrStdout(), &e))
	})
}

// rehearse says what would be asked for, if the name is free.
func (f *addFlags) rehearse(ctx context.Context, c *cobra.Command, cl *control.Client, a api.AddExport) error {
	var e *api.Error
	switch _, err := cl.Export(ctx, a.Name); {
	case err == nil:
		return &api.Error{Code: api.CodeExists, Text: fmt.Sprintf("there is an export %q", a.Name)}
	case !errors.As(err, &e) || e.Code != api.CodeNotFound:
		return err
	}
	b, err := oneLine(a)
	if err != nil {
		return err
	}
	return f.did(c, a, "export %s would be made: %s", shown(a.Name), b)
}

// request is what the flags ask for, with absolute paths.
func (f *addFlags) request(c *cobra.Command, name, image string) (a api.AddExport, err error) {
	a = f.x
	a.Name, a.Image = name, image
	// A variable of a script that is not set: without a snapshot it would be the disk.
	for _, flag := range [...]string{"format", "cache", "image-lock", "backing", "snapshot", "discard", "rate-group", "faults"} {
		if c.Flags().Changed(flag) && c.Flags().Lookup(flag).Value.String() == "" {
			return a, usage("--%s: it is empty", flag)
		}
	}
	if !c.Flags().Changed("format") {
		a.Format = "" // the daemon asks for it where the default would destroy the image
	}
	if f.send && a.Persist {
		return a, usage("--persist needs a path that the daemon may open, and excludes --fd")
	}
	virtual := a.Format == "mem" || a.Format == "null"
	if virtual && f.send {
		return a, usage("--fd needs a file, and format %s has none", a.Format)
	}
	if err := f.layers(c, &a.Export); err != nil {
		return a, err
	}
	noteSlow(c, a.Rate)
	if a.Backing == "" && len(a.BackingFiles)+len(a.DataFiles) > 0 {
		a.Backing = string(open.Explicit)
	}
	if virtual {
		return a, nil
	}
	return a, absoluteAll(&a.Export)
}

// absoluteAll makes the paths of an export absolute.
func absoluteAll(x *config.Export) error {
	paths := []*string{&x.Image}
	for i := range x.BackingFiles {
		paths = append(paths, &x.BackingFiles[i])
	}
	for i := range x.DataFiles {
		paths = append(paths, &x.DataFiles[i])
	}
	for _, p := range paths {
		var err error
		if *p, err = absolute(*p); err != nil {
			return err
		}
	}
	return nil
}

// layers reads the flags that have a syntax of their own.
func (f *addFlags) layers(c *cobra.Command, x *config.Export) (err error) {
	for _, s := range f.grants {
		g, err := parseGrant(s)
		if err != nil {
			return usage("--%v", err)
		}
		x.Grants = append(x.Grants, g)
	}
	if c.Flags().Changed("rate") {
		if x.Rate, err = parseRate(f.rate); err != nil {
			return usage("--rate: %v", err)
		}
	}
	x.Listeners = f.listeners()
	for _, s := range f.protect {
		off, length, ok := strings.Cut(s, "+")
		var r config.Range
		if err := errors.Join(r.Offset.UnmarshalText([]byte(off)), r.Length.UnmarshalText([]byte(length))); !ok || err != nil {
			return usage("--protect: %q is not OFFSET+LENGTH", s)
		}
		x.Protect = append(x.Protect, r)
	}
	if x.Window, err = f.piece(c); err != nil {
		return err
	}
	if c.Flags().Changed("block-size") {
		if x.BlockSize, err = parseBlockSize(f.blockSize); err != nil {
			return err
		}
	}
	if f.faults != "" {
		var list struct {
			Faults []config.Fault `json:"faults"`
		}
		if err := config.DecodeJSON([]byte(`{"faults":`+f.faults+`}`), &list); err != nil {
			return usage("--faults: %v", err)
		}
		x.Faults = list.Faults
	}
	x.L2CacheSize = config.Size(f.l2Cache)
	if at := config.Size(f.threshold); c.Flags().Changed("write-threshold") {
		x.WriteThreshold = &at
	}
	if c.Flags().Changed("overlay") {
		x.Overlay = &config.Overlay{Quota: config.Size(f.quota)}
	}
	return nil
}

// piece is the part of the image that is served, or nil for all of it.
func (f *addFlags) piece(c *cobra.Command) (*config.Window, error) {
	partition := c.Flags().Changed("partition")
	switch {
	case partition && f.part < 1:
		return nil, usage("--partition: want a number from 1")
	case !partition && c.Flags().Changed("sector-size"):
		return nil, usage("--sector-size is that of a partition table: it needs --partition")
	case partition && c.Flags().Changed("window"):
		return nil, usage("--window and --partition: one of them")
	case partition:
		return &config.Window{Partition: f.part, SectorSize: config.Size(f.sector)}, nil
	case c.Flags().Changed("window"):
		return parseWindow(f.window)
	}
	return nil, nil
}

// socketFlag is a flag about the Unix sockets of --listen.
type socketFlag struct {
	name, usage string
	to          *string
}

func (f *addFlags) socketFlags() []socketFlag {
	return []socketFlag{
		{"socket-owner", "`USER[:GROUP]` of the Unix sockets of --listen", &f.at.Owner},
		{"socket-mode", "their octal `MODE`", &f.at.Mode},
		{"selinux-label", "SELinux `CONTEXT` of the Unix sockets of --listen", &f.at.SELinuxLabel},
		{"selinux-path-label", "SELinux `CONTEXT` of their files", &f.at.SELinuxPathLabel},
	}
}

// listeners are those of --listen.
func (f *addFlags) listeners() (list []config.Listener) {
	for _, uri := range f.listen {
		l := config.Listener{URI: uri}
		if ofUnix(uri) {
			l = f.at
			l.URI = uri
		}
		list = append(list, l)
	}
	return list
}

// ofUnix tells whether a URI is one of a Unix socket.
func ofUnix(uri string) bool {
	scheme, _, _ := strings.Cut(uri, ":")
	return strings.HasSuffix(strings.ToLower(scheme), "+unix")
}

// checkSockets: what is asked for a socket of --listen is never ignored.
func (f *addFlags) checkSockets(c *cobra.Command) error {
	for _, s := range f.socketFlags() {
		switch {
		case !c.Flags().Changed(s.name):
		case *s.to == "":
			return usage("--%s: it is empty", s.name)
		case !slices.ContainsFunc(f.listen, ofUnix):
			return usage("--%s needs a --listen with the URI of a Unix socket", s.name)
		}
	}
	return nil
}

// parseWindow reads OFFSET or OFFSET+LENGTH.
func parseWindow(s string) (*config.Window, error) {
	w := &config.Window{}
	off, length, ok := strings.Cut(s, "+")
	err := w.Offset.UnmarshalText([]byte(off))
	if ok {
		err = errors.Join(err, w.Length.UnmarshalText([]byte(length)))
	}
	if err != nil || ok && w.Length == 0 {
		return nil, usage("--window: %q is not OFFSET or OFFSET+LENGTH", s)
	}
	return w, nil
}

// parseBlockSize reads a minimum, or key=value pairs.
func parseBlockSize(s string) (*config.BlockSize, error) {
	b := &config.BlockSize{}
	sizes := map[string]*config.Size{"minimum": &b.Minimum, "preferred": &b.Preferred, "maximum": &b.Maximum}
	for _, part := range strings.Split(s, ",") {
		key, value, ok := strings.Cut(part, "=")
		if !ok {
			key, value = "minimum", part
		}
		to := sizes[key]
		if to == nil || *to != 0 {
			return nil, usage("--block-size: %q: each of minimum, preferred, maximum once", part)
		}
		if err := to.UnmarshalText([]byte(value)); err != nil || *to == 0 {
			return nil, usage("--block-size: size %q is not a number of bytes with an optional suffix K, M, G or T", value)
		}
	}
	return b, nil
}

// openAll opens the files of an export and puts what stands for their
// descriptors in the place of the paths. On an error, files are those to close.
func openAll(x *config.Export) (files []*os.File, err error) {
	one := func(path string, readOnly bool) (string, error) {
		if len(files) >= limits.ControlFiles {
			return "", usage("--fd: more than %d files", limits.ControlFiles)
		}
		f, err := openImageFile(raw.Options{Path: path, ReadOnly: readOnly, Lock: raw.LockMode(x.Lock)})
		if err != nil {
			return "", err
		}
		files = append(files, f)
		return fmt.Sprint(api.FilePrefix, len(files)-1), nil
	}
	if x.Image, err = one(x.Image, x.ReadOnly); err != nil {
		return files, err
	}
	for i, s := range x.BackingFiles {
		if strings.HasSuffix(s, ":"+formatRaw) || strings.HasSuffix(s, ":"+formatQcow2) {
			return files, usage("--backing-file: with --fd the image above says the format, not %q", s)
		}
		if x.BackingFiles[i], err = one(s, true); err != nil {
			return files, err
		}
	}
	for i, s := range x.DataFiles {
		// That of the image is written to, those of images below are not.
		if x.DataFiles[i], err = one(s, x.ReadOnly || i > 0); err != nil {
			return files, err
		}
	}
	return files, nil
}

package attach

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

var (
	// ErrDiffers is for a name that something else has already.
	ErrDiffers = errors.New("something else is there")

	// ErrNoServer is for disks that the control API does not have.
	ErrNoServer = errors.New("not an export of this daemon")

	// ErrUnnamed is the ErrNoServer of a disk that Attach has made no export for: its
	// user may name the one that it is.
	ErrUnnamed = fmt.Errorf("%w by the name that attach gives", ErrNoServer)

	// ErrPaused is for a disk whose requests are held back. QEMU waits for some
	// of them in its main loop, and the whole guest with it, until the pause ends.
	ErrPaused = errors.New("the disk is paused")
)

// Source is where a disk is served: exactly one of Image, Export and URI.
type Source struct {
	// Image is an absolute path that the daemon gets an export for, as Add
	// says, with a socket of its own. Add has the path too, or stands for
	// Files. Its name, description and listeners are the plan's.
	Image string
	Add   api.AddExport
	Files []*os.File // as for client.Add; they stay the caller's

	Socket string // folder of the socket of Image
	Owner  string // USER[:GROUP] of the socket; empty: the daemon's own
	Mode   string // of the socket, in octal; empty: the daemon's default

	// Label and PathLabel are the SELinux contexts of the socket and of its
	// file; empty: those for the categories of the VM, if libvirt says them,
	// and otherwise none; or NoLabel.
	Label, PathLabel string

	Export string // an export that the daemon has
	URI    string // of any NBD server

	ReadOnly bool // of Export and URI; Add has its own

	// Certificates is the folder that a machine over QMP gets its own for TLS
	// from, and those that it trusts: ca-cert.pem, client-cert.pem and
	// client-key.pem, or the first alone. It is QEMU that reads it.
	Certificates string

	// Keys is an absolute path that ends with /keys.psk, which QEMU takes the
	// pre-shared key of Identity from, in place of Certificates. A URI can say
	// the same: nbds://IDENTITY@HOST/?tls-psk-file=KEYS.
	Keys, Identity string
}

// name is what people call the disk.
func (s *Source) name() string {
	switch {
	case s.Image != "":
		return s.Image
	case s.Export != "":
		return "export " + s.Export
	}
	return s.URI
}

// served is a disk that will be served when the steps are done.
type served struct {
	steps    []Step
	uri      transport.URI
	own      bool
	readOnly bool
	size     func() int64 // bytes; 0 where it is not known
	forgets  bool         // what was written, when its export ends

	// lookup asks for the export that was left for the disk. It is nil where own
	// is not set.
	lookup func(context.Context) (api.Export, error)

	// export is what Source.Export names: a machine that has it by another
	// address than uri has the disk already. Nil otherwise.
	export *api.Export

	// differs says in what an export that was left for the disk is not as
	// wanted; nil if there is none, or nothing. It is nil where own is not set.
	differs func(context.Context) error

	creds credentials // for a server with TLS

	// ready refuses, when a machine is to connect, an export that does not work by
	// then or has no room for it: QEMU would try for limits.AttachOpen in its main
	// loop, and the whole guest would wait. Nothing is known of other servers.
	ready func(context.Context) error
}

// before says how one that a machine has in its place may have been attached.
func (v *served) before() string {
	if v.forgets {
		return "attached with other options, or to an export that ended with all that was written"
	}
	return "attached with other options"
}

// remedy says what to do about a disk that is there and not as wanted.
func (v *served) remedy(ctx context.Context) string {
	var x api.Export
	if v.lookup != nil {
		x, _ = v.lookup(ctx) // the refusal that it is for comes first
	}
	return remedy(x)
}

// remedy is that of a disk with the export. What it was attached as is below its
// overlay, and must not be written to.
func remedy(x api.Export) string {
	if overlay := above(x); overlay != "" {
		return fmt.Sprintf("detach it first, and attach %q then, which a snapshot has put above its image", overlay)
	}
	return "detach it first"
}

// serve plans the export of a disk of a machine.
func (s *Source) serve(ctx context.Context, c *client.Client, machine, id string) (*served, error) {
	given := 0
	for _, word := range []string{s.Image, s.Export, s.URI} {
		if word != "" {
			given++
		}
	}
	if given != 1 {
		return nil, fmt.Errorf("%w source: one of image, export and URI", qmp.ErrInvalid)
	}
	if c == nil && s.URI == "" {
		return nil, fmt.Errorf("%w: %s", ErrNoServer, transport.HideTokens(s.name()))
	}
	switch {
	case s.Image != "":
		return s.serveImage(ctx, c, machine, id)
	case s.Export != "":
		return s.serveExport(ctx, c)
	}
	uri, creds, err := s.remote(s.URI)
	return &served{uri: uri, readOnly: s.ReadOnly, size: func() int64 { return 0 }, creds: creds,
		ready: func(context.Context) error { return nil }}, err
}

// address is where QEMU connects to.
func address(t transport.Target) (qmp.Address, error) {
	switch t.Kind {
	case transport.Unix:
		return qmp.UnixAddress(t.Path), nil
	case transport.TCP:
		if t.Port > 0 && t.Port <= 65535 {
			return qmp.InetAddress{Host: t.Address, Port: uint16(t.Port)}, nil
		}
	case transport.VSock:
		return qmp.VSockAddress{CID: t.CID, Port: t.Port}, nil
	}
	return nil, fmt.Errorf("%w address %s", qmp.ErrInvalid, t)
}

// serveExport finds where an export can be reached.
func (s *Source) serveExport(ctx context.Context, c *client.Client) (*served, error) {
	x, err := c.Export(ctx, s.Export)
	if err != nil {
		return nil, err
	}
	if err := works(x, s.ReadOnly); err != nil {
		return nil, err
	}
	creds, err := s.given()
	if err != nil {
		return nil, err
	}
	uri, err := reachable(x, creds.dir != "")
	if err != nil {
		return nil, err
	}
	v := &served{uri: uri, readOnly: s.ReadOnly || !x.Writable, size: func() int64 { return x.Size }, export: &x,
		ready: func(ctx context.Context) error { return admits(ctx, c, x.Name, s.ReadOnly) }}
	if uri.TLS {
		creds.setHostname(&uri)
		v.creds, v.uri.User = creds, creds.identity
		err = creds.check(&uri)
	}
	return v, err
}

// reachable is the URI of an export that a machine on this host connects to
// best. One with TLS is the last choice, if there are credentials.
func reachable(x api.Export, creds bool) (transport.URI, error) {
	for _, tls := range []bool{false, true} {
		for _, kind := range []transport.Kind{transport.Unix, transport.TCP, transport.VSock} {
			for _, text := range x.URIs {
				uri, _, err := new(Source).remote(text)
				if err == nil && uri.Kind == kind && uri.TLS == tls && (creds || !tls) {
					uri.Export = x.Name
					return uri, nil
				}
			}
		}
	}
	return transport.URI{}, fmt.Errorf("%w: export %q has no address without TLS, for which certificates or a pre-shared key are needed: %s", qmp.ErrInvalid, x.Name, strings.Join(x.URIs, " "))
}

// serveImage plans an export with a socket for one machine. The name of the
// socket tells what is read there: a client that waits for its server, however
// long, comes to no other disk.
func (s *Source) serveImage(ctx context.Context, c *client.Client, machine, id string) (*served, error) {
	contents, err := s.contents()
	if err != nil {
		return nil, err
	}
	name := ExportName(machine, id)
	path := s.Socket + "/" + key(16, append(contents, name)...)
	if s.forgets() {
		if path, err = s.opening(ctx, c, name, path); err != nil {
			return nil, err
		}
	}
	path += ".sock"
	if len(path) > limits.QEMUSocketPath || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("%w socket %q: an absolute path of at most %d bytes", qmp.ErrInvalid, path, limits.QEMUSocketPath)
	}
	uri := transport.URI{Target: transport.Target{Kind: transport.Unix, Path: path}}
	a := s.Add
	a.Name = name
	a.Description = description(id, s.Image)
	if err := s.checkLabels(); err != nil {
		return nil, err
	}
	a.Listeners = []config.Listener{{URI: uri.String(), Mode: s.Mode, Owner: s.Owner,
		SELinuxLabel: labelText(s.Label), SELinuxPathLabel: labelText(s.PathLabel)}}
	var size int64
	step := exportStep(c, a, s.Files, &size)
	step.Name = fmt.Sprintf("serve %q as export %q at %s%s", s.Image, name, uri, s.labelNote())
	uri.Export = name
	lookup := func(ctx context.Context) (api.Export, error) { return c.Export(ctx, name) }
	differs := func(ctx context.Context) error {
		x, err := lookup(ctx)
		if err != nil { // the step tells
			return nil
		}
		return same(x, a)
	}
	return &served{steps: []Step{step}, uri: uri, own: true, readOnly: a.ReadOnly, size: func() int64 { return size },
		forgets: s.forgets(), lookup: lookup, differs: differs,
		ready: func(ctx context.Context) error { return admits(ctx, c, name, a.ReadOnly) }}, nil
}

// forgets tells a disk whose export takes what was written along when it ends.
func (s *Source) forgets() bool { return s.Add.Overlay != nil || s.Add.ImageFormat() == "mem" }

// errForgets is for a disk that would come back without what was written to it.
var errForgets = fmt.Errorf("%w: a disk with an overlay, or of format mem, forgets what was written when the daemon ends: it cannot be kept, nor be in a configuration", qmp.ErrInvalid)

// opening completes the path of the socket of a disk that forgets, less the
// suffix: each opening is another disk, and has another socket. That of an
// export that is there and stays is the one that it has.
func (s *Source) opening(ctx context.Context, c *client.Client, name, path string) (string, error) {
	if s.Add.Persist {
		return "", errForgets
	}
	x, err := c.Export(ctx, name)
	if err != nil && !hasCode(err, api.CodeNotFound) {
		return "", err
	}
	path += "-"
	for _, l := range x.Listeners {
		uri, err := transport.ParseURI(l.URI)
		if err == nil && strings.HasPrefix(uri.Path, path) && x.State != api.StateDraining {
			return strings.TrimSuffix(uri.Path, ".sock"), nil
		}
	}
	return path + key(8, rand.Text()), nil
}

// contents is all that decides what a guest finds on the disk of an image, and
// what it may do there: every word of the export but those that are taken out
// here, which leave each byte where it is. A socket of a running guest has its
// name from it, also after an upgrade: a key that comes later must not be in the
// JSON where it says nothing.
func (s *Source) contents() ([]string, error) {
	x := s.Add.Export
	x.Name, x.Description, x.Default = "", "", false
	x.RequireTLS, x.Listeners, x.Grants, x.TrustCID, x.Connections = false, nil, nil, false, 0
	x.Rate, x.RateGroup, x.LogRequests, x.FlushOnClose, x.Faults = nil, "", false, false, nil
	x.SetDefaults()
	x.Format = x.ImageFormat()
	x.Cache, x.Lock, x.Discard = "", "", ""
	files := slices.Concat([]string{s.Image}, x.BackingFiles, []string{""}, x.DataFiles)
	for i, f := range s.Files {
		if at := slices.Index(files, fmt.Sprint(api.FilePrefix, i)); at >= 0 {
			files[at] = f.Name()
		}
	}
	x.Image, x.BackingFiles, x.DataFiles = "", nil, nil // JSON has not every path
	rest, err := json.Marshal(x)
	return append(files, string(rest)), err
}

// exportStep adds an export, or gives the one that is there the rate that is
// wanted, and learns its size. Its undo leaves an export that is in use:
// somebody has found it there meanwhile.
func exportStep(c *client.Client, a api.AddExport, files []*os.File, size *int64) Step {
	undo := func(ctx context.Context) error { return removeExport(ctx, c, a.Name, false) }
	return Step{
		Do: func(ctx context.Context) (bool, error) {
			x, added, err := addOrFind(ctx, c, a, files)
			*size = x.Size
			if err != nil || added {
				return added, err
			}
			if err := same(x, a); err != nil || sameRate(x.Rate, a.Rate) {
				return false, err
			}
			undo = func(ctx context.Context) error { return setRate(ctx, c, a.Name, x.Rate) }
			ctx, cancel := steady(ctx)
			defer cancel()
			err = setRate(ctx, c, a.Name, a.Rate)
			return made(err), err
		},
		Undo: func(ctx context.Context) error { return undo(ctx) },
	}
}

// works refuses an export that is paused, and one of which a machine would get
// errors: one that has failed, or, unless it only reads, one that takes no more
// writes.
func works(x api.Export, readOnly bool) error {
	if x.Error == "" || readOnly && x.State != api.StateFailed {
		return goesOn(x)
	}
	return fmt.Errorf("export %q does not work: %s", x.Name, qmp.Printable(x.Error, limits.ControlErrorText))
}

// admits refuses an export that does not work, or that has no room for a client once
// it has been waited for: the server may notice some time after a machine that its
// client has left.
func admits(ctx context.Context, c *client.Client, name string, readOnly bool) error {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		x, err := c.Export(ctx, name)
		if err == nil {
			err = works(x, readOnly)
		}
		if err == nil {
			err = room(x)
		}
		if !errors.Is(err, ErrFull) || wait.Err() != nil {
			return err
		}
		pause(wait, limits.AttachPoll)
	}
}

// goesOn refuses an export that is paused.
func goesOn(x api.Export) error {
	if x.State != api.StatePaused {
		return nil
	}
	return fmt.Errorf("%w: resume export %q first, or wait for the end of the pause", ErrPaused, x.Name)
}

// noPause refuses a disk of which one of the daemon's exports that are paused is the
// export. What the daemon does not answer for has none: disks of other servers
// need no daemon.
func noPause(ctx context.Context, c *client.Client, is func(api.Export) (bool, error)) error {
	if c == nil {
		return nil
	}
	exports, _ := c.Exports(ctx)
	for _, x := range exports {
		paused := goesOn(x)
		if paused == nil {
			continue
		}
		if fits, err := is(x); err != nil || fits {
			return cmp.Or(err, paused)
		}
	}
	return nil
}

// addOrFind adds an export that is not there; one that somebody is just adding
// or removing is waited for. added says that it was, or with an error may have
// been, added.
func addOrFind(ctx context.Context, c *client.Client, a api.AddExport, files []*os.File) (x api.Export, added bool, err error) {
	call, cancel := steady(ctx)
	defer cancel()
	for ctx.Err() == nil {
		x, err = c.Export(call, a.Name)
		changing := err == nil && (x.State == api.StateOpening || x.State == api.StateDraining)
		if hasCode(err, api.CodeNotFound) {
			x, err = c.Add(call, a, files...)
			if !hasCode(err, api.CodeExists) {
				return x, made(err), err
			}
			changing = true
		}
		if !changing {
			return x, false, err
		}
		pause(ctx, limits.AttachPoll)
	}
	return x, false, ctx.Err()
}

// made reports whether a change with the error may have been made: only what
// the daemon refuses was not.
func made(err error) bool { return err == nil || !errors.As(err, new(*api.Error)) }

// sameRate tells whether a rate is as wanted; the burst may be the daemon's.
func sameRate(is, want *config.Rate) bool {
	if want == nil {
		return true
	}
	if is == nil {
		is = &config.Rate{}
	}
	r := *is
	if want.Burst == 0 {
		r.Burst = 0
	}
	return r == *want
}

// setRate sets the rate of an export; nil is no bound.
func setRate(ctx context.Context, c *client.Client, name string, r *config.Rate) error {
	if r == nil {
		r = &config.Rate{}
	}
	_, err := c.Patch(ctx, name, api.Patch{Rate: r})
	return err
}

// kept is the origin of an export that the daemon has after its next start too.
const kept = "state"

// same refuses an export of the name that is not the one that is wanted. What
// changes while it is in use may be otherwise, and what nobody has said: who
// owns the socket, and its mode. A snapshot has put another image above the one
// that the description tells of.
func same(x api.Export, a api.AddExport) error {
	if x.Description != a.Description {
		return fmt.Errorf("%w: export %q of %q", ErrDiffers, x.Name, x.Image)
	}
	is, want := x.Export, a.Export
	if filepath.IsAbs(is.Image) && filepath.IsAbs(want.Image) && is.Image != want.Image {
		above := config.Instead{Of: config.ImageOf(want), Serve: config.ImageOf(is)}
		var err error
		if want, err = above.Apply(want); err != nil {
			return err
		}
	}
	is.Listeners, want.Listeners = slices.Clone(is.Listeners), slices.Clone(want.Listeners)
	for i := range want.Listeners {
		l := &want.Listeners[i]
		for _, there := range is.Listeners {
			if there.URI == l.URI {
				l.Owner, l.Mode = cmp.Or(l.Owner, there.Owner), cmp.Or(l.Mode, there.Mode)
			}
		}
	}
	is.SetDefaults()
	want.SetDefaults()
	misfits := is.Misfits(&want)
	if a.Persist && x.Origin != kept {
		misfits = append(misfits, "it is not kept when the daemon ends")
	}
	if len(misfits) > 0 {
		return fmt.Errorf("%w: export %q: %s: %s", ErrDiffers, x.Name, strings.Join(misfits, ", "), remedy(x))
	}
	if replaced(x) {
		return fmt.Errorf("%w: export %q has a file open that is not the one at %q any more: %s", ErrDiffers, x.Name, x.Image, remedy(x))
	}
	return works(x, a.ReadOnly)
}

// replaced tells whether another file than the one that an export has open is at the
// path of its image. It says no where there is no file, or none that the user may look
// at; what it sees is the mount namespace of the user.
func replaced(x api.Export) bool {
	var st unix.Stat_t
	if x.File == (api.File{}) || !filepath.IsAbs(x.Image) || unix.Stat(x.Image, &st) != nil {
		return false
	}
	return x.File != api.FileOf(&st)
}

// removeExport removes an export that may be gone already. The server may
// notice some time after a machine that its client has left.
func removeExport(ctx context.Context, c *client.Client, name string, force bool) error {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		err := c.Remove(ctx, name, force, 0)
		if hasCode(err, api.CodeNotFound) {
			return nil
		}
		if !hasCode(err, api.CodeInUse) || wait.Err() != nil {
			return err
		}
		pause(wait, limits.AttachPoll)
	}
}

func hasCode(err error, code string) bool {
	e := client.RefusalOf(err)
	return e != nil && e.Code == code
}

// steady is a context that an interruption does not end: the outcome of a
// request that was sent is waited for.
func steady(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), limits.AttachCall)
}

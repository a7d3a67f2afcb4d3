package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// machine is what disks are plugged into: attach.Machine or attach.Domain.
type machine interface {
	Attach(context.Context, attach.Source, attach.Options) (*attach.Plan, error)
	Resolve(ctx context.Context, word string) (string, error)
	Detach(ctx context.Context, disk string, force bool) (*attach.Plan, error)
	Resize(ctx context.Context, disk, export string, want attach.Size) (*attach.Plan, error)
	Snapshot(ctx context.Context, disk, export, overlay string, freeze bool) (*attach.Plan, error)
}

// Ways to a machine.
const (
	viaQMP     = "qmp"
	viaLibvirt = "libvirt"
)

// vmFlags are the flags of all commands on a machine.
type vmFlags struct {
	ctlFlags
	via, agent string
	libvirt    libvirtFlags

	live, config bool   // which state of a domain of libvirt is changed
	owner        string // of sockets for the machine, as its name says
	asked        string // what find was asked last
	found        string // and has found
	notes        []string
}

func (f *vmFlags) addVM(c *cobra.Command) {
	n := c.Flags()
	n.StringVar(&f.via, "via", "", "qmp or libvirt: what VM is, if its look does not say")
	flagWords(c, "via", viaQMP, viaLibvirt)
	n.StringVar(&f.agent, "agent", "", "`SOCKET` of the guest agent, for a VM that is a QMP socket")
	f.libvirt.add(c)
}

// errNoConfig is for a machine that is not libvirt's.
var errNoConfig = usage("--config is for a domain of libvirt: a machine over QMP has no configuration")

// addScope adds the flags that say which state of a domain a disk is for.
func (f *vmFlags) addScope(c *cobra.Command, live, config string) {
	c.Flags().BoolVar(&f.live, "live", false, live)
	c.Flags().BoolVar(&f.config, "config", false, config)
}

// scope is what those flags say; 0 where none does.
func (f *vmFlags) scope() (in libvirtd.Scope) {
	if f.live {
		in |= libvirtd.Live
	}
	if f.config {
		in |= libvirtd.Config
	}
	return in
}

// way is how to reach a VM that find has found: the path of a QMP socket has a
// slash, and the name of a domain has none.
func (f *vmFlags) way(name string) string {
	switch {
	case f.via != "":
		return f.via
	case strings.Contains(name, "/"):
		return viaQMP
	}
	return viaLibvirt
}

// machine connects to a VM that find has found. close ends the connections.
func (f *vmFlags) machine(ctx context.Context, name string) (m machine, close func(), err error) {
	switch via := f.way(name); via {
	case viaQMP:
		if f.config {
			return nil, nil, errNoConfig
		}
		q, err := f.overQMP(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		return q, func() { closeMachine(q) }, nil
	case viaLibvirt:
		if f.agent != "" {
			return nil, nil, usage("--agent is for a VM that is a QMP socket")
		}
		d, done, err := f.overLibvirt(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		return d, done, nil
	default:
		return nil, nil, usage("--via: %q is neither qmp nor libvirt", via)
	}
}

// overQMP connects to a monitor; an agent that was named is for later. The machine
// has one name, by whatever links its socket is found.
func (f *vmFlags) overQMP(ctx context.Context, path string) (*attach.Machine, error) {
	path, err := attach.Path(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, err
	}
	server, err := f.dial()
	if err != nil {
		return nil, err
	}
	m := &attach.Machine{Name: path, Server: server, Note: f.note}
	if m.Monitor, err = qmp.Dial(ctx, path); err != nil {
		return nil, err
	}
	if f.agent != "" {
		m.Agent = &lazyAgent{path: f.agent}
	}
	return m, nil
}

func closeMachine(m *attach.Machine) {
	_ = m.Monitor.Close() // nothing waits for a reply
	if a, ok := m.Agent.(io.Closer); ok {
		_ = a.Close()
	}
}

// lazyAgent is a guest agent that is connected to when it is asked: a command
// that can do without it is not kept from its work by a socket that is gone.
// For one goroutine.
type lazyAgent struct {
	path string
	qmp  *qmp.Agent // nil: not yet
}

// Execute is that of qmp.Agent.
func (a *lazyAgent) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	if a.qmp == nil {
		agent, err := qmp.DialAgent(ctx, a.path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", qmp.ErrNoAgent, err)
		}
		a.qmp = agent
	}
	return a.qmp.Execute(ctx, command, arguments, files...)
}

// Close ends the connection if there is one.
func (a *lazyAgent) Close() error {
	if a.qmp == nil {
		return nil
	}
	return a.qmp.Close()
}

func (f *vmFlags) note(text string) { f.notes = append(f.notes, visible(text)) }

// planned is what a command on a machine has done, or would do.
type planned struct {
	VM      string   `json:"vm"`
	Disk    string   `json:"disk"`
	Changed bool     `json:"changed"`
	DryRun  bool     `json:"dry-run,omitempty"`
	Plan    []string `json:"plan,omitempty"`
	Notes   []string `json:"notes,omitempty"`
}

// run makes a plan for the machine and runs it, or says what it is. done says
// what has been done.
func (f *vmFlags) run(c *cobra.Command, vm, done string, plan func(context.Context, machine) (*attach.Plan, error)) error {
	found, err := f.find(vm)
	if err != nil {
		return err
	}
	m, close, err := f.machine(c.Context(), found)
	if err != nil {
		return plugError(err)
	}
	defer close()
	p, err := plan(c.Context(), m)
	if err != nil {
		return plugError(err)
	}
	out := planned{VM: vm, Disk: p.Disk, DryRun: f.dryRun}
	if f.dryRun {
		for _, s := range p.Steps {
			out.Plan = append(out.Plan, s.Name)
		}
	} else {
		out.Changed, err = p.Run(c.Context())
		out.Disk = p.Disk
	}
	out.Notes = f.notes
	if err != nil {
		f.printNotes(c)
		return plugError(err)
	}
	err = f.report(c, p, &out, done)
	if out.Changed {
		err = reported(err)
	}
	return err
}

// report prints what has been done, or would be.
func (f *vmFlags) report(c *cobra.Command, p *attach.Plan, out *planned, done string) error {
	if f.json {
		return writeJSON(c.OutOrStdout(), out)
	}
	f.printNotes(c)
	if f.dryRun {
		var b strings.Builder
		if err := p.Print(&b); err != nil {
			return err
		}
		for line := range strings.Lines(b.String()) {
			if _, err := fmt.Fprintln(c.OutOrStdout(), visible(strings.TrimSuffix(line, "\n"))); err != nil {
				return err
			}
		}
		return nil
	}
	if !out.Changed {
		done = "nothing had to be done"
	}
	_, err := fmt.Fprintf(c.OutOrStdout(), "disk %s of %s: %s\n", shown(out.Disk), shown(out.VM), done)
	return err
}

func (f *vmFlags) printNotes(c *cobra.Command) {
	for _, n := range f.notes {
		fmt.Fprintf(c.ErrOrStderr(), "vmdiskctl: note: %s\n", n)
	}
}

// machineError is an error of a plan for a terminal, in one line.
type machineError struct{ err error }

func (e machineError) Error() string {
	return visible(strings.ReplaceAll(e.err.Error(), "\n", "; "))
}
func (e machineError) Unwrap() error { return e.err }

// plugError makes an error one that can be shown. A mistake on the command
// line stays one.
func plugError(err error) error {
	switch {
	case err == nil || errors.As(err, new(usageError)):
		return err
	case errors.Is(err, qmp.ErrInvalid) && !errors.Is(err, attach.ErrIncomplete):
		return usageError{machineError{err}}
	}
	return machineError{err}
}

// refusedByMachine tells whether a machine, or what it has, keeps the user from
// what was asked for.
func refusedByMachine(err error) bool {
	for _, e := range [...]error{attach.ErrMounted, attach.ErrSaved, attach.ErrDiffers, attach.ErrSmaller, attach.ErrFull, attach.ErrPaused, qmp.ErrUnplugRefused} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// attachFlags are the flags of attach.
type attachFlags struct {
	vmFlags
	image     addFlags
	named     bool // IMAGE is an export
	target    string
	bus       string
	serial    string
	reconnect time.Duration
	renew     bool
	persist   bool
	place     placeFlags
	ofImage   *pflag.FlagSet // those that say how an image is served

	certificates, keys, identity string // for TLS
}

// placeFlags say where the socket of a disk is.
type placeFlags struct{ dir, owner, mode, label, pathLabel string }

func (f *placeFlags) add(c *cobra.Command) {
	n := c.Flags()
	n.StringVar(&f.dir, "socket-dir", "", "`FOLDER` of the socket that the daemon makes for the disk (default that of the control socket)")
	n.StringVar(&f.owner, "socket-owner", "", "`USER[:GROUP]` of that socket (default those of the VM, if they can be seen)")
	n.StringVar(&f.mode, "socket-mode", "", "its octal `MODE`")
	n.StringVar(&f.label, "selinux-label", "", "SELinux `CONTEXT` of that socket, or none (default one with the categories of the VM, if libvirt says them)")
	n.StringVar(&f.pathLabel, "selinux-path-label", "", "SELinux `CONTEXT` of its file, or none (default that of the VM's images, if libvirt says it)")
}

func newAttach() *cobra.Command {
	f := &attachFlags{}
	c := f.changing(&cobra.Command{
		Use:   "attach VM IMAGE",
		Short: "Serve an image and plug it into a running machine",
		Long: `Serve an image and plug it into a running machine, as a whole or not at all.

VM is the path of a QMP socket, a name that /etc/vmdiskd/vmdiskctl.toml gives a
machine, or the name or UUID of a libvirt domain. IMAGE is a file or block
device that the daemon serves from then on at a socket for this machine alone,
an NBD URI, or with --export the name of an export that the daemon has. A disk
that is attached as wanted stays as it is.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error { return f.attach(c, args[0], args[1]) },
	})
	f.addVM(c)
	f.addSource(c)
	f.addDevice(c)
	c.Flags().StringVar(&f.image.rate, "rate", "", "bound of throughput, as 10M or bytes=10M,ops=500: see export set")
	f.ofImage.AddFlag(c.Flags().Lookup("rate"))
	f.addScope(c, "plug it into the running domain of libvirt, the default where it runs; with --config into both",
		"put it into the configuration of a libvirt domain only, for its next start, and keep the export when the daemon ends")
	c.Flags().BoolVar(&f.persist, "persist", false, "keep it when the daemon ends, and in the configuration of a libvirt domain")
	c.Flags().BoolVar(&f.renew, "keep-reconnect", false, "where libvirt forgets --reconnect, set it through libvirt's monitor, which marks the domain as tainted")
	return c
}

// addSource adds the flags that say where the disk is.
func (f *attachFlags) addSource(c *cobra.Command) {
	served := &cobra.Command{}
	f.image.addImage(served)
	f.place.add(served)
	f.ofImage = served.Flags()
	c.Flags().AddFlagSet(f.ofImage)
	c.Flags().StringVar(&f.certificates, "tls-certificates", "", "`FOLDER` with ca-cert.pem, client-cert.pem and client-key.pem that QEMU reads, for a server with TLS")
	c.Flags().StringVar(&f.keys, "tls-psk", "", "`FILE` keys.psk of pre-shared keys that QEMU reads, in place of certificates")
	c.Flags().StringVar(&f.identity, "tls-identity", "", "the `IDENTITY` whose key QEMU takes from that file")
	c.Flags().BoolVar(&f.named, "export", false, "IMAGE is the name of an export that the daemon has")
}

// addDevice adds the flags that say what the guest sees.
func (f *attachFlags) addDevice(c *cobra.Command) {
	n := c.Flags()
	n.StringVar(&f.target, "target", "", "name of the disk in the machine (default one that follows from IMAGE)")
	n.StringVar(&f.bus, "bus", "virtio", "virtio, scsi or nvme")
	flagWords(c, "bus", "virtio", "scsi", "nvme")
	n.StringVar(&f.serial, "serial", "", "serial number that the guest sees")
	n.DurationVar(&f.reconnect, "reconnect", limits.AttachReconnect, "how long the guest waits for a server that is lost")
}

// models are the buses of the command line.
var models = map[string]qmp.Model{"virtio": qmp.VirtIOBlk, "scsi": qmp.SCSIDisk, "nvme": qmp.NVMe}

// options is what the guest sees. A disk that is there is as it is where the
// user says nothing.
func (f *attachFlags) options(c *cobra.Command) (o attach.Options, err error) {
	model, ok := models[f.bus]
	if !c.Flags().Changed("bus") {
		model = ""
	}
	switch {
	case !ok:
		return o, usage("--bus: %q is none of virtio, scsi and nvme", f.bus)
	case f.reconnect < time.Second || f.reconnect > limits.NBDReconnect:
		return o, usage("--reconnect: want %v to %v", time.Second, limits.NBDReconnect)
	}
	o = attach.Options{ID: f.target, Model: model, Serial: f.serial, Persist: f.persist, Renew: f.renew}
	if c.Flags().Changed("reconnect") {
		o.Reconnect = f.reconnect
	}
	return o, nil
}

func (f *attachFlags) attach(c *cobra.Command, vm, image string) error {
	o, err := f.options(c)
	if err != nil {
		return err
	}
	if err := f.checkScope(); err != nil {
		return err
	}
	found, err := f.find(vm)
	if err != nil {
		return err
	}
	if err := f.checkWay(found, image); err != nil {
		return err
	}
	f.image.x.Persist = f.persist || f.config // a configuration refers to it
	s, err := f.source(c, found, image)
	defer closeFiles(s.Files)
	if err != nil {
		return err
	}
	return f.run(c, vm, "attached", func(ctx context.Context, m machine) (*attach.Plan, error) {
		return m.Attach(ctx, s, o)
	})
}

// checkScope refuses flags that contradict each other.
func (f *attachFlags) checkScope() error {
	switch {
	case f.persist && f.scope() != 0:
		return usage("--persist is --live and --config where the domain runs: give it alone")
	case f.renew && f.config && !f.live:
		return usage("--keep-reconnect is for the running domain, and --config leaves that as it is")
	case f.config && f.image.send:
		return usage("--config needs a path that the daemon may open, and excludes --fd")
	}
	return nil
}

// checkWay: what only libvirt can do is not ignored over QMP.
func (f *attachFlags) checkWay(vm, image string) error {
	switch {
	case f.way(vm) != viaQMP:
	case f.config:
		return errNoConfig
	case f.renew:
		return usage("--keep-reconnect is for a domain of libvirt: over QMP nothing forgets the delay")
	case f.persist && (f.named || isURI(image)):
		return usage("--persist is for an image that the daemon is to serve, or for a domain of libvirt")
	}
	return nil
}

// closeFiles closes what was sent to the daemon, which has its own.
func closeFiles(files []*os.File) {
	for _, x := range files {
		_ = x.Close() // nothing was written by it
	}
}

// source is what IMAGE means.
func (f *attachFlags) source(c *cobra.Command, vm, image string) (s attach.Source, err error) {
	if f.named || isURI(image) {
		f.ofImage.VisitAll(func(g *pflag.Flag) {
			if g.Changed && g.Name != "readonly" {
				err = usage("--%s is for an image that the daemon is to serve", g.Name)
			}
		})
		if err != nil {
			return s, err
		}
		s.ReadOnly = f.image.x.ReadOnly
		s.Identity = f.identity
		if s.Certificates, err = absoluteOrNone(f.certificates); err != nil {
			return s, err
		}
		if s.Keys, err = absoluteOrNone(f.keys); err != nil {
			return s, err
		}
		if f.named {
			s.Export = image
		} else {
			s.URI = image
		}
		return s, nil
	}
	for _, flag := range []string{"tls-certificates", "tls-psk", "tls-identity"} {
		if c.Flags().Changed(flag) {
			return s, usage("--%s is for the URI of a server, or an export that is served with TLS", flag)
		}
	}
	if s.Add, err = f.image.request(c, "", image); err != nil {
		return s, err
	}
	s.Image, s.Socket, s.Owner, s.Mode = s.Add.Image, f.place.dir, f.place.owner, f.place.mode
	s.Label, s.PathLabel = f.place.label, f.place.pathLabel
	if s.Socket == "" {
		s.Socket = filepath.Dir(f.socket)
	}
	if s.Socket, err = filepath.Abs(s.Socket); err != nil {
		return s, err
	}
	if s.Owner == "" {
		s.Owner = f.vmFlags.owner
	}
	if s.Owner == "" && f.way(vm) == viaQMP {
		s.Owner = ownerOf(vm)
	}
	if f.image.send {
		s.Files, err = openAll(&s.Add.Export)
	}
	return s, err
}

// ownerOf is who runs the QEMU of a monitor's socket, unless that is root or
// cannot be seen.
func ownerOf(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

func newDetach() *cobra.Command {
	f := &vmFlags{}
	force := false
	c := f.changing(&cobra.Command{
		Use:   "detach VM DISK",
		Short: "Unplug a disk from a running machine",
		Long: `Unplug a disk from a running machine and stop serving it. DISK is the name of
the disk in the machine, or what it was attached as: an image, a URI or an
export.

A libvirt domain that runs loses it in its configuration too, unless --live or
--config says which alone: then what the other needs is served on.

QEMU unplugs a disk that the guest has mounted. A guest agent is asked first if
there is one. Once the guest has released the disk there is no way back: after
an error run detach again.`,
		Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c, args[0], "detached", func(ctx context.Context, m machine) (*attach.Plan, error) {
				id, err := m.Resolve(ctx, args[1])
				if err != nil {
					return nil, err
				}
				return m.Detach(ctx, id, force)
			})
		},
	})
	f.addVM(c)
	f.addScope(c, "only from the running domain of libvirt", "only from the configuration of a libvirt domain")
	c.Flags().BoolVar(&force, "force", false, "do not ask the guest agent, and cut off other clients of the export")
	return c
}

func newResize() *cobra.Command {
	f := &vmFlags{}
	export := ""
	c := f.changing(&cobra.Command{
		Use:   "resize VM DISK [+]SIZE",
		Short: "Grow a disk of a running machine",
		Long: `Grow a disk of a running machine, to SIZE or by SIZE after a plus sign, so that
the guest sees it. SIZE is in bytes, or with a suffix K, M, G, T. Disks do not
shrink. If the machine cannot be told, the image stays larger.`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			size, err := parseResize(args[2])
			if err != nil {
				return err
			}
			return f.run(c, args[0], "grown", func(ctx context.Context, m machine) (*attach.Plan, error) {
				id, err := m.Resolve(ctx, args[1])
				if err != nil {
					return nil, err
				}
				return m.Resize(ctx, id, export, attach.Size{Bytes: size.n, More: size.more})
			})
		},
	})
	f.addVM(c)
	c.Flags().StringVar(&export, "export", "", "the export that the disk is, if attach has not made it")
	return c
}

func newSnapshot() *cobra.Command {
	f := &vmFlags{}
	export, freeze := "", false
	c := f.changing(&cobra.Command{
		Use:   "snapshot VM DISK OVERLAY",
		Short: "Keep the image of a disk of a running machine as it is",
		Long: `Keep the image of a disk of a running machine as it is, and have the guest go on
in a new qcow2 file OVERLAY above it. The guest's file systems are frozen
meanwhile if a guest agent answers.`,
		Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			overlay, err := absolute(args[2])
			if err != nil {
				return err
			}
			return f.run(c, args[0], "goes on in "+shown(overlay), func(ctx context.Context, m machine) (*attach.Plan, error) {
				id, err := m.Resolve(ctx, args[1])
				if err != nil {
					return nil, err
				}
				return m.Snapshot(ctx, id, export, overlay, freeze)
			})
		},
	})
	f.addVM(c)
	c.Flags().StringVar(&export, "export", "", "the export that the disk is, if attach has not made it")
	c.Flags().BoolVar(&freeze, "freeze", false, "fail if the guest's file systems cannot be frozen")
	return c
}

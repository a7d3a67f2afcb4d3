package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// ErrLibvirt is for what has no way through libvirt.
var ErrLibvirt = errors.New("libvirt has no way to it")

// ErrUnowned is for a domain that is off and of which libvirt does not say whom
// it will run it as: its QEMU could not connect.
var ErrUnowned = errors.New("the socket would be the daemon's own")

// ErrOff is for what only a running domain can be given.
var ErrOff = errors.New("the domain does not run: only its configuration could be changed, if that is wanted")

// ErrTransient is for what only a domain with a configuration can be given.
var ErrTransient = errors.New("the domain is transient: libvirt has no configuration of it, only what runs could be changed")

// ErrSaved is for a disk of a guest that libvirt has saved: what it starts again
// has it still.
var ErrSaved = errors.New("the saved guest has the disk, and would not start without its export")

// Domain is a machine that libvirt runs.
type Domain struct {
	Session *libvirtd.Session
	Domain  libvirtd.Domain
	Server  *client.Client // nil: only disks of other servers

	// Scope is where a disk is attached and detached. 0 is the running machine
	// for Attach, with Options.Persist the configuration too, and both for Detach.
	Scope libvirtd.Scope

	// Note is as Machine's.
	Note func(text string)

	// SELinux is that of the host; the zero value is this machine's.
	SELinux selinux.System
}

func (d *Domain) note(format string, args ...any) {
	if d.Note != nil {
		d.Note(fmt.Sprintf(format, args...))
	}
}

// states are the descriptions of a domain.
type states map[libvirtd.Scope]*libvirtxml.Domain

// describe reads the description of the running machine, if it runs now, and of
// its next start, unless the domain is transient. libvirt describes the next start
// for a machine that does not run; only one that does has an id.
func (d *Domain) describe(ctx context.Context) (states, error) {
	all := states{}
	live, err := d.Session.Describe(ctx, d.Domain, false)
	if err != nil {
		return nil, err
	}
	if live.ID != nil {
		all[libvirtd.Live] = live
	}
	persistent, err := d.Session.Persistent(ctx, d.Domain)
	if err == nil && persistent {
		all[libvirtd.Config], err = d.Session.Describe(ctx, d.Domain, true)
	}
	return all, err
}

// unknown reports whether libvirt knows the domain no more, nor any disk of it.
func (d *Domain) unknown(ctx context.Context) bool {
	_, err := d.describe(ctx)
	return libvirtd.IsUnknown(err)
}

// ended reports whether the domain's machine is no more.
func (d *Domain) ended(ctx context.Context) bool {
	all, err := d.describe(ctx)
	return libvirtd.IsUnknown(err) || err == nil && all[libvirtd.Live] == nil
}

// list are the descriptions.
func (s states) list() (all []*libvirtxml.Domain) {
	for _, x := range s {
		all = append(all, x)
	}
	return all
}

// scope is where a disk that fits is.
func (s states) scope(fits func(*libvirtxml.DomainDisk) bool) (in libvirtd.Scope, disk *libvirtxml.DomainDisk) {
	for _, scope := range []libvirtd.Scope{libvirtd.Config, libvirtd.Live} {
		x := s[scope]
		if x == nil || x.Devices == nil {
			continue
		}
		for i := range x.Devices.Disks {
			if fits(&x.Devices.Disks[i]) {
				in, disk = in|scope, &x.Devices.Disks[i]
			}
		}
	}
	return in, disk
}

// source is where libvirt has a disk from; the zero value is not NBD.
func source(disk *libvirtxml.DomainDisk) transport.URI { return network(disk.Source) }

// beneath is what a disk stands on, below overlays that libvirt has put above its
// source, and what it is being copied to.
func beneath(disk *libvirtxml.DomainDisk) (all []transport.URI) {
	chain := func(b *libvirtxml.DomainDiskBackingStore) {
		for ; b != nil; b = b.BackingStore {
			all = append(all, network(b.Source))
		}
	}
	chain(disk.BackingStore)
	if m := disk.Mirror; m != nil {
		all = append(all, network(m.Source))
		chain(m.BackingStore)
	}
	return all
}

func network(src *libvirtxml.DomainDiskSource) (u transport.URI) {
	if src == nil || src.Network == nil {
		return u
	}
	n := src.Network
	if n.Protocol != "nbd" || len(n.Hosts) != 1 {
		return u
	}
	u.Export, u.TLS = n.Name, n.TLS == "yes"
	h := n.Hosts[0]
	if h.Transport == "unix" {
		u.Kind, u.Path = transport.Unix, h.Socket
		return u
	}
	port, err := strconv.ParseUint(h.Port, 10, 16)
	if err != nil {
		port = transport.DefaultPort
	}
	u.Kind, u.Address, u.Port = transport.TCP, h.Name, uint32(port)
	return u
}

// from tells disks with the source.
func from(uri transport.URI) func(*libvirtxml.DomainDisk) bool {
	return func(disk *libvirtxml.DomainDisk) bool { return source(disk).String() == uri.String() }
}

// is tells disks that are what is served, an export by whichever of its addresses.
func (v *served) is(ctx context.Context) func(*libvirtxml.DomainDisk) bool {
	return func(disk *libvirtxml.DomainDisk) bool { return v.isAt(ctx, source(disk)) }
}

func (v *served) isAt(ctx context.Context, u transport.URI) bool {
	return u.String() == v.uri.String() || v.export != nil && isAt(ctx, u, *v.export)
}

func (v *served) mayBe(ctx context.Context, u transport.URI) bool {
	return v.export != nil && mayBe(ctx, u, *v.export)
}

// above are the targets of the disks that stand on an NBD disk that fits, or are
// being copied to one, each once.
func (s states) above(fits func(transport.URI) bool) []string {
	return s.targetsOf(func(disk *libvirtxml.DomainDisk) bool {
		return slices.ContainsFunc(beneath(disk), func(u transport.URI) bool { return u.Kind != "" && fits(u) })
	})
}

// errBeneath is for a disk on which others stand: the guest has it all the same.
func errBeneath(targets []string) error {
	return fmt.Errorf("%w: the domain has it below disk %q, by a snapshot or a copy that libvirt has made: virsh blockcommit or blockjob ends that", ErrDiffers, targets)
}

// stay leaves an export that the domain has at the address by which it has it.
func (v *served) stay(ctx context.Context, all states) {
	if in, _ := all.scope(from(v.uri)); in != 0 {
		return
	}
	if _, there := all.scope(v.is(ctx)); there != nil {
		v.uri = source(there)
	}
}

// isTarget tells the disk with the target.
func isTarget(target string) func(*libvirtxml.DomainDisk) bool {
	return func(disk *libvirtxml.DomainDisk) bool { return disk.Target != nil && disk.Target.Dev == target }
}

// isDisk tells the disk with the source that has the target.
func isDisk(target string, uri transport.URI) func(*libvirtxml.DomainDisk) bool {
	return func(disk *libvirtxml.DomainDisk) bool { return isTarget(target)(disk) && from(uri)(disk) }
}

// element is the NBD disk for libvirt.
func element(v *served, target, bus string, o Options) (*libvirtxml.DomainDisk, error) {
	n := libvirtd.NBDDisk{Export: v.uri.Export, Target: target, Bus: bus, Serial: o.Serial, Reconnect: o.Reconnect,
		ReadOnly: v.readOnly, Discard: !v.readOnly}
	if n.Reconnect == 0 {
		n.Reconnect = limits.AttachReconnect
	}
	n.TLS = v.uri.TLS
	switch {
	case v.creds.keys:
		return nil, fmt.Errorf("%w: it knows no pre-shared keys for NBD, a QMP socket takes them", ErrLibvirt)
	case v.creds != credentials{}:
		return nil, fmt.Errorf("%w: certificates are those that qemu.conf names (nbd_tls_x509_cert_dir), with the name of the host", ErrLibvirt)
	case v.uri.Kind == transport.Unix && !v.uri.TLS:
		n.Socket = v.uri.Path
	case v.uri.Kind == transport.TCP && v.uri.Port <= 65535:
		n.Host, n.Port = v.uri.Address, uint16(v.uri.Port)
	default:
		return nil, fmt.Errorf("%w: address %s", ErrLibvirt, v.uri.Shown())
	}
	return n.Element()
}

// busOf is libvirt's name for the bus of a model.
func busOf(m qmp.Model) (string, error) {
	switch m {
	case qmp.VirtIOBlk, "":
		return "virtio", nil
	case qmp.SCSIDisk:
		return "scsi", nil
	}
	return "", fmt.Errorf("%w: %s disks over NBD", ErrLibvirt, m)
}

// Attach is as Machine's.
func (d *Domain) Attach(ctx context.Context, s Source, o Options) (*Plan, error) {
	all, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	if s.Owner == "" {
		s.Owner = cmp.Or(ownerOf(all[libvirtd.Live]), ownerOf(all[libvirtd.Config]))
	}
	scope, err := d.scope(all, o.Persist)
	if err != nil {
		return nil, err
	}
	machine := all[libvirtd.Live]
	if scope&libvirtd.Live == 0 {
		machine = nil // the next start may have other categories
	}
	if err := s.setLabels(machine, d.SELinux); err != nil {
		return nil, err
	}
	v, err := s.serve(ctx, d.Server, d.Domain.UUID, DiskID(s.name()))
	if err != nil {
		return nil, err
	}
	if all[libvirtd.Live] == nil && s.Image != "" && s.Owner == "" && s.Mode == "" {
		return nil, fmt.Errorf("%w: the domain is off, and libvirt does not say whom it will run it as: name the owner or the mode of the socket, or attach the disk while the domain runs", ErrUnowned)
	}
	g := &gift{Domain: d, served: v, wanted: o, scope: scope}
	if err := g.shape(ctx, all, s); err != nil {
		return nil, err
	}
	target := g.disk.Target.Dev
	plan := &Plan{Aim: fmt.Sprintf("attach %q to domain %q as %s", transport.HideTokens(s.name()), d.Domain.Name, target), Disk: target}
	give := g.step(plan)
	delay, err := g.delaySteps(ctx, all, &give)
	if err != nil {
		return nil, err
	}
	plan.Steps = append(append(v.steps, mortal(d.unknown, give)...), delay...)
	plan.Steps = append(plan.Steps, d.verifyStep(g.disk, v, scope))
	return plan, nil
}

// shape makes the disk for libvirt: as the domain has it or else, under a target that
// is free, as the user wants it. One that it has otherwise, or out of sight, is
// refused.
func (g *gift) shape(ctx context.Context, all states, s Source) error {
	o := g.wanted
	bus, err := busOf(o.Model)
	if err != nil {
		return err
	}
	if err := g.inSight(ctx, all); err != nil {
		return err
	}
	g.stay(ctx, all)
	target, err := g.place(ctx, all, bus)
	if err != nil {
		return err
	}
	if _, there := all.scope(from(g.uri)); there != nil && there.Target != nil {
		bus = there.Target.Bus
		o.Serial = cmp.Or(o.Serial, there.Serial)
		delay, err := g.delayOf(ctx, all, there)
		if err != nil {
			return err
		}
		o.Reconnect = cmp.Or(o.Reconnect, delay)
	}
	g.number(&o, s)
	g.disk, err = element(g.served, target, bus, o)
	return err
}

// inSight refuses what the domain has below another disk, or may have under no name.
func (v *served) inSight(ctx context.Context, all states) error {
	if above := all.above(func(u transport.URI) bool { return v.isAt(ctx, u) || v.mayBe(ctx, u) }); len(above) > 0 {
		return errBeneath(above)
	}
	if _, there := all.scope(v.is(ctx)); there != nil {
		return nil
	}
	if unnamed := all.targets(func(u transport.URI) bool { return v.mayBe(ctx, u) }); len(unnamed) > 0 {
		return errUnnamed(unnamed[0], *v.export)
	}
	return nil
}

// scope is where Attach puts a disk.
func (d *Domain) scope(all states, persist bool) (libvirtd.Scope, error) {
	scope := d.Scope
	if scope == 0 && all[libvirtd.Live] != nil {
		scope = libvirtd.Live
	}
	if persist {
		scope |= libvirtd.Config
	}
	if scope == 0 || scope&libvirtd.Live != 0 && all[libvirtd.Live] == nil {
		return 0, ErrOff
	}
	if scope&libvirtd.Config != 0 && all[libvirtd.Config] == nil {
		return 0, ErrTransient
	}
	return scope, nil
}

// whereText says for people where a scope is.
func whereText(scope libvirtd.Scope) string {
	switch scope {
	case libvirtd.Live:
		return "the running domain"
	case libvirtd.Config:
		return "the domain's configuration"
	}
	return "the running domain and its configuration"
}

// number gives a disk a serial number, by which its guest is asked for it.
func (d *Domain) number(o *Options, s Source) {
	if o.Serial == "" {
		o.Serial = serial(d.Domain.UUID, DiskID(s.name()))
	}
}

// target is where the disk is already, the one that is wanted, or a free one.
func (d *Domain) target(ctx context.Context, all states, v *served, bus, wanted string) (string, error) {
	if other := all.targets(func(u transport.URI) bool { return v.own && u.Export == v.uri.Export && u.String() != v.uri.String() }); len(other) > 0 {
		return "", cmp.Or(v.differs(ctx), fmt.Errorf("%w: the domain has the image as %q, %s: %s", ErrDiffers, other, v.before(), v.remedy(ctx)))
	}
	if _, there := all.scope(v.is(ctx)); there != nil && there.Target != nil {
		if wanted != "" && there.Target.Dev != wanted {
			return "", fmt.Errorf("%w: the domain has the disk as %q", ErrDiffers, there.Target.Dev)
		}
		return there.Target.Dev, nil
	}
	if wanted == "" {
		return libvirtd.FreeTarget(bus, all.list()...)
	}
	if _, other := all.scope(isTarget(wanted)); other != nil {
		return "", fmt.Errorf("%w: the domain has another disk %q", ErrDiffers, wanted)
	}
	return wanted, nil
}

// ownerOf is whom libvirt runs the domain's QEMU as; the configuration has it
// only where its author has.
func ownerOf(x *libvirtxml.Domain) string {
	if x == nil {
		return ""
	}
	for _, l := range x.SecLabel {
		user, group, ok := strings.Cut(l.Label, ":")
		if l.Model == "dac" && ok {
			return strings.TrimPrefix(user, "+") + ":" + strings.TrimPrefix(group, "+")
		}
	}
	return ""
}

// gift is a disk that a domain is being given.
type gift struct {
	*Domain
	*served
	disk    *libvirtxml.DomainDisk // its target may change until it is there
	wanted  Options                // as the user has said
	scope   libvirtd.Scope         // where the disk shall be
	missing libvirtd.Scope         // where it is not
	given   libvirtd.Scope         // where libvirt has put it, or may have
}

// step gives the domain the disk of the plan.
func (g *gift) step(plan *Plan) Step {
	return Step{
		Name: fmt.Sprintf("give %s disk %s, on bus %s, from %s", whereText(g.scope), g.disk.Target.Dev, g.disk.Target.Bus, g.uri.Shown()),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			changed, err := g.give(ctx)
			plan.Disk = g.disk.Target.Dev
			return changed, err
		},
		Undo: func(ctx context.Context) error {
			_, err := g.detach(ctx, g.disk, g.uri, g.given)
			return err
		},
	}
}

// give tries targets that are free: others may take them meanwhile, or give the
// domain the same disk. libvirt plugs a disk before it saves a configuration: what
// it refuses for both states may be in the running domain.
func (g *gift) give(ctx context.Context) (bool, error) {
	var refused error
	for range limits.AttachPlaces {
		changed, err := g.look(ctx)
		switch {
		case err != nil || g.missing == 0:
			return g.given != 0, err
		case refused != nil && !changed:
			return g.given != 0, refused
		}
		if g.missing&libvirtd.Live != 0 {
			if err := g.ready(ctx); err != nil {
				return g.given != 0, err
			}
		}
		refused = g.Session.AttachDisk(ctx, g.Domain.Domain, g.disk, g.missing)
		if refused == nil || !errors.As(refused, new(*libvirtd.Error)) {
			g.given |= g.missing
			return true, refused
		}
		if g.missing == libvirtd.Live|libvirtd.Config {
			g.given = libvirtd.Live
		}
	}
	return g.given != 0, refused
}

// look finds out where the disk is missing, and another target if its own is
// another disk's by now. changed says that either is not as it was. What is not
// there under the target that libvirt was asked for is not given.
func (g *gift) look(ctx context.Context) (changed bool, err error) {
	all, err := g.describe(ctx)
	if err != nil {
		return false, err
	}
	in, _ := all.scope(g.is(ctx))
	missing, target := g.scope&^in, g.disk.Target.Dev
	there, _ := all.scope(isDisk(target, g.uri))
	g.given &= there
	if _, taken := all.scope(isTarget(target)); in != 0 || taken != nil {
		if target, err = g.place(ctx, all, g.disk.Target.Bus); err != nil {
			return false, err
		}
	}
	changed = missing != g.missing || target != g.disk.Target.Dev
	g.missing, g.disk.Target.Dev = missing, target
	return changed, nil
}

// place is the target of the disk, of which what is there already must be as the
// user wants it.
func (g *gift) place(ctx context.Context, all states, bus string) (string, error) {
	var is string
	var err error
	served := g.is(ctx)
	_, there := all.scope(func(disk *libvirtxml.DomainDisk) bool {
		if is != "" || err != nil || !served(disk) || disk.Target == nil {
			return false
		}
		is, err = g.otherwise(ctx, all, disk)
		return is != ""
	})
	if err != nil {
		return "", err
	}
	if there != nil {
		return "", fmt.Errorf("%w: the domain has the disk as %q, %s: %s", ErrDiffers, there.Target.Dev, is, g.remedy(ctx))
	}
	return g.target(ctx, all, g.served, bus, g.wanted.ID)
}

// otherwise says what of a disk that is there is not as the user wants it.
func (g *gift) otherwise(ctx context.Context, all states, disk *libvirtxml.DomainDisk) (string, error) {
	bus, err := busOf(g.wanted.Model)
	switch {
	case disk.ReadOnly != nil && !g.readOnly:
		return "read-only", nil
	case disk.ReadOnly == nil && g.readOnly:
		return "writable", nil
	case err == nil && disk.Target.Bus != bus && g.wanted.Model != "":
		return "on bus " + disk.Target.Bus, nil
	case g.wanted.Serial != "" && disk.Serial != g.wanted.Serial:
		return fmt.Sprintf("with serial number %q", disk.Serial), nil
	}
	said := g.wanted.Reconnect
	if said == 0 || g.wanted.Renew && libvirtd.ReconnectDelay(disk) == 0 { // which gives it that
		return "", nil
	}
	is, err := g.delayOf(ctx, all, disk)
	if is != 0 && wholeSeconds(is) != wholeSeconds(said) { // 0: libvirt has forgotten it
		return fmt.Sprintf("waiting %v for a server that is lost, not %v", is, said), nil
	}
	return "", err
}

// holds are those states of the scope that have the disk under its target, by
// which alone libvirt knows it.
func (d *Domain) holds(ctx context.Context, disk *libvirtxml.DomainDisk, uri transport.URI, scope libvirtd.Scope) (libvirtd.Scope, error) {
	all, err := d.describe(ctx)
	if err != nil {
		return 0, err
	}
	in, _ := all.scope(isDisk(disk.Target.Dev, uri))
	return in & scope, nil
}

// detach takes the disk out of those states of the scope that have it. changed
// says that one has it no more or, with an error, may not have it: libvirt unplugs
// a disk before it saves a configuration.
func (d *Domain) detach(ctx context.Context, disk *libvirtxml.DomainDisk, uri transport.URI, scope libvirtd.Scope) (changed bool, err error) {
	in, err := d.holds(ctx, disk, uri, scope)
	if err != nil || in == 0 {
		return false, err
	}
	if err = d.Session.DetachDisk(ctx, d.Domain, disk, in); err == nil {
		return true, nil
	}
	ctx, cancel := steady(ctx)
	defer cancel()
	left, unknown := d.holds(ctx, disk, uri, in)
	return unknown != nil || left != in, err
}

// delaySteps are those behind give that see to the delay of a disk of the running
// machine.
func (g *gift) delaySteps(ctx context.Context, all states, give *Step) ([]Step, error) {
	if g.scope&libvirtd.Live == 0 {
		return nil, nil
	}
	steps, err := g.forgetStale(ctx, all, g.disk.Target.Dev, g.uri)
	if err != nil || !g.wanted.Renew {
		return steps, err
	}
	r := &renewal{Domain: g.Domain, target: g.disk.Target.Dev, reconnect: libvirtd.ReconnectDelay(g.disk), size: func() int64 { return 0 }, always: true, ready: g.ready}
	return append(steps, mortal(g.ended, r.delaySteps(give, g.disk)...)...), nil
}

// delaySteps give the disk of the step the delay that libvirt has forgotten. QEMU
// does not say whether it has one: a disk that is there is connected anew too.
func (r *renewal) delaySteps(give *Step, disk *libvirtxml.DomainDisk) []Step {
	attach := give.Do
	give.Do = func(ctx context.Context) (bool, error) {
		changed, err := attach(ctx)
		r.target = disk.Target.Dev
		return changed, err
	}
	open := r.openStep()
	renew := open.Do
	open.Do = func(ctx context.Context) (bool, error) {
		ctx, cancel := steady(ctx)
		defer cancel()
		all, err := r.Domain.describe(ctx)
		if err != nil {
			return false, err
		}
		_, there, err := all.within(libvirtd.Live).find(r.target)
		if err != nil || there == nil || libvirtd.ReconnectDelay(there) > 0 {
			return false, err
		}
		return renew(ctx)
	}
	return []Step{open, r.keepStep(), r.swapStep(), r.returnStep(), r.restoreStep(), r.endStep()}
}

// forgotten is the note of a libvirt that keeps no delay.
const forgotten = "libvirt has forgotten the reconnect delay, as versions before 9.2 do: without it the guest gets I/O errors when the server is started again"

// verifyStep sees that libvirt describes the disk, and says what has become of its
// delay.
func (d *Domain) verifyStep(disk *libvirtxml.DomainDisk, v *served, scope libvirtd.Scope) Step {
	return Step{
		Name: "see the disk in libvirt's description",
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			all, err := d.describe(ctx)
			if err != nil {
				return false, err
			}
			in, there := all.scope(v.is(ctx))
			if in&scope != scope {
				return false, fmt.Errorf("%w: libvirt does not describe disk %s", ErrDiffers, disk.Target.Dev)
			}
			delay, err := d.delayOf(ctx, all, there)
			switch {
			case err != nil:
				return false, err
			case libvirtd.ReconnectDelay(there) > 0:
			case scope&libvirtd.Live == 0:
				d.note(forgotten)
			case delay > 0:
				d.note("libvirt has forgotten the reconnect delay, as versions before 9.2 do; QEMU has it until the machine's next start")
			default:
				d.note(forgotten + ". --keep-reconnect sets it in QEMU, through libvirt's monitor")
			}
			return false, nil
		},
	}
}

// Resolve finds the target of a disk that its user names so, or by its image,
// export or URI as Attach got it. A name that several disks have is
// qmp.ErrInvalid, one of a disk that the Scope does not have, but another under
// its target, ErrDiffers. A disk that the domain has no more may have an export
// left.
func (d *Domain) Resolve(ctx context.Context, word string) (string, error) {
	all, err := d.describe(ctx)
	if err != nil {
		return "", err
	}
	if _, disk := all.scope(isTarget(word)); disk != nil {
		return word, nil
	}
	path, err := filepath.Abs(word)
	if err != nil {
		return "", err
	}
	ids := []string{DiskID(word), DiskID(path)} // an image in memory has no path
	uri, uriErr := transport.ParseURI(word)
	named := func(some states) []string {
		targets := some.targets(func(u transport.URI) bool {
			return slices.ContainsFunc(ids, func(id string) bool { return u.Export == ExportName(d.Domain.UUID, id) }) || uriErr == nil && u.String() == uri.String()
		})
		if len(targets) == 0 {
			targets = d.ofExport(ctx, some, word)
		}
		return targets
	}
	asked := all.within(d.Scope)
	targets := named(asked)
	if len(targets) == 0 {
		targets = named(all)
		if _, other := asked.scope(func(disk *libvirtxml.DomainDisk) bool {
			return disk.Target != nil && slices.Contains(targets, disk.Target.Dev)
		}); other != nil {
			return "", fmt.Errorf("%w: %s has another disk %q", ErrDiffers, whereText(d.Scope), other.Target.Dev)
		}
	}
	switch len(targets) {
	case 0:
		return d.left(ctx, all, word, ids)
	case 1:
		return targets[0], nil
	}
	return "", fmt.Errorf("%w name of a disk %q: the domain has it as %q, which are names too", qmp.ErrInvalid, strings.ToValidUTF8(word, "?"), targets)
}

// ofExport are the targets of the disks that are at an address of the daemon's
// export or, if none is, of all disks with an export of the name: other servers
// may have one too.
func (d *Domain) ofExport(ctx context.Context, all states, name string) []string {
	named := func(u transport.URI) bool { return u.Export == name }
	if d.Server == nil {
		return all.targets(named)
	}
	x, err := d.Server.Export(ctx, name)
	if err != nil {
		return all.targets(named)
	}
	ours := all.targets(func(u transport.URI) bool { return isAt(ctx, u, x) })
	if len(ours) == 0 {
		return all.targets(named)
	}
	return ours
}

// left finds a disk that the domain has no more, but its export: by the ids that
// may follow from its image, by the export or, as exports do not know targets, by
// the name of any target if there is one such disk only.
func (d *Domain) left(ctx context.Context, all states, word string, ids []string) (string, error) {
	none := fmt.Errorf("%w: the domain has no disk %q", ErrNoDisk, strings.ToValidUTF8(word, "?"))
	if d.Server == nil {
		return "", none
	}
	list, err := d.Server.Exports(ctx)
	if err != nil {
		return "", errors.Join(none, err)
	}
	var others, names []string
	for _, x := range list {
		one, own := strings.CutPrefix(x.Name, ExportName(d.Domain.UUID, ""))
		is := func(u transport.URI) bool { return u.Export == x.Name }
		above, meant := all.above(is), slices.Contains(ids, one) || one == word || x.Name == word
		switch {
		case !own || len(all.targets(is)) > 0:
		case len(above) > 0 && meant:
			return "", errBeneath(above)
		case len(above) > 0:
		case meant:
			return one, nil
		default:
			others, names = append(others, one), append(names, x.Name)
		}
	}
	switch {
	case len(others) == 0 || !libvirtd.IsTarget(word):
		return "", none
	case len(others) == 1:
		return others[0], nil
	}
	return "", fmt.Errorf("%w; of disks that it had exports are left, which are names too: %q", none, names)
}

// targets are those of the NBD disks with a source that fits, each once.
func (s states) targets(fits func(transport.URI) bool) []string {
	return s.targetsOf(func(disk *libvirtxml.DomainDisk) bool {
		u := source(disk)
		return u.Kind != "" && fits(u)
	})
}

func (s states) targetsOf(fits func(*libvirtxml.DomainDisk) bool) (found []string) {
	s.scope(func(disk *libvirtxml.DomainDisk) bool {
		if disk.Target != nil && fits(disk) && !slices.Contains(found, disk.Target.Dev) {
			found = append(found, disk.Target.Dev)
		}
		return false
	})
	return found
}

// within are those descriptions that are of the scope, all if it is 0.
func (s states) within(scope libvirtd.Scope) states {
	some := states{}
	for one, x := range s {
		if scope == 0 || scope&one != 0 {
			some[one] = x
		}
	}
	return some
}

// find is the NBD disk with the target, and where it is. A target that is one
// disk in the running machine and another in the configuration is ErrDiffers.
func (d *Domain) find(ctx context.Context, target string) (libvirtd.Scope, *libvirtxml.DomainDisk, error) {
	all, err := d.describe(ctx)
	if err != nil {
		return 0, nil, err
	}
	return all.find(target)
}

// find is as Domain's.
func (s states) find(target string) (libvirtd.Scope, *libvirtxml.DomainDisk, error) {
	in, disk := s.scope(isTarget(target))
	if disk == nil {
		return 0, nil, nil
	}
	uri := source(disk)
	if same, _ := s.scope(isDisk(target, uri)); same != in {
		return 0, nil, fmt.Errorf("%w: the running domain has another disk %q than its configuration, detach takes one of them with --live or --config", ErrDiffers, target)
	}
	if uri.Kind == "" {
		return 0, nil, fmt.Errorf("%w: disk %q of the domain is not from an NBD server", ErrDiffers, target)
	}
	return in, disk, nil
}

// isOwnExport tells the exports that Attach has made for the domain.
func (d *Domain) isOwnExport(name string) bool {
	return strings.HasPrefix(name, ExportName(d.Domain.UUID, ""))
}

// serving is the disk with the target, which the domain must have, where it is,
// and the export behind it: the named one or, if that is "", the one that
// Attach has made. An export that the disk is not from is refused, and one that is
// paused is ErrPaused.
func (d *Domain) serving(ctx context.Context, target, named string) (in libvirtd.Scope, disk *libvirtxml.DomainDisk, x api.Export, err error) {
	if in, disk, err = d.find(ctx, target); err != nil {
		return 0, nil, x, err
	}
	if disk == nil {
		return 0, nil, x, fmt.Errorf("%w: the domain has no disk %q", ErrNoDisk, target)
	}
	uri := source(disk)
	if named == "" && d.isOwnExport(uri.Export) {
		named = uri.Export
	}
	switch {
	case d.Server == nil:
		return 0, nil, x, ErrNoServer
	case named == "":
		return 0, nil, x, unnamed(target)
	}
	x, err = d.Server.Export(ctx, named)
	switch {
	case err != nil:
	case isAt(ctx, uri, x):
		err = goesOn(x)
	case mayBe(ctx, uri, x):
		err = errUnnamed(target, x)
	default:
		err = otherExport(target, x)
	}
	return in, disk, x, err
}

// Detach is as Machine's, of the running machine and of its configuration, or of
// those that are in the Scope: then the export stays for the other that has the
// disk. Of a disk that neither has it removes the export. One that a guest has whom
// libvirt has saved is ErrSaved, unless force is set.
func (d *Domain) Detach(ctx context.Context, target string, force bool) (*Plan, error) {
	all, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	in, disk, err := all.within(d.Scope).find(target)
	if err != nil {
		return nil, err
	}
	plan := &Plan{Aim: fmt.Sprintf("detach %s from domain %q", target, d.Domain.Name), Disk: target}
	if disk == nil {
		_, other := all.scope(isTarget(target))
		m := d.machine(nil)
		if other != nil || !m.serves(ctx, target) {
			return plan, nil
		}
		export := ExportName(m.Name, target)
		if above := all.above(func(u transport.URI) bool { return u.Export == export }); len(above) > 0 {
			return nil, errBeneath(above)
		}
		return plan, d.remove(ctx, plan, m, export, all[libvirtd.Live] != nil, force)
	}
	uri := source(disk)
	own := d.isOwnExport(uri.Export)
	if own && d.Server == nil {
		return nil, fmt.Errorf("%w: the control socket is needed to remove the export", ErrNoServer)
	}
	m := d.machine(all[libvirtd.Live])
	if !force && in&libvirtd.Live != 0 {
		plan.Steps = append(plan.Steps, Step{
			Name: "see that the guest does not use the disk, if an agent answers",
			Do:   func(ctx context.Context) (bool, error) { return false, d.unused(ctx, m, target) },
		})
	}
	plan.Steps = append(plan.Steps, outlived(d.unknown, d.takeStep(disk, uri, in))...)
	if in&libvirtd.Live != 0 {
		delay, err := d.delay(ctx, target, uri)
		if err != nil {
			return nil, err
		}
		if delay > 0 {
			plan.Steps = append(plan.Steps, outlived(d.ended, d.forgetDelayStep(target, uri))...)
		}
	}
	_, left := all.scope(func(disk *libvirtxml.DomainDisk) bool { return from(uri)(disk) && !isTarget(target)(disk) })
	above := all.above(func(u transport.URI) bool { return u.String() == uri.String() })
	if has, _ := all.scope(isDisk(target, uri)); own && has&^in == 0 && left == nil && above == nil {
		err = d.remove(ctx, plan, m, uri.Export, all[libvirtd.Live] != nil, force)
	}
	return plan, err
}

// remove has the plan remove an export, and what its disk has left in a machine that
// runs. One that a saved guest needs is ErrSaved, unless force is set.
func (d *Domain) remove(ctx context.Context, plan *Plan, m *Machine, export string, running, force bool) error {
	if running {
		plan.Steps = append(plan.Steps, d.leftStep(plan.Disk, export))
	}
	plan.Steps = append(plan.Steps, m.removeStep(export, force))
	if force {
		return nil
	}
	saved, err := d.Session.Saved(ctx, d.Domain)
	if err != nil {
		return err
	}
	all := states{libvirtd.Live: saved}
	is := func(u transport.URI) bool { return u.Export == export }
	if targets := append(all.targets(is), all.above(is)...); len(targets) > 0 {
		return fmt.Errorf("%w: as %q", ErrSaved, targets)
	}
	return nil
}

// leftStep deletes the clients that an unfinished renewal of a disk has left, which
// libvirt does not know. Only if the export has clients yet is QEMU asked for them.
func (d *Domain) leftStep(target, export string) Step {
	return Step{
		Name:  fmt.Sprintf("delete what a change of disk %s that was cut short has left in the machine, if the export has clients yet", target),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
			defer cancel()
			for {
				x, err := d.Server.Export(ctx, export)
				if hasCode(err, api.CodeNotFound) || err == nil && x.Clients == 0 {
					return false, nil
				}
				if err != nil {
					return false, err
				}
				if wait.Err() != nil {
					break
				}
				pause(wait, limits.AttachPoll)
			}
			changed, err := deleteNodes(ctx, d.Session.Monitor(d.Domain), target)
			if err != nil && d.ended(ctx) {
				err = nil
			}
			return changed, err
		},
	}
}

// takeStep takes the disk out of the states that the scope has.
func (d *Domain) takeStep(disk *libvirtxml.DomainDisk, uri transport.URI, scope libvirtd.Scope) Step {
	name := fmt.Sprintf("take disk %s out of the domain's configuration, from %s", disk.Target.Dev, uri.Shown())
	if scope&libvirtd.Live != 0 {
		name = fmt.Sprintf("have the guest release disk %s, from %s", disk.Target.Dev, uri.Shown())
	}
	if scope == libvirtd.Live|libvirtd.Config {
		name += ", and take it out of the domain's configuration"
	}
	return Step{
		Name:  name,
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			if scope&libvirtd.Live != 0 {
				if err := d.noPause(ctx, uri); err != nil {
					return false, err
				}
			}
			return d.detach(ctx, disk, uri, scope)
		},
	}
}

// noPause refuses a disk from u whose export is paused, or may be.
func (d *Domain) noPause(ctx context.Context, u transport.URI) error {
	return noPause(ctx, d.Server, func(x api.Export) (bool, error) { return isAt(ctx, u, x) || mayBe(ctx, u, x), nil })
}

// Resize is as Machine's. While the domain runs the plan, not its making, goes
// through libvirt's monitor, which marks the domain as tainted.
func (d *Domain) Resize(ctx context.Context, target, export string, want Size) (*Plan, error) {
	in, disk, x, err := d.serving(ctx, target, export)
	if err != nil {
		return nil, err
	}
	size, err := want.of(x.Size)
	if err != nil {
		return nil, err
	}
	g := &growth{Machine: d.machine(nil), id: target, size: size, by: want.added()}
	plan := &Plan{
		Aim:    fmt.Sprintf("grow %s of domain %q from %d to %d bytes", target, d.Domain.Name, x.Size, size),
		Disk:   target,
		Steps:  []Step{g.exportStep(x.Name)},
		Repeat: g.repeat,
	}
	if in&libvirtd.Live == 0 {
		return plan, nil
	}
	r := &renewal{Domain: d, target: target, reconnect: libvirtd.ReconnectDelay(disk), resumes: true, size: func() int64 { return g.size },
		ready: func(ctx context.Context) error { return admits(ctx, d.Server, x.Name, disk.ReadOnly != nil) }}
	plan.Steps = append([]Step{r.lookStep(x)}, plan.Steps...)
	plan.Steps = append(plan.Steps, mortal(d.ended, r.openStep(), r.swapStep(), r.tellStep(), r.returnStep(), r.restoreStep(), r.endStep())...)
	return plan, nil
}

// machine is the domain for plans that it has in common with machines, with
// the guest agent if the running domain, live, has a channel for one.
func (d *Domain) machine(live *libvirtxml.Domain) *Machine {
	m := &Machine{Name: d.Domain.UUID, Server: d.Server, Note: d.Note}
	if live == nil || live.Devices == nil {
		return m
	}
	for _, c := range live.Devices.Channels {
		if c.Target != nil && c.Target.VirtIO != nil && c.Target.VirtIO.Name == agentChannel {
			m.Agent = d.Session.Agent(d.Domain)
		}
	}
	return m
}

// unused asks the guest, by libvirt, whether it has a file system on the disk.
// What could not be asked is noted.
func (d *Domain) unused(ctx context.Context, m *Machine, target string) error {
	if m.Agent == nil {
		d.note(unchecked + "the domain has no channel for a guest agent")
		return nil
	}
	list, err := d.Session.Filesystems(ctx, d.Domain)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		d.note(unchecked+"%v", err)
		return nil
	}
	unknown := ""
	for _, f := range list {
		if slices.Contains(f.Targets, target) {
			return fmt.Errorf("%w at %q", ErrMounted, f.Mountpoint)
		}
		if len(f.Targets) == 0 && !strings.HasPrefix(f.Name, "loop") { // those have no disk
			unknown = f.Mountpoint
		}
	}
	if unknown != "" {
		d.note(unchecked+"libvirt does not know the disk that the guest has mounted at %q", unknown)
	}
	return nil
}

// agentChannel is what libvirt and guests call the channel of an agent.
const agentChannel = "org.qemu.guest_agent.0"

// Snapshot is as Machine's.
func (d *Domain) Snapshot(ctx context.Context, target, export, overlay string, must bool) (*Plan, error) {
	_, _, x, err := d.serving(ctx, target, export)
	if err != nil {
		return nil, err
	}
	all, err := d.describe(ctx)
	if err != nil {
		return nil, err
	}
	return d.machine(all[libvirtd.Live]).snapshot(x, target, overlay, must)
}

// Element is the XML of the disk that Attach would give the domain, for people
// who edit descriptions themselves. What Attach refuses for what the domain has is
// refused. Nothing is changed.
func (d *Domain) Element(ctx context.Context, s Source, o Options) (string, error) {
	if s.Image != "" && s.forgets() {
		return "", errForgets
	}
	all, err := d.describe(ctx)
	if err != nil {
		return "", err
	}
	v, err := s.serve(ctx, d.Server, d.Domain.UUID, DiskID(s.name()))
	if err != nil {
		return "", err
	}
	g := &gift{Domain: d, served: v, wanted: o}
	if err := g.shape(ctx, all, s); err != nil {
		return "", err
	}
	return g.disk.Marshal()
}

// Element is the XML of a disk at a URI that has the target Options.ID in some
// domain. Nobody is asked.
func Element(s Source, o Options) (string, error) {
	uri, creds, err := s.remote(s.URI)
	if err != nil {
		return "", err
	}
	bus, err := busOf(o.Model)
	if err != nil {
		return "", err
	}
	disk, err := element(&served{uri: uri, readOnly: s.ReadOnly, creds: creds}, o.ID, bus, o)
	if err != nil {
		return "", err
	}
	return disk.Marshal()
}

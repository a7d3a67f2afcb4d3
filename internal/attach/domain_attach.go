package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

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

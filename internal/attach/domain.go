package attach

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
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
	path := pathOf(word)
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

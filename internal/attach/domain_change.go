package attach

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

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
// libvirt does not know, nor by which target the disk had gone then. Only if the export has clients yet is QEMU asked for them.
func (d *Domain) leftStep(target, export string) Step {
	return Step{
		Name:  fmt.Sprintf("delete what a change of disk %s that was cut short has left in the machine, if the export has clients yet", target),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			x, err := d.deserted(ctx, export)
			if hasCode(err, api.CodeNotFound) || err == nil && x.Clients == 0 {
				return false, nil
			}
			if err != nil {
				return false, err
			}
			changed, err := deleteNodes(ctx, d.Session.Monitor(d.Domain), func(node string) bool { return isNodeAt(node, x.URIs) })
			if err != nil && d.ended(ctx) {
				err = nil
			}
			return changed, err
		},
	}
}

// deserted is an export once its clients have left, or have not for limits.AttachInUse.
func (d *Domain) deserted(ctx context.Context, export string) (api.Export, error) {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		x, err := d.Server.Export(ctx, export)
		if err != nil || x.Clients == 0 || wait.Err() != nil {
			return x, err
		}
		pause(wait, limits.AttachPoll)
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

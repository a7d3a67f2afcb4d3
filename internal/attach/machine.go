package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Machine is a QEMU with its monitor.
type Machine struct {
	Name    string // by which its exports are told from others'
	Monitor *qmp.Monitor
	Agent   qmp.Executor   // of the guest; nil: there is none
	Server  *client.Client // nil: only disks of other servers

	// Note hears what people should know beside errors. It may be nil.
	Note func(text string)
}

func (m *Machine) note(format string, args ...any) {
	if m.Note != nil {
		m.Note(fmt.Sprintf(format, args...))
	}
}

// Options are how a disk is plugged.
type Options struct {
	// ID is the disk's name in the machine. Empty is DiskID, or libvirt's
	// first free target.
	ID        string
	Model     qmp.Model     // empty: that of a disk that is plugged, else VirtIOBlk
	Serial    string        // empty: one that follows from the names
	Reconnect time.Duration // 0: limits.AttachReconnect
	Persist   bool          // in the configuration of a libvirt domain too

	// Renew sets the reconnect delay through libvirt's monitor where libvirt
	// forgets it. It marks the domain as tainted.
	Renew bool
}

// plug is a disk that is being plugged.
type plug struct {
	*Machine
	served
	id, raw string
	model   qmp.Model
	serial  string
	said    Options // as the caller has it
	client  qmp.NBD
	there   bool // the device was, before the plan
}

// Attach plans to serve a disk and to plug it. A disk that is plugged as
// wanted leaves nothing to do.
func (m *Machine) Attach(ctx context.Context, s Source, o Options) (*Plan, error) {
	asked := o.ID
	o.ID = cmp.Or(asked, DiskID(s.name()))
	if err := checkID(o.ID); err != nil {
		return nil, err
	}
	v, err := s.serve(ctx, m.Server, m.Name, o.ID)
	if err != nil {
		return nil, err
	}
	id, raw, err := m.stay(ctx, v, asked)
	if err != nil {
		return nil, err
	}
	o.ID = cmp.Or(id, o.ID)
	server, err := address(v.uri.Target)
	if err != nil {
		return nil, err
	}
	if v.uri.TLS && v.creds.dir == "" {
		return nil, fmt.Errorf("%w URI %s: a machine needs a folder of certificates for TLS, or a pre-shared key", qmp.ErrInvalid, v.uri.Shown())
	}
	p := &plug{Machine: m, served: *v, id: o.ID, model: cmp.Or(o.Model, qmp.VirtIOBlk), said: o}
	p.serial = cmp.Or(o.Serial, serial(m.Name, o.ID))
	if err := qmp.CheckSerial(p.model, p.serial); err != nil {
		return nil, err
	}
	p.raw = cmp.Or(raw, rawNode(v.own, o.ID, v.uri.String(), v.readOnly))
	place, err := p.preflight(ctx)
	if err != nil {
		return nil, err
	}
	schema, err := m.Monitor.Schema(ctx)
	if err != nil {
		return nil, err
	}
	p.client = nbd(schema, clientNode(p.raw, 1, o.Reconnect), server, v.uri.Export, v.readOnly, o.Reconnect)
	if v.uri.TLS {
		p.client.TLSCreds, p.client.TLSHostname = v.creds.objectID(o.ID), v.creds.hostname
		v.steps = append(v.steps, mortal(m.Monitor.Ended, p.credsStep())...)
	}
	plan := &Plan{Aim: fmt.Sprintf("attach %q to %q as %s", transport.HideTokens(s.name()), m.Name, o.ID), Disk: o.ID}
	plan.Steps = append(v.steps, mortal(m.Monitor.Ended, p.clientStep(), p.rawStep(), p.deviceStep(place), p.verifyStep())...)
	return plan, nil
}

// stay leaves an export that the machine has at the address by which it has it, and
// says as which disk and by which raw node: nothing where it does not. A disk that
// is not as the caller has said is ErrDiffers.
func (m *Machine) stay(ctx context.Context, v *served, asked string) (id, node string, err error) {
	if v.export == nil {
		return "", "", nil
	}
	id, raw, l, err := m.diskOf(ctx, *v.export, asked)
	if err != nil || raw == nil {
		return "", "", err
	}
	said := v.creds
	said.hostname = l.creds.hostname
	switch {
	case asked != "" && asked != id:
		return "", "", fmt.Errorf("%w: the machine has export %q as disk %s", ErrDiffers, v.export.Name, id)
	case raw.ReadOnly != v.readOnly:
		return "", "", fmt.Errorf("%w: the machine has the export as disk %s, read-only: %t: detach it first", ErrDiffers, id, raw.ReadOnly)
	case v.creds != credentials{} && said != l.creds:
		return "", "", fmt.Errorf("%w: the machine has the export as disk %s, with %s: detach it first", ErrDiffers, id, &l.creds)
	}
	v.uri, v.creds = l.uri, l.creds
	return id, raw.Name, nil
}

// diskOf is the disk of the machine that is from the export, the one that is asked
// for where several are, with its raw node; nil where none is.
func (m *Machine) diskOf(ctx context.Context, x api.Export, asked string) (id string, raw *qmp.Node, l link, err error) {
	all, err := qmp.QueryBlock(ctx, m.Monitor)
	if err != nil {
		return "", nil, l, err
	}
	var unnamed error
	for i := range all {
		is, node := all[i].ID(), all[i].Inserted
		if node == nil || raw != nil && is != asked {
			continue
		}
		if !isNodeOf(node.Name, is) {
			if err := m.notBeneath(ctx, is, x); err != nil {
				return "", nil, l, err
			}
			continue
		}
		way, err := m.linkTo(ctx, node, is, x)
		switch {
		case err == nil:
			id, raw, l = is, node, way
		case errors.Is(err, errMayBe):
			unnamed = err
		case !errors.Is(err, ErrDiffers):
			return "", nil, l, err
		}
	}
	if raw == nil {
		return "", nil, l, unnamed
	}
	return id, raw, l, nil
}

// notBeneath refuses an export that a device has below what somebody else has put
// above its raw node, which is read-only there whatever it was.
func (m *Machine) notBeneath(ctx context.Context, id string, x api.Export) error {
	is, err := m.hasNode(ctx, id, x)
	if is {
		err = fmt.Errorf("%w: the machine has the export below disk %s, by a snapshot or a copy: block-commit or block-job-cancel ends that", ErrDiffers, id)
	}
	return err
}

// hasNode reports whether a raw node that was made for the disk, with a device above
// it or without, is from the export. One that may be is errMayBe.
func (m *Machine) hasNode(ctx context.Context, id string, x api.Export) (bool, error) {
	list, err := nodes(ctx, m.Monitor, id)
	if err != nil {
		return false, err
	}
	for i := range list {
		for _, list[i].ReadOnly = range []bool{false, true} {
			_, err := m.linkTo(ctx, &list[i], id, x)
			switch {
			case err == nil:
				return true, nil
			case !errors.Is(err, ErrDiffers) || errors.Is(err, errMayBe):
				return false, err
			}
		}
	}
	return false, nil
}

// noPause refuses a disk whose export is paused, or may be.
func (m *Machine) noPause(ctx context.Context, id string) error {
	return noPause(ctx, m.Server, func(x api.Export) (bool, error) {
		is, err := m.hasNode(ctx, id, x)
		if errors.Is(err, errMayBe) {
			return true, nil
		}
		return is, err
	})
}

// nbd is a client that guests do not notice the absence of its server by, with the
// options that this QEMU knows.
func nbd(schema *qmp.Schema, node string, server qmp.Address, export string, readOnly bool, reconnect time.Duration) qmp.NBD {
	if reconnect == 0 {
		reconnect = limits.AttachReconnect
	}
	n := qmp.NBD{Node: node, Server: server, Export: export, ReadOnly: readOnly, Discard: !readOnly, ReconnectDelay: reconnect}
	if schema.HasOption("blockdev-add", "nbd", "open-timeout") {
		n.OpenTimeout = limits.AttachOpen
	}
	return n
}

// preflight finds out what can be known without a change: a machine without a
// place, a name that is taken. It says where the device would go.
func (p *plug) preflight(ctx context.Context) (string, error) {
	there, err := p.plugged(ctx)
	if errors.Is(err, ErrDiffers) && p.differs != nil {
		err = cmp.Or(p.differs(ctx), err)
	}
	if err != nil || there {
		return "where it is", err
	}
	places, err := p.places(ctx)
	if err != nil {
		return "", err
	}
	return describe(places[0]), nil
}

// plugged reports whether the device is there with the disk.
func (p *plug) plugged(ctx context.Context) (bool, error) {
	d, err := find(ctx, p.Monitor, p.id)
	if err != nil {
		return false, err
	}
	if d != nil {
		if d.Inserted == nil || d.Inserted.Name != p.raw {
			return false, fmt.Errorf("%w: the machine has a device %q with another disk, or one that was %s: %s", ErrDiffers, p.id, p.before(), p.remedy(ctx))
		}
		return true, p.fits(ctx)
	}
	present, err := qmp.DevicePresent(ctx, p.Monitor, p.id)
	if err == nil && present {
		err = fmt.Errorf("%w: the machine has a device %q that is no disk", ErrDiffers, p.id)
	}
	return false, err
}

// fits holds what the caller has said against the device that is there, which p
// becomes where nothing was said.
func (p *plug) fits(ctx context.Context) error {
	model := string(p.model)
	for _, x := range [...]struct {
		property, said string
		is             *string
	}{{"type", string(p.said.Model), &model}, {"serial", p.said.Serial, &p.serial}} {
		is, err := p.property(ctx, device(p.id), x.property)
		if err != nil {
			return err
		}
		if x.said != "" && is != x.said {
			return fmt.Errorf("%w: the %s of device %q is %q, not %q: %s", ErrDiffers, x.property, p.id, is, x.said, p.remedy(ctx))
		}
		*x.is = is
	}
	p.model = qmp.Model(model)
	list, err := nodes(ctx, p.Monitor, p.id)
	if err != nil {
		return err
	}
	return p.waits(ctx, lastClient(list, p.raw))
}

// waits holds the delay that the caller has said against the client that is
// there.
func (p *plug) waits(ctx context.Context, c nbdClient) error {
	if said := p.said.Reconnect; said != 0 && c.number > 0 && wholeSeconds(c.wait) != wholeSeconds(said) {
		return fmt.Errorf("%w: disk %s waits %v for a server that is lost, not %v: %s", ErrDiffers, p.id, c.wait, said, p.remedy(ctx))
	}
	return nil
}

// find is the disk of the device, or nil.
func find(ctx context.Context, x qmp.Executor, id string) (*qmp.BlockDevice, error) {
	disks, err := qmp.QueryBlock(ctx, x)
	if err != nil {
		return nil, err
	}
	for i := range disks {
		if disks[i].Is(id) {
			return &disks[i], nil
		}
	}
	return nil, nil
}

// nodes are the names of the machine's nodes for the disk.
func nodes(ctx context.Context, x qmp.Executor, id string) ([]qmp.Node, error) {
	all, err := qmp.QueryNamedBlockNodes(ctx, x)
	return slices.DeleteFunc(all, func(n qmp.Node) bool { return !isNodeOf(n.Name, id) }), err
}

func has(list []qmp.Node, name string) bool {
	return slices.ContainsFunc(list, func(n qmp.Node) bool { return n.Name == name })
}

// maybe reports whether a command with the error may have been carried out.
func maybe(err error) bool { return err == nil || errors.Is(err, qmp.ErrUnanswered) }

func (p *plug) clientStep() Step {
	return Step{
		Name: fmt.Sprintf("have the machine connect to %s, as node %s", p.uri.Shown(), p.client.Node),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			list, err := nodes(ctx, p.Monitor, p.id)
			if last := lastClient(list, p.raw); last.number > 0 {
				p.client.Node = last.node
				return false, p.waits(ctx, last)
			}
			if err != nil || has(list, p.raw) {
				return false, err
			}
			if err := p.ready(ctx); err != nil {
				return false, err
			}
			err = p.client.Add(ctx, p.Monitor)
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return deleteNode(ctx, p.Monitor, p.client.Node) },
	}
}

func (p *plug) rawStep() Step {
	return Step{
		Name: fmt.Sprintf("add node %s above it", p.raw),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			list, err := nodes(ctx, p.Monitor, p.id)
			if err != nil || has(list, p.raw) {
				return false, err
			}
			err = qmp.Raw{Node: p.raw, ReadOnly: p.readOnly, Discard: !p.readOnly}.Add(ctx, p.Monitor, p.client.Node)
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return deleteNode(ctx, p.Monitor, p.raw) },
	}
}

// deleteNode deletes a node of the disk that may be gone already. QEMU lets a
// device out of its tree before it lets go of the device's node.
func deleteNode(ctx context.Context, x qmp.Executor, name string) error {
	wait, cancel := context.WithTimeout(ctx, limits.AttachInUse)
	defer cancel()
	for {
		all, err := qmp.QueryNamedBlockNodes(ctx, x)
		if err != nil || !has(all, name) {
			return err
		}
		err = qmp.BlockdevDel(ctx, x, name)
		if !qmp.HasClass(err, qmp.ClassGeneric) || wait.Err() != nil {
			return err
		}
		pause(wait, limits.AttachPoll)
	}
}

func (p *plug) deviceStep(place string) Step {
	return Step{
		Name: fmt.Sprintf("plug device %s, %s with serial number %q, at %s", p.id, p.model, p.serial, place),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			var err error
			if p.there, err = p.plugged(ctx); err != nil || p.there {
				return false, err
			}
			return p.add(ctx)
		},
		Undo: func(ctx context.Context) error { return unplug(ctx, p.Monitor, p.id) },
	}
}

// add tries the places that are free: others may take them meanwhile.
func (p *plug) add(ctx context.Context) (bool, error) {
	places, err := p.places(ctx)
	if err != nil {
		return false, err
	}
	for _, d := range places[:min(len(places), limits.AttachPlaces)] {
		err = qmp.DeviceAdd(ctx, p.Monitor, d)
		if maybe(err) || errors.Is(err, qmp.ErrInvalid) || !errors.As(err, new(*qmp.Error)) {
			return maybe(err), err
		}
	}
	return false, err
}

// places are the devices that the disk could be, at least one, best first.
func (p *plug) places(ctx context.Context) ([]qmp.Device, error) {
	d := qmp.Device{Model: p.model, ID: p.id, Node: p.raw, Serial: p.serial}
	var all []qmp.Device
	if p.model == qmp.SCSIDisk {
		targets, err := qmp.FreeSCSI(ctx, p.Monitor)
		for _, t := range targets {
			d.Bus, d.Target = t.Bus, t.Target
			all = append(all, d)
		}
		return all, err
	}
	free, err := qmp.FreePCI(ctx, p.Monitor)
	for _, f := range free {
		d.Bus, d.Slot = f.Bus, f.Slot
		all = append(all, d)
	}
	return all, err
}

func describe(d qmp.Device) string {
	bus := qmp.Printable(d.Bus, limits.QMPName)
	switch {
	case d.Model == qmp.SCSIDisk:
		return fmt.Sprintf("target %d of %s", d.Target, bus)
	case d.Slot > 0:
		return fmt.Sprintf("slot %d of %s", d.Slot, bus)
	}
	return bus
}

// unplug takes a device out that may be gone already, or that the guest was asked to
// release before. A guest that is about to take a device in, for which PCIe gives it
// seconds, cannot be asked yet. QEMU has but words for both (qdev-monitor.c, pcie.c).
func unplug(ctx context.Context, m *qmp.Monitor, id string) error {
	ctx, cancel := context.WithTimeout(ctx, limits.QMPUnplug)
	defer cancel()
	for {
		err := m.Unplug(ctx, id)
		refused := func(text string) bool {
			return qmp.HasClass(err, qmp.ClassGeneric) && strings.Contains(err.Error(), text)
		}
		switch {
		case qmp.HasClass(err, qmp.ClassDeviceNotFound):
			return nil
		case refused("already in the process of unplug"):
			return m.AwaitUnplug(ctx, id)
		case !refused("guest is busy"):
			return err
		}
		if pause(ctx, limits.AttachPoll); ctx.Err() != nil {
			return err
		}
	}
}

func (p *plug) verifyStep() Step {
	return Step{
		Name: "see the disk in the machine, and in the guest if an agent answers",
		Do: func(ctx context.Context) (bool, error) {
			if err := p.verify(ctx); err != nil {
				return false, err
			}
			return false, p.seen(ctx)
		},
	}
}

// verify holds what the machine reports against what is served.
func (p *plug) verify(ctx context.Context) error {
	d, err := find(ctx, p.Monitor, p.id)
	switch {
	case err != nil:
		return err
	case d == nil || d.Inserted == nil || d.Inserted.Name != p.raw:
		return fmt.Errorf("%w: query-block does not show device %q with node %s", ErrDiffers, p.id, p.raw)
	case d.Inserted.ReadOnly != p.readOnly:
		return fmt.Errorf("%w: device %q is read-only: %v", ErrDiffers, p.id, d.Inserted.ReadOnly)
	}
	return p.fills(d.Inserted.Image.VirtualSize)
}

// fills holds the size that the machine shows against that of the export. One that
// has grown while the machine had the disk is no error: its guest needs it, and
// to be told of the size Resize needs it too.
func (p *plug) fills(shown int64) error {
	size := p.size()
	switch {
	case size == 0 || sectors(shown) == sectors(size):
		return nil
	case p.there && shown < size:
		p.note("the machine knows of %d bytes of the %d that the export has: resize tells it of them", shown, size)
		return nil
	}
	return fmt.Errorf("%w: device %q has %d bytes, the export %d", ErrDiffers, p.id, shown, size)
}

// Resolve finds the name of a disk of the machine that its user names so, or
// by its image, export or URI as Attach got it. A disk that is not plugged may
// have nodes or an export left.
func (m *Machine) Resolve(ctx context.Context, word string) (string, error) {
	path := pathOf(word)
	for _, id := range []string{word, DiskID(word), DiskID(path), DiskID((&Source{Export: word}).name())} {
		d, err := find(ctx, m.Monitor, id)
		if err != nil || d != nil {
			return id, err
		}
		if list, err := nodes(ctx, m.Monitor, id); err != nil || len(list) > 0 || m.serves(ctx, id) {
			return id, err
		}
	}
	return m.resolveNamed(ctx, word, path)
}

// resolveNamed is Resolve for disks that their user has given another name than
// DiskID.
func (m *Machine) resolveNamed(ctx context.Context, word, path string) (string, error) {
	disks, err := m.disks(ctx)
	if err != nil {
		return "", err
	}
	foreign, _, uriErr := new(Source).remote(word)
	export, exportErr := m.export(ctx, word)
	var known, found []string
	for id, node := range disks {
		known = append(known, qmp.Printable(id, limits.DeviceID))
		own, err := m.export(ctx, ExportName(m.Name, id))
		fits := err == nil && (own.Description == description(id, path) || own.Description == description(id, word)) ||
			uriErr == nil && rawNode(false, id, foreign.String(), node.ReadOnly) == node.Name
		if !fits && exportErr == nil {
			fits = m.isFrom(ctx, id, export) == nil
		}
		if fits {
			found = append(found, id)
		}
	}
	slices.Sort(known)
	word = strings.ToValidUTF8(word, "?")
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return "", fmt.Errorf("%w that %q alone would name: %s", ErrNoDisk, word, strings.Join(known, ", "))
	case len(known) > 0:
		return "", fmt.Errorf("%w: the machine has no disk %q, but %s", ErrNoDisk, word, strings.Join(known, ", "))
	}
	return "", fmt.Errorf("%w: the machine has no disk %q", ErrNoDisk, word)
}

// disks are those of the machine that were attached by this program: the raw
// node of each by its name. One that is only served yet, or still, has none.
func (m *Machine) disks(ctx context.Context) (map[string]qmp.Node, error) {
	list := map[string]qmp.Node{}
	if m.Server != nil {
		exports, _ := m.Server.Exports(ctx) // disks of other servers need no daemon
		for _, x := range exports {
			if id, ours := strings.CutPrefix(x.Name, ExportName(m.Name, "")); ours {
				list[id] = qmp.Node{}
			}
		}
	}
	plugged, err := qmp.QueryBlock(ctx, m.Monitor)
	for _, d := range plugged {
		if id := d.ID(); d.Inserted != nil && isNodeOf(d.Inserted.Name, id) {
			list[id] = *d.Inserted
		}
	}
	return list, err
}

// export asks the server, if there is one.
func (m *Machine) export(ctx context.Context, name string) (api.Export, error) {
	if m.Server == nil {
		return api.Export{}, ErrNoServer
	}
	return m.Server.Export(ctx, name)
}

// serves reports whether there is an export that was made for the disk.
func (m *Machine) serves(ctx context.Context, id string) bool {
	_, err := m.export(ctx, ExportName(m.Name, id))
	return err == nil
}

// ErrNoDisk is for a disk that a machine does not have.
var ErrNoDisk = errors.New("no such disk")

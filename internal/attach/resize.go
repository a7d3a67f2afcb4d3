package attach

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// ErrSmaller is for disks that would lose what a guest has at their end.
var ErrSmaller = errors.New("a disk does not shrink")

// ErrRigid is for disks whose size QEMU does not let change.
var ErrRigid = errors.New("QEMU does not let a plugged nvme disk grow: detach and attach it")

// ErrFull is for exports that take no further client: that of a disk that is being
// attached, or the second one of a disk, which they have beside the first while the
// two are exchanged.
var ErrFull = errors.New("no place for another client")

// room refuses an export that is full.
func room(x api.Export) error {
	if x.Connections == 0 || x.Clients < x.Connections {
		return nil
	}
	return fmt.Errorf("%w: export %q has %d of at most %d: let it have one more, if only meanwhile (max-connections)", ErrFull, x.Name, x.Clients, x.Connections)
}

// errOldQEMU is for a QEMU without blockdev-reopen.
var errOldQEMU = errors.New("this QEMU cannot exchange a server: it takes 6.1")

// Size is what a disk shall have, in bytes, or what it shall have more.
type Size struct {
	Bytes int64
	More  bool
}

// of is the size for a disk that has old bytes.
func (s Size) of(old int64) (int64, error) {
	switch {
	case s.Bytes < 0 || s.More && s.Bytes > math.MaxInt64-old:
		return 0, fmt.Errorf("%w size %d for a disk of %d bytes", qmp.ErrInvalid, s.Bytes, old)
	case s.More:
		return old + s.Bytes, nil
	case s.Bytes < old:
		return 0, fmt.Errorf("%w: it has %d bytes, more than %d", ErrSmaller, old, s.Bytes)
	}
	return s.Bytes, nil
}

// added is what the disk shall have more; 0 where its size is named.
func (s Size) added() int64 {
	if s.More {
		return s.Bytes
	}
	return 0
}

// growth is a disk that is being grown.
type growth struct {
	*Machine
	id, raw string
	size    int64
	old     string // node of the client that has the old size
	next    qmp.NBD

	link
	by       int64 // bytes that were asked for as what is added; 0: size was named
	asked    bool  // the export was to grow, and may have
	longer   bool  // the export has grown by this plan
	exchange bool  // the machine had another size, next takes the place of old
}

// Resize plans to grow a disk so that its guest sees it: the export first,
// then, as QEMU's NBD clients never learn of another size, a second client in
// place of the first. export is as with Snapshot. A size to be added counts
// from what the export has; an export that has grown stays so.
func (m *Machine) Resize(ctx context.Context, id, export string, want Size) (*Plan, error) {
	x, err := m.exportOf(ctx, id, export)
	if err != nil {
		return nil, err
	}
	size, err := want.of(x.Size)
	if err != nil {
		return nil, err
	}
	g := &growth{Machine: m, id: id, size: size, by: want.added()}
	if err := g.prepare(ctx, x); err != nil {
		return nil, err
	}
	plan := &Plan{Aim: fmt.Sprintf("grow %s of %q from %d to %d bytes", id, m.Name, x.Size, size), Disk: id, Repeat: g.repeat}
	if g.object != "" {
		plan.Steps = append(plan.Steps, g.tryStep())
	}
	plan.Steps = append(plan.Steps, g.exportStep(x.Name))
	plan.Steps = append(plan.Steps, mortal(m.Monitor.Ended, g.clientStep(), g.reopenStep(), g.resizeStep(), g.deleteStep())...)
	return plan, nil
}

// prepare finds the nodes of the disk.
func (g *growth) prepare(ctx context.Context, x api.Export) error {
	raw, err := g.inserted(ctx, g.id)
	if err != nil {
		return err
	}
	schema, err := g.Monitor.Schema(ctx)
	if err != nil {
		return err
	}
	if !schema.HasCommand("blockdev-reopen") {
		return errOldQEMU
	}
	model, err := g.property(ctx, device(g.id), "type")
	if err != nil {
		return err
	}
	if model == string(qmp.NVMe) {
		return ErrRigid
	}
	if g.link, err = g.linkTo(ctx, raw, g.id, x); err != nil {
		return err
	}
	server, err := address(g.uri.Target)
	if err != nil {
		return err
	}
	g.raw = raw.Name
	list, err := nodes(ctx, g.Monitor, g.id)
	if err != nil {
		return err
	}
	if x.Size != g.size || !hasSize(list, g.raw, g.size) {
		if err := room(x); err != nil {
			return err
		}
	}
	g.next = nbd(schema, "", server, g.uri.Export, raw.ReadOnly, lastClient(list, g.raw).wait)
	g.next.TLSCreds, g.next.TLSHostname = g.object, g.creds.hostname
	return g.number(list)
}

// number names the next client, behind the last of the nodes.
func (g *growth) number(list []qmp.Node) (err error) {
	last := lastClient(list, g.raw)
	g.old = last.node
	g.next.Node, err = last.next(g.raw, last.wait)
	return err
}

// tryStep shakes hands with a server that takes TLS only.
func (g *growth) tryStep() Step {
	return Step{
		Name: fmt.Sprintf("try %s of the machine, as object %s", &g.creds, g.object),
		Do: func(ctx context.Context) (bool, error) {
			return false, g.try(ctx, &g.creds, &g.uri)
		},
	}
}

// grown reports whether the machine has the size already.
func (g *growth) grown(ctx context.Context) (bool, error) {
	list, err := nodes(ctx, g.Monitor, g.id)
	return hasSize(list, g.raw, g.size), err
}

// repeat names the size that the disk is to have: what was to be added to it is
// there, and would be added again.
func (g *growth) repeat() string {
	if g.by == 0 || !g.asked {
		return ""
	}
	return fmt.Sprintf("repeat it with the size %d and no plus sign: the disk may be that large by now, and would grow once more", g.size)
}

func (g *growth) exportStep(name string) Step {
	return Step{
		Name:  fmt.Sprintf("grow export %q to %d bytes", name, g.size),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			x, err := g.Server.Export(ctx, name)
			if err != nil || g.by == 0 && x.Size == g.size {
				return false, err
			}
			want := api.Resize{Size: g.size}
			if g.by > 0 { // it may have grown since the plan was made
				g.size, want = x.Size+g.by, api.Resize{By: g.by}
			}
			x, err = g.Server.Resize(ctx, name, want)
			g.asked = made(err)
			if err != nil {
				return false, err
			}
			g.longer = true
			if x.Size < g.size {
				return true, fmt.Errorf("the export has %d bytes", x.Size)
			}
			g.size = x.Size // a disk may end with a whole sector
			return true, nil
		},
	}
}

func (g *growth) clientStep() Step {
	return Step{
		Name: "have the machine connect a second time, as node " + g.next.Node,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			list, err := nodes(ctx, g.Monitor, g.id)
			if err != nil || hasSize(list, g.raw, g.size) && !g.longer { // it may have grown within a sector
				return false, err
			}
			if err := g.number(list); err != nil {
				return false, err
			}
			g.exchange = true
			err = g.next.Add(ctx, g.Monitor)
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return deleteNode(ctx, g.Monitor, g.next.Node) },
	}
}

func (g *growth) reopenStep() Step {
	return Step{
		Name: "put it below node " + g.raw,
		Do: func(ctx context.Context) (bool, error) {
			if !g.exchange {
				return false, nil
			}
			ctx, cancel := steady(ctx)
			defer cancel()
			err := g.below(ctx, g.next.Node)
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error {
			if g.old == "" {
				return errors.New("the first client had no name")
			}
			return g.below(ctx, g.old)
		},
	}
}

func (g *growth) below(ctx context.Context, client string) error {
	return qmp.Raw{Node: g.raw, ReadOnly: g.next.ReadOnly, Discard: g.next.Discard}.Reopen(ctx, g.Monitor, client)
}

// resizeStep has QEMU tell the guest. That the node has the size already says
// nothing of the guest: it has it since it was opened again.
func (g *growth) resizeStep() Step {
	return Step{
		Name:  fmt.Sprintf("tell the guest of %d bytes", g.size),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			size := g.size
			if !g.exchange {
				size = wholeSectors(size)
			}
			if err := qmp.BlockResize(ctx, g.Monitor, g.raw, size); err != nil {
				return errors.Is(err, qmp.ErrUnanswered), err
			}
			done, err := g.grown(ctx)
			if err == nil && !done {
				err = fmt.Errorf("%w: the machine says that the disk has another size", ErrDiffers)
			}
			return g.exchange, err
		},
	}
}

// deleteStep ends the clients that the disk does not use any more.
func (g *growth) deleteStep() Step {
	return Step{
		Name: "end the first connection",
		Do: func(ctx context.Context) (changed bool, err error) {
			ctx, cancel := context.WithTimeout(ctx, limits.AttachCall)
			defer cancel()
			list, err := nodes(ctx, g.Monitor, g.id)
			if err != nil {
				return false, err
			}
			last := lastClient(list, g.raw)
			for _, n := range list {
				if c := clientOf(g.raw, n.Name); c.number == 0 || c == last {
					continue
				}
				if err := deleteNode(ctx, g.Monitor, n.Name); err != nil {
					return changed, err
				}
				changed = true
			}
			return changed, nil
		},
	}
}

// exportOf is the export that a disk of the machine is, or the one that the
// user names, if the machine has its disk. One that is paused is ErrPaused.
func (m *Machine) exportOf(ctx context.Context, id, named string) (x api.Export, err error) {
	if m.Server == nil {
		return x, ErrNoServer
	}
	name := named
	if named == "" {
		name = ExportName(m.Name, id)
	}
	x, err = m.Server.Export(ctx, name)
	if named == "" && hasCode(err, api.CodeNotFound) {
		return x, unnamed(id)
	}
	if err == nil {
		err = m.isFrom(ctx, id, x)
	}
	if err == nil {
		err = goesOn(x)
	}
	return x, err
}

// unnamed is the error of a disk whose export its user must name.
func unnamed(disk string) error {
	return fmt.Errorf("disk %s: %w", disk, ErrUnnamed)
}

// otherExport is the error of a disk that is from no address of the export.
func otherExport(disk string, x api.Export) error {
	return fmt.Errorf("%w: disk %s is not export %q, which is at %s", ErrDiffers, disk, x.Name, strings.Join(x.URIs, " "))
}

// isFrom refuses an export that is not the one behind the disk: the name of the
// raw node tells. One that Attach has made may be left of an earlier disk.
func (m *Machine) isFrom(ctx context.Context, id string, x api.Export) error {
	raw, err := m.inserted(ctx, id)
	if err != nil {
		return err
	}
	if x.Name != ExportName(m.Name, id) {
		_, err = m.linkTo(ctx, raw, id, x)
	} else if !isOwn(raw.Name) {
		err = otherExport(id, x)
	}
	return err
}

// inserted is the raw node of a disk that the machine has by this program.
func (m *Machine) inserted(ctx context.Context, id string) (*qmp.Node, error) {
	d, err := find(ctx, m.Monitor, id)
	if err == nil && (d == nil || d.Inserted == nil || !isNodeOf(d.Inserted.Name, id)) {
		err = fmt.Errorf("%w: the machine has no device %q that was attached by this program", ErrNoDisk, id)
	}
	if err != nil {
		return nil, err
	}
	return d.Inserted, nil
}

// link is how a machine reaches the export behind a disk.
type link struct {
	uri    transport.URI
	object string // with the credentials; "" without TLS
	creds  credentials
}

// linkTo is the way that a disk was attached by, none other that the export may
// have: those may be without TLS, or closed to the machine. An export that the
// disk is not from is refused.
func (m *Machine) linkTo(ctx context.Context, raw *qmp.Node, id string, x api.Export) (l link, err error) {
	if l.uri, err = attachedBy(raw, id, x, false, ""); err == nil {
		return l, nil
	}
	object, kind, unread := m.heldCreds(ctx, id)
	if unread != nil || object == "" {
		return l, errors.Join(unread, err)
	}
	l.object = object
	if l.creds, err = m.readCreds(ctx, object, kind); err != nil {
		return l, err
	}
	l.uri, err = attachedBy(raw, id, x, true, l.creds.identity)
	l.creds.setHostname(&l.uri)
	return l, err
}

// attachedBy is the address of the export that the raw node of a disk is for, of
// those with TLS or of those without. For a disk that was attached as the default
// export of one it fails with errMayBe too.
func attachedBy(raw *qmp.Node, id string, x api.Export, tls bool, identity string) (transport.URI, error) {
	for _, text := range x.URIs {
		uri, _, err := new(Source).remote(text)
		if err != nil || uri.TLS != tls {
			continue
		}
		uri.User = identity
		is := func() bool { return rawNode(isOwn(raw.Name), id, uri.String(), raw.ReadOnly) == raw.Name }
		for _, uri.Export = range named(raw, x.Name) {
			if is() {
				return uri, nil
			}
		}
		if uri.Export = ""; is() {
			return transport.URI{}, errUnnamed(id, x)
		}
	}
	return transport.URI{}, otherExport(id, x)
}

// named are the names that a node may have been given for an export: its own, and
// that with the token that QEMU shows behind it, if it shows one.
func named(n *qmp.Node, export string) []string {
	all := []string{export}
	if _, rest, shown := strings.Cut(n.File, "/"+export+"?"); shown && len(rest) >= limits.TokenDigits {
		with := export + "?" + rest[:limits.TokenDigits]
		if _, token := transport.CutToken(with); token != "" {
			all = append(all, with)
		}
	}
	return all
}

// hasSize tells whether a machine says that a node has the size.
func hasSize(list []qmp.Node, name string, size int64) bool {
	return slices.ContainsFunc(list, func(n qmp.Node) bool {
		return n.Name == name && sectors(n.Image.VirtualSize) == sectors(size)
	})
}

// sectors is a size as QEMU counts it: what it shows of a disk ends with a whole
// sector.
func sectors(size int64) int64 { return (size + 511) / 512 }

// wholeSectors is what a client knows of that shows the size: it may be from
// before the disk has grown within its last sector.
func wholeSectors(size int64) int64 { return size / 512 * 512 }

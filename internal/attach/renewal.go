package attach

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// ErrNodes is for a disk whose nodes are not those that libvirt makes for one of
// an NBD server.
var ErrNodes = errors.New("the nodes of the disk are not those of an NBD disk of libvirt: detach and attach it")

// Names that libvirt gives to the nodes of a disk. 9.0 puts a raw node above the
// client, 11.3 does not: the device uses the client itself.
const (
	rawSuffix    = "-format"
	clientSuffix = "-storage"
)

// renewal puts a new client in the place of the one that libvirt has made for
// a disk: it knows the server's size of today, and waits for a server that is
// lost. In the end it has the name of the first, by which libvirt goes on. A
// second client serves the guest meanwhile.
type renewal struct {
	*Domain
	target    string
	reconnect time.Duration
	resumes   bool                        // without a reconnect delay, that of the last renewal
	size      func() int64                // bytes that the disk must have, once it is known; 0: any
	always    bool                        // whatever the size is
	ready     func(context.Context) error // as that of served

	alias  string           // of the guest's device
	disk   *qmp.BlockDevice // of the guest, as it was found
	raw    qmp.Raw          // without a Node: the device uses the client itself
	client qmp.NBD          // as libvirt has it, with the delay
	prefix string           // of the names of our nodes

	delayName string // of the delay in the domain's metadata
	next      string // node of the second client
	needed    bool
}

func (r *renewal) monitor() *libvirtd.Monitor { return r.Session.Monitor(r.Domain.Domain) }

// prepare finds the nodes of the disk.
func (r *renewal) prepare(ctx context.Context) error {
	x, err := r.Session.Describe(ctx, r.Domain.Domain, false)
	if err != nil {
		return err
	}
	disk := libvirtd.Disk(x, r.target)
	if disk == nil || disk.Alias == nil {
		return fmt.Errorf("%w: the running domain has no disk %q", ErrNoDisk, r.target)
	}
	r.alias = disk.Alias.Name
	if r.disk, err = r.inserted(ctx); err != nil {
		return err
	}
	schema, err := qmp.QuerySchema(ctx, r.monitor())
	if err != nil {
		return err
	}
	if !schema.HasCommand("blockdev-reopen") {
		return errOldQEMU
	}
	return r.describe(ctx, schema, disk)
}

// inserted is the guest's device with its medium.
func (r *renewal) inserted(ctx context.Context) (*qmp.BlockDevice, error) {
	d, err := find(ctx, r.monitor(), r.alias)
	if err == nil && (d == nil || d.Inserted == nil) {
		return nil, fmt.Errorf("%w: QEMU has no disk %q", ErrNoDisk, r.alias)
	}
	return d, err
}

// describe is how the nodes are made again.
func (r *renewal) describe(ctx context.Context, schema *qmp.Schema, disk *libvirtxml.DomainDisk) error {
	uri, top := source(disk), r.disk.Inserted
	server, err := address(uri.Target)
	if err != nil {
		return err
	}
	all, err := qmp.QueryNamedBlockNodes(ctx, r.monitor())
	if err != nil {
		return err
	}
	name, err := r.clientOf(all)
	if err != nil {
		return err
	}
	r.delayName = delayName(r.target, uri)
	if r.resumes && r.reconnect == 0 {
		if r.reconnect, err = r.delay(ctx, r.target, uri); err != nil {
			return err
		}
	}
	passDiscard := disk.Driver != nil && disk.Driver.Discard == "unmap"
	cache := top.Cache
	r.client = nbd(schema, name, server, uri.Export, top.ReadOnly, r.reconnect)
	r.client.Discard, r.client.Cache = passDiscard, &cache
	r.raw = qmp.Raw{ReadOnly: top.ReadOnly, Discard: passDiscard, Cache: &cache, DetectZeroes: top.DetectZeroes}
	if top.Driver == "raw" {
		r.raw.Node = top.Name
	} else {
		r.client.DetectZeroes = top.DetectZeroes
	}
	if uri.TLS {
		if err := r.findCreds(ctx); err != nil {
			return err
		}
		r.client.TLSHostname = disk.Source.Network.TLSHostname
	}
	r.prefix = rawNode(false, r.target, uri.String(), top.ReadOnly)
	r.next, err = lastClient(all, r.prefix).next(r.prefix, r.reconnect)
	return err
}

// clientOf is the name of the client that libvirt has made. The device uses it,
// or a raw node that has the name of the disk in common with it, or, after a
// change that was not finished, a client of ours to the same server.
func (r *renewal) clientOf(all []qmp.Node) (string, error) {
	top := r.disk.Inserted
	name, raw := strings.CutSuffix(top.Name, rawSuffix)
	switch {
	case top.Driver == "raw" && raw:
		return name + clientSuffix, nil
	case top.Driver != "nbd":
		return "", ErrNodes
	case !isNodeOf(top.Name, r.target):
		return top.Name, nil
	}
	for _, n := range all {
		if n.Driver == "nbd" && n.File == top.File && strings.HasSuffix(n.Name, clientSuffix) {
			return n.Name, nil
		}
	}
	return "", ErrNodes
}

// findCreds finds the certificates that libvirt has given its client.
func (r *renewal) findCreds(ctx context.Context) error {
	objects, err := qmp.Objects(ctx, r.monitor())
	if err != nil {
		return err
	}
	r.client.TLSCreds = "obj" + r.client.Node + "_tls0"
	if objects[r.client.TLSCreds] == "" {
		return fmt.Errorf("%w: the machine has no object %s with its certificates", ErrNodes, r.client.TLSCreds)
	}
	return nil
}

// top is the node that the device uses while the client serves it.
func (r *renewal) top(client string) string {
	if r.raw.Node != "" {
		return r.raw.Node
	}
	return client
}

// state is whether libvirt's client is there, how many of ours are, and
// whether the disk has the size.
func (r *renewal) state(ctx context.Context) (first bool, more []qmp.Node, sized bool, err error) {
	all, err := qmp.QueryNamedBlockNodes(ctx, r.monitor())
	for _, n := range all {
		if isNodeOf(n.Name, r.target) {
			more = append(more, n)
		}
	}
	if err != nil {
		return false, nil, false, err
	}
	d, err := r.inserted(ctx)
	if err != nil {
		return false, nil, false, err
	}
	size := r.size()
	return has(all, r.client.Node), more, size == 0 || hasSize(all, d.Inserted.Name, size), nil
}

// needs reports whether the disk needs a new client.
func (r *renewal) needs(ctx context.Context) (bool, error) {
	first, more, sized, err := r.state(ctx)
	return r.always || !first || len(more) > 0 || !sized, err
}

// lookStep finds out whether there is a way, before the export is grown.
func (r *renewal) lookStep(x api.Export) Step {
	return Step{
		Name: fmt.Sprintf("look at the nodes of disk %s, through libvirt's monitor", r.target),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			if err := r.prepare(ctx); err != nil {
				return false, err
			}
			needed, err := r.needs(ctx)
			if err == nil && (needed || x.Size != r.size()) {
				err = room(x)
			}
			return false, err
		},
	}
}

// openStep connects a second time, unless all is as it should be.
func (r *renewal) openStep() Step {
	return Step{
		Name: fmt.Sprintf("have the machine connect to the server of disk %s a second time, through libvirt's monitor", r.target),
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			if err := r.prepare(ctx); err != nil {
				return false, err
			}
			var err error
			if r.needed, err = r.needs(ctx); err != nil || !r.needed {
				return false, err
			}
			if err := r.ready(ctx); err != nil {
				return false, err
			}
			second := r.client
			second.Node = r.next
			err = second.Add(ctx, r.monitor())
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return deleteNode(ctx, r.monitor(), r.next) },
	}
}

// swapStep puts the second client below the disk.
func (r *renewal) swapStep() Step {
	return Step{
		Name: "put it below the disk",
		Do:   func(ctx context.Context) (bool, error) { return r.below(ctx, r.next) },
		Undo: func(ctx context.Context) error {
			_, err := r.below(ctx, r.client.Node)
			return err
		},
	}
}

func (r *renewal) below(ctx context.Context, client string) (bool, error) {
	if !r.needed {
		return false, nil
	}
	ctx, cancel := steady(ctx)
	defer cancel()
	if r.raw.Node != "" {
		err := r.raw.Reopen(ctx, r.monitor(), client)
		return maybe(err), err
	}
	return r.drive(ctx, client)
}

// drive has the device use the client itself. A device with an iothread takes
// only nodes of its thread, and a new client is of the main loop. A raw node
// above what the device uses is of the device's thread, and takes along what is
// put below it.
func (r *renewal) drive(ctx context.Context, client string) (bool, error) {
	list, err := nodes(ctx, r.monitor(), r.target)
	if err != nil {
		return false, err
	}
	carrier := qmp.Raw{Node: r.prefix, ReadOnly: true}
	if !has(list, carrier.Node) { // one is left where an earlier attempt was killed
		d, err := r.inserted(ctx)
		if err == nil {
			err = carrier.Add(ctx, r.monitor(), d.Inserted.Name)
		}
		if err != nil {
			return maybe(err), err
		}
	}
	err = carrier.Reopen(ctx, r.monitor(), client)
	if err == nil {
		err = qmp.SetDrive(ctx, r.monitor(), r.disk, client)
	}
	return true, errors.Join(err, deleteNode(ctx, r.monitor(), carrier.Node))
}

// tellStep has QEMU tell the guest of its size.
func (r *renewal) tellStep() Step {
	return Step{
		Name:  "tell the guest of the size",
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			client, size := r.client.Node, wholeSectors(r.size())
			if r.needed {
				client, size = r.next, r.size()
			}
			if err := qmp.BlockResize(ctx, r.monitor(), r.top(client), size); err != nil {
				return errors.Is(err, qmp.ErrUnanswered), err
			}
			_, _, sized, err := r.state(ctx)
			if err == nil && !sized {
				err = fmt.Errorf("%w: the machine says that the disk has another size", ErrDiffers)
			}
			return r.needed, err
		},
	}
}

// returnStep makes libvirt's client anew.
func (r *renewal) returnStep() Step {
	return Step{
		Name: "connect anew under the name that libvirt knows",
		Do: func(ctx context.Context) (bool, error) {
			if !r.needed {
				return false, nil
			}
			ctx, cancel := steady(ctx)
			defer cancel()
			first, _, _, err := r.state(ctx)
			if err == nil && first {
				err = qmp.BlockdevDel(ctx, r.monitor(), r.client.Node)
			}
			if err != nil {
				return maybe(err), err
			}
			return true, r.client.Add(ctx, r.monitor())
		},
		Undo: func(ctx context.Context) error {
			first, _, _, err := r.state(ctx)
			if err != nil || first {
				return err
			}
			return r.client.Add(ctx, r.monitor())
		},
	}
}

// restoreStep puts libvirt's client below the disk.
func (r *renewal) restoreStep() Step {
	return Step{
		Name: "put it below the disk",
		Do:   func(ctx context.Context) (bool, error) { return r.below(ctx, r.client.Node) },
		Undo: func(ctx context.Context) error {
			list, err := nodes(ctx, r.monitor(), r.target)
			if err != nil || !has(list, r.next) {
				return err // the disk has the client that it shall have
			}
			_, err = r.below(ctx, r.next)
			return err
		},
	}
}

// endStep ends the clients that the disk does not use any more.
func (r *renewal) endStep() Step {
	return Step{
		Name: "end the second connection",
		Do: func(ctx context.Context) (changed bool, err error) {
			if !r.needed {
				return false, nil
			}
			ctx, cancel := steady(ctx)
			defer cancel()
			_, more, _, err := r.state(ctx)
			for _, n := range more {
				if err == nil {
					err = deleteNode(ctx, r.monitor(), n.Name)
					changed = true
				}
			}
			return changed, err
		},
	}
}

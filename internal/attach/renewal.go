package attach

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
	"github.com/vmdiskd/vmdiskd/internal/qmp/libvirtd"
)

// ErrNoRaw is for a libvirt that plugs NBD clients without a node above them.
var ErrNoRaw = errors.New("this libvirt plugs the client itself, which cannot be exchanged while the machine runs: detach and attach the disk")

// Names that libvirt gives to the nodes of a disk.
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
	size      func() int64 // bytes that the disk must have, once it is known; 0: any
	always    bool         // whatever the size is

	raw    qmp.Raw
	client qmp.NBD // as libvirt has it, with the delay
	next   string  // node of the second client
	needed bool
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
	d, err := find(ctx, r.monitor(), disk.Alias.Name)
	switch {
	case err != nil:
		return err
	case d == nil || d.Inserted == nil:
		return fmt.Errorf("%w: QEMU has no disk %q", ErrNoDisk, disk.Alias.Name)
	case d.Inserted.Driver != "raw" || !strings.HasSuffix(d.Inserted.Name, rawSuffix):
		return ErrNoRaw
	}
	commands, err := qmp.Commands(ctx, r.monitor())
	if err != nil {
		return err
	}
	if _, ok := commands["blockdev-reopen"]; !ok {
		return errOldQEMU
	}
	return r.describe(ctx, disk, d.Inserted)
}

// describe is how the nodes are made again.
func (r *renewal) describe(ctx context.Context, disk *libvirtxml.DomainDisk, top *qmp.Node) error {
	uri := source(disk)
	if uri.TLS {
		return fmt.Errorf("%w: a client with TLS has certificates that libvirt holds", ErrLibvirt)
	}
	server, err := address(uri.Target)
	if err != nil {
		return err
	}
	passDiscard := disk.Driver != nil && disk.Driver.Discard == "unmap"
	cache := top.Cache
	r.raw = qmp.Raw{Node: top.Name, ReadOnly: top.ReadOnly, Discard: passDiscard, Cache: &cache, DetectZeroes: top.DetectZeroes}
	r.client = nbd(strings.TrimSuffix(top.Name, rawSuffix)+clientSuffix, server, uri.Export, top.ReadOnly, r.reconnect)
	r.client.Discard, r.client.Cache = passDiscard, &cache
	list, err := nodes(ctx, r.monitor(), r.target)
	if err != nil {
		return err
	}
	prefix := rawNode(false, r.target, uri.String(), top.ReadOnly)
	number, _ := lastClient(list, prefix)
	r.next = clientNode(prefix, number+1)
	return free(number)
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
	size := r.size()
	return has(all, r.client.Node), more, size == 0 || bytesOf(all, r.raw.Node) == size, err
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
			first, more, sized, err := r.state(ctx)
			if r.needed = r.always || !first || len(more) > 0 || !sized; err != nil || !r.needed {
				return false, err
			}
			second := r.client
			second.Node = r.next
			err = qmp.BlockdevAddNBDClient(ctx, r.monitor(), second)
			return maybe(err), err
		},
		Undo: func(ctx context.Context) error { return deleteNode(ctx, r.monitor(), r.target, r.next) },
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
	err := r.raw.Reopen(ctx, r.monitor(), client)
	return maybe(err), err
}

// tellStep has QEMU tell the guest of its size.
func (r *renewal) tellStep() Step {
	return Step{
		Name:  "tell the guest of the size",
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			if err := qmp.BlockResize(ctx, r.monitor(), r.raw.Node, r.size()); err != nil {
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
			return true, qmp.BlockdevAddNBDClient(ctx, r.monitor(), r.client)
		},
		Undo: func(ctx context.Context) error {
			first, _, _, err := r.state(ctx)
			if err != nil || first {
				return err
			}
			return qmp.BlockdevAddNBDClient(ctx, r.monitor(), r.client)
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
			ctx, cancel := context.WithTimeout(ctx, limits.AttachCall)
			defer cancel()
			_, more, _, err := r.state(ctx)
			for _, n := range more {
				if err == nil {
					err = deleteNode(ctx, r.monitor(), r.target, n.Name)
					changed = true
				}
			}
			return changed, err
		},
	}
}

package libvirtd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	libvirt "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// Scope says which of a domain's two states a change is for.
type Scope uint32

// Scopes, to be joined by |.
const (
	Live   Scope = Scope(libvirt.DomainDeviceModifyLive)   // the running machine
	Config Scope = Scope(libvirt.DomainDeviceModifyConfig) // its next start
)

// ErrNotReleased is qmp.ErrNotReleased.
var ErrNotReleased = qmp.ErrNotReleased

// Persistent tells whether a domain has a configuration. A transient one has
// none, and ends with its machine.
func (s *Session) Persistent(ctx context.Context, d Domain) (bool, error) {
	is, err := call(ctx, s, "look for the domain's configuration", func() (int32, error) { return s.l.DomainIsPersistent(d.handle) })
	return is != 0, err
}

// Describe is the domain's description, of the running machine or, with
// config, of its next start. Where one of them is missing the other is described: a
// domain that does not run has no ID.
func (s *Session) Describe(ctx context.Context, d Domain, config bool) (*libvirtxml.Domain, error) {
	const name = "describe domain"
	var flags libvirt.DomainXMLFlags
	if config {
		flags = libvirt.DomainXMLInactive
	}
	text, err := call(ctx, s, name, func() (string, error) { return s.l.DomainGetXMLDesc(d.handle, flags) })
	if err != nil {
		return nil, err
	}
	return description(name, text)
}

// Saved is the description that the domain's next start goes by in place of its
// configuration, as libvirt has saved its guest; nil where it has not.
func (s *Session) Saved(ctx context.Context, d Domain) (*libvirtxml.Domain, error) {
	const name = "describe saved domain"
	saved, err := call(ctx, s, name, func() (int32, error) { return s.l.DomainHasManagedSaveImage(d.handle, 0) })
	if err != nil || saved == 0 {
		return nil, err
	}
	text, err := call(ctx, s, name, func() (string, error) { return s.l.DomainManagedSaveGetXMLDesc(d.handle, 0) })
	if err != nil {
		return nil, err
	}
	return description(name, text)
}

// description reads what the named call has given.
func description(name, text string) (*libvirtxml.Domain, error) {
	if len(text) > limits.DomainXML {
		return nil, fmt.Errorf("%s: %w: %d bytes", name, qmp.ErrProtocol, len(text))
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, qmp.ErrProtocol, err)
	}
	return &x, nil
}

// Disk finds the disk with the target, such as vda, or nil.
func Disk(x *libvirtxml.Domain, target string) *libvirtxml.DomainDisk {
	if x.Devices == nil {
		return nil
	}
	for i := range x.Devices.Disks {
		if t := x.Devices.Disks[i].Target; t != nil && t.Dev == target {
			return &x.Devices.Disks[i]
		}
	}
	return nil
}

// marshal is the disk as XML. Text that XML cannot hold is refused, not
// replaced.
func marshal(disk *libvirtxml.DomainDisk) (string, error) {
	text, err := disk.Marshal()
	if err != nil {
		return "", fmt.Errorf("%w disk: %w", qmp.ErrInvalid, err)
	}
	if strings.ContainsRune(text, '\uFFFD') {
		return "", fmt.Errorf("%w disk: XML cannot hold one of its names", qmp.ErrInvalid)
	}
	return text, nil
}

// AttachDisk adds the disk to each state of the scope. libvirt plugs a disk before
// it saves a configuration: after its refusal of both states the running machine
// may have the disk.
func (s *Session) AttachDisk(ctx context.Context, d Domain, disk *libvirtxml.DomainDisk, scope Scope) error {
	text, err := marshal(disk)
	if err != nil {
		return err
	}
	_, err = call(ctx, s, "attach disk", func() (struct{}, error) {
		return struct{}{}, s.l.DomainAttachDeviceFlags(d.handle, text, uint32(scope))
	})
	return err
}

// DetachDisk removes the disk with the target of disk from each state of the
// scope and waits until the guest has released it, until ctx or, without an
// earlier deadline, limits.QMPUnplug: qmp.ErrNotReleased,
// qmp.ErrUnplugRefused or libvirt's refusal, after which the running machine may
// have the disk no more and the configuration still. libvirt itself waits for 5 s
// and then reports success.
func (s *Session) DetachDisk(ctx context.Context, d Domain, disk *libvirtxml.DomainDisk, scope Scope) error {
	if disk.Target == nil || disk.Target.Dev == "" {
		return fmt.Errorf("%w disk: no target", qmp.ErrInvalid)
	}
	text, err := marshal(disk)
	if err != nil {
		return err
	}
	var changes *Watch
	if scope&Live != 0 {
		if changes, err = s.Watch(ctx, d); err != nil {
			return err
		}
		defer changes.Close()
	}
	_, err = call(ctx, s, "detach disk", func() (struct{}, error) {
		return struct{}{}, s.l.DomainDetachDeviceFlags(d.handle, text, uint32(scope))
	})
	if err != nil || changes == nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, limits.QMPUnplug)
	defer cancel()
	return s.awaitRelease(ctx, wait, changes, d, disk.Target.Dev)
}

// awaitRelease looks for the disk at every event, and as often as
// limits.UnplugPoll, until wait is done.
func (s *Session) awaitRelease(ctx, wait context.Context, changes *Watch, d Domain, target string) error {
	for {
		x, err := s.Describe(ctx, d, false)
		if err != nil {
			return err
		}
		disk := Disk(x, target)
		if disk == nil || x.ID == nil { // without an id the machine does not run any more
			return nil
		}
		poll, cancel := context.WithTimeout(wait, limits.UnplugPoll)
		c, err := changes.Next(poll)
		cancel()
		if err == nil && c.Kind == RemovalFailed && disk.Alias != nil && c.Device == disk.Alias.Name {
			return fmt.Errorf("disk %q: %w", target, qmp.ErrUnplugRefused)
		}
		if wait.Err() != nil {
			return fmt.Errorf("disk %q: %w: %w", target, ErrNotReleased, wait.Err())
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
}

package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// ErrMounted is for a disk that a guest still uses.
var ErrMounted = errors.New("the guest has the disk mounted")

// seen waits until the guest agent shows the disk. A guest that does not say
// so is noted and no error: it may still boot, or have no driver yet.
func (p *plug) seen(ctx context.Context) error {
	status, err := qmp.QueryStatus(ctx, p.Monitor)
	switch {
	case err != nil:
		return err
	case !status.Running:
		p.note("the machine does not run (%s): the guest notices the disk later", status.State)
		return nil
	case p.Agent == nil:
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, limits.AttachSeen)
	defer cancel()
	for {
		there, err := guestHas(wait, p.Agent, p.serial)
		switch {
		case there:
			p.note("the guest has the disk")
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case wait.Err() != nil:
			p.note("the guest does not show the disk after %v", limits.AttachSeen)
			return nil
		case err != nil:
			p.note("the guest could not be asked: %v", err)
			return nil
		}
		pause(wait, limits.AttachPoll)
	}
}

// pause waits for d or until ctx is done.
func pause(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}

// guestHas asks the guest for a disk with the serial number.
func guestHas(ctx context.Context, a qmp.Executor, serial string) (bool, error) {
	const command = "guest-get-disks"
	out, err := a.Execute(ctx, command, nil)
	if err != nil {
		return false, err
	}
	var disks []struct {
		Address struct {
			Serial string `json:"serial"`
		} `json:"address"`
	}
	if err := json.Unmarshal(out, &disks); err != nil || len(disks) > limits.QMPItems {
		return false, fmt.Errorf("%s: %w: %d disks", command, qmp.ErrProtocol, len(disks))
	}
	for _, d := range disks {
		if qmp.IsSerial(d.Address.Serial, serial) {
			return true, nil
		}
	}
	return false, nil
}

// unchecked begins what people are told of a disk that may be mounted.
const unchecked = "QEMU unplugs a mounted disk all the same, and whether this one is mounted could not be checked: "

// unused asks the guest whether it has a file system on the disk. What could
// not be asked is noted.
func (m *Machine) unused(ctx context.Context, id string) error {
	if m.Agent == nil {
		m.note(unchecked + "no guest agent is known")
		return nil
	}
	serial, err := m.property(ctx, device(id), "serial")
	if err != nil {
		return err
	}
	if serial == "" {
		m.note(unchecked + "the device has no serial number")
		return nil
	}
	cut, err := m.property(ctx, device(id), "device_id") // of a SCSI disk: less of it, unless attach has said it
	if err != nil {
		return err
	}
	list, err := qmp.GuestFilesystems(ctx, m.Agent)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		m.note(unchecked+"%v", err)
		return nil
	}
	unknown := false
	for i := range list {
		if list[i].UsesSerial(serial) || list[i].UsesSerial(cut) {
			return fmt.Errorf("%w at %q", ErrMounted, list[i].Mountpoint)
		}
		unknown = unknown || slices.ContainsFunc(list[i].Disks, func(d qmp.GuestDisk) bool { return d.Serial == "" })
	}
	if unknown {
		m.note(unchecked + "the guest knows no serial number of a disk that it has mounted")
	}
	return nil
}

// device is where the machine has what was plugged.
func device(id string) (path string) { return "/machine/peripheral/" + id }

// property asks the machine for a text of an object; empty if there is none.
func (m *Machine) property(ctx context.Context, path, name string) (string, error) {
	out, err := m.Monitor.Execute(ctx, "qom-get", map[string]any{"path": path, "property": name})
	if errors.As(err, new(*qmp.Error)) {
		return "", nil
	}
	var s string
	if err == nil && (json.Unmarshal(out, &s) != nil || len(s) > limits.MaxString) {
		err = fmt.Errorf("qom-get: %w: property %s", qmp.ErrProtocol, name)
	}
	return s, err
}

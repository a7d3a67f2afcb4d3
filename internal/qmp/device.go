package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Model is a kind of disk that a guest sees.
type Model string

// The models that can be plugged.
const (
	VirtIOBlk Model = "virtio-blk-pci"
	SCSIDisk  Model = "scsi-hd"
	NVMe      Model = "nvme"
)

// ErrorPolicy is what QEMU does when the server reports an error.
type ErrorPolicy string

// Policies. With PolicyStop the machine pauses. The zero value is QEMU's
// default: reads are reported, and a full disk stops the machine.
const (
	PolicyReport ErrorPolicy = "report"
	PolicyStop   ErrorPolicy = "stop"
)

// Device is a disk to be plugged.
type Device struct {
	Model  Model
	ID     string // of the device
	Node   string // the block node
	Bus    string // of a Place or a Target
	Slot   int    // PCI slot of Bus, 0 where the bus has only one
	Target int    // SCSI target of Bus
	// Serial is printable ASCII within the model's bound in limits. NVMe
	// needs one.
	Serial string
	// ReadError and WriteError have no meaning for NVMe.
	ReadError, WriteError ErrorPolicy
}

// options is the arguments of device_add, each of the type that QEMU's
// property has: from 9.2 on it takes no strings for numbers.
func (d *Device) options() (map[string]any, error) {
	if err := errors.Join(checkID("device", d.ID), checkNode(d.Node), CheckSerial(d.Model, d.Serial)); err != nil {
		return nil, err
	}
	if len(d.Bus) > limits.QMPName || d.Slot < 0 || d.Slot >= limits.PCISlots || d.Target < 0 || d.Target >= limits.SCSITargets {
		return nil, fmt.Errorf("%w place of device %q: bus %.40q, slot %d, target %d", ErrInvalid, d.ID, d.Bus, d.Slot, d.Target)
	}
	o := map[string]any{"driver": string(d.Model), "id": d.ID, "drive": d.Node}
	if d.Bus != "" {
		o["bus"] = d.Bus
	}
	if d.Serial != "" {
		o["serial"] = d.Serial
	}
	if d.Model == SCSIDisk {
		o["scsi-id"], o["lun"] = d.Target, 0
		if len(d.Serial) > limits.SCSIDeviceID {
			o["device_id"] = d.Serial // by which guests know the disk
		}
	} else if d.Slot > 0 {
		o["addr"] = strconv.FormatInt(int64(d.Slot), 16)
	}
	if d.Model == NVMe {
		return o, nil
	}
	if d.ReadError != "" {
		o["rerror"] = string(d.ReadError)
	}
	if d.WriteError != "" {
		o["werror"] = string(d.WriteError)
	}
	return o, nil
}

// CheckSerial holds a serial number to what disks of the model take.
func CheckSerial(m Model, serial string) error {
	longest, ok := map[Model]int{VirtIOBlk: limits.VirtIOSerial, SCSIDisk: limits.SCSISerial, NVMe: limits.NVMeSerial}[m]
	if !ok {
		return fmt.Errorf("%w device model %q", ErrInvalid, string(m))
	}
	odd := strings.IndexFunc(serial, func(c rune) bool { return c < ' ' || c > '~' }) >= 0
	if odd || len(serial) > longest || serial == "" && m == NVMe {
		return fmt.Errorf("%w serial number of a %s: %q: printable ASCII, at most %d", ErrInvalid, m, serial, longest)
	}
	return nil
}

// DeviceAdd plugs a disk. The guest notices later.
func DeviceAdd(ctx context.Context, x Executor, d Device) error {
	options, err := d.options()
	if err != nil {
		return err
	}
	return do(ctx, x, "device_add", options)
}

// DevicePresent reports whether the machine has the device with the id.
func DevicePresent(ctx context.Context, x Executor, id string) (bool, error) {
	items, err := qomList(ctx, x, peripheral)
	if err != nil {
		return false, err
	}
	for _, i := range items {
		if i.Name == id && strings.HasPrefix(i.Type, "child<") {
			return true, nil
		}
	}
	return false, nil
}

var (
	// ErrUnplugRefused is for a guest that said no.
	ErrUnplugRefused = errors.New("the guest refuses to release the device")

	// ErrNotReleased is for a guest that said nothing in time. The request
	// stays with the guest: the device may go at any later moment, a reset
	// of the machine included. No property of a machine tells of it, seen with
	// QEMU 7.2.
	ErrNotReleased = errors.New("the guest has not released the device, and the request stays: it may go at any time, a reset included")
)

// Unplug asks the guest to release a device and waits until it is gone, until
// ctx or, without an earlier deadline, limits.QMPUnplug: ErrNotReleased,
// ErrUnplugRefused, or QEMU's refusal, class DeviceNotFound for a device that
// it does not have. While an earlier request is still with the guest QEMU
// refuses another with ClassGeneric: AwaitUnplug waits for that one.
func (m *Monitor) Unplug(ctx context.Context, id string) error {
	return m.unplug(ctx, id, func(ctx context.Context) error {
		return do(ctx, m, "device_del", map[string]any{"id": id})
	})
}

// AwaitUnplug waits like Unplug for a device that the guest was asked to
// release before. One that is gone already is no error and costs two
// limits.UnplugPoll.
func (m *Monitor) AwaitUnplug(ctx context.Context, id string) error {
	return m.unplug(ctx, id, func(context.Context) error { return nil })
}

// errGone is for a device that is not there any more.
var errGone = errors.New("device gone")

// unplug waits for the device to go after request, which says errGone if it
// has.
func (m *Monitor) unplug(ctx context.Context, id string, request func(context.Context) error) error {
	if err := checkID("device", id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limits.QMPUnplug)
	defer cancel()
	events, err := m.Subscribe() // before the request: no event is missed
	if err != nil {
		return err
	}
	defer events.Close()
	err = request(ctx)
	for absences := 0; err == nil; {
		err = m.awaitUnplug(ctx, events, id)
		if err == nil {
			// The event may have been lost among others. The device leaves
			// the tree a moment before it releases its block node, which the
			// event comes after: once absent, it has another poll's time.
			if err = m.absent(ctx, id); errors.Is(err, errGone) && absences == 0 {
				absences, err = 1, nil
			}
		}
		if ctx.Err() != nil && m.Err() == nil && !errors.Is(err, errGone) {
			return fmt.Errorf("device %q: %w: %w", id, ErrNotReleased, ctx.Err())
		}
	}
	if errors.Is(err, errGone) {
		return nil
	}
	return fmt.Errorf("device %q: %w", id, err)
}

// absent is errGone for a device that is not there, nil for one that is, or of
// which QEMU says nothing yet: it waits for the device's requests, of which those
// to a lost server take as long as its reconnect delay.
func (m *Monitor) absent(ctx context.Context, id string) error {
	present, err := DevicePresent(ctx, m, id)
	switch {
	case err == nil && !present:
		return errGone
	case errors.Is(err, ErrUnanswered) && m.Err() == nil:
		return ctx.Err()
	}
	return err
}

// awaitUnplug waits for an event about the device for limits.UnplugPoll: it is
// errGone, ErrUnplugRefused or, if there is none, nil.
func (m *Monitor) awaitUnplug(ctx context.Context, events *Subscription, id string) error {
	wait, cancel := context.WithTimeout(ctx, limits.UnplugPoll)
	defer cancel()
	for {
		e, err := events.Next(wait)
		if err != nil {
			if wait.Err() != nil && m.Err() == nil {
				return ctx.Err()
			}
			return err
		}
		var data struct {
			Device string `json:"device"`
		}
		if json.Unmarshal(e.Data, &data) != nil || data.Device != id {
			continue
		}
		switch e.Name {
		case "DEVICE_DELETED":
			return errGone
		case "DEVICE_UNPLUG_GUEST_ERROR":
			return ErrUnplugRefused
		}
	}
}

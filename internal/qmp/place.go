package qmp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Containers of QEMU's object tree.
const (
	peripheral     = "/machine/peripheral"
	peripheralAnon = "/machine/peripheral-anon"
	i440fx         = "/machine/i440fx"
)

var (
	// ErrNoPCIPlace is for a machine with nowhere to plug a PCI device.
	ErrNoPCIPlace = errors.New("no free hot-plug PCI port: start QEMU with more -device pcie-root-port,id=NAME,chassis=N, one per disk (libvirt: <controller type='pci' model='pcie-root-port'/>)")

	// ErrNoSCSIPlace is for a machine with nowhere to plug a SCSI disk.
	ErrNoSCSIPlace = errors.New("no virtio-scsi controller with a free target: start QEMU with -device virtio-scsi-pci,id=NAME (libvirt: <controller type='scsi' model='virtio-scsi'/>)")
)

// Place is where a PCI device can be plugged.
type Place struct {
	Bus  string
	Slot int // 0 where the bus, a PCIe port's, has only one
}

// Target is where a SCSI disk can be plugged.
type Target struct {
	Bus    string
	Target int
}

// FreePCI lists the free PCIe ports, then the free slots of PCI buses, in the
// order of their names. Another client may take a place meanwhile: then
// device_add is refused and the next one will do. None is ErrNoPCIPlace.
//
// The places come from QEMU's object tree: query-pci shows nothing behind
// bridges before the firmware has numbered the buses.
func FreePCI(ctx context.Context, x Executor) ([]Place, error) {
	w := walk{x: x}
	buses, err := w.buses(ctx, "PCIE", "PCI")
	if err != nil {
		return nil, err
	}
	var ports, slots []Place
	for _, b := range buses {
		children, err := w.children(ctx, b.path)
		if err != nil {
			return nil, err
		}
		switch {
		case !b.plug:
		case b.kind == "PCIE":
			if len(children) == 0 {
				ports = append(ports, Place{Bus: b.name})
			}
		default:
			free, err := w.freeSlots(ctx, b, children)
			if err != nil {
				return nil, err
			}
			slots = append(slots, free...)
		}
	}
	if len(ports)+len(slots) == 0 {
		return nil, ErrNoPCIPlace
	}
	return append(ports, slots...), nil
}

// FreeSCSI lists the free targets of virtio-scsi controllers: the first of each
// controller in the order of their names, then the second of each, and so on. As
// with FreePCI, another client may take one meanwhile. None is ErrNoSCSIPlace.
func FreeSCSI(ctx context.Context, x Executor) ([]Target, error) {
	w := walk{x: x}
	buses, err := w.buses(ctx, "SCSI")
	if err != nil {
		return nil, err
	}
	var perBus [][]Target
	for _, b := range buses {
		if !b.plug || !b.virtio {
			continue
		}
		children, err := w.children(ctx, b.path)
		if err != nil {
			return nil, err
		}
		taken, err := w.numbers(ctx, b.path, children, "scsi-id")
		if err != nil {
			return nil, err
		}
		var list []Target
		for t := range limits.SCSITargets {
			if !slices.Contains(taken, int64(t)) {
				list = append(list, Target{Bus: b.name, Target: t})
			}
		}
		perBus = append(perBus, list)
	}
	var free []Target
	for nth := range limits.SCSITargets {
		for _, list := range perBus {
			if nth < len(list) {
				free = append(free, list[nth])
			}
		}
	}
	if len(free) == 0 {
		return nil, ErrNoSCSIPlace
	}
	return free, nil
}

// walk is one search through the object tree. A tree that needs more than
// limits.QMPLookups questions is not QEMU's.
type walk struct {
	x     Executor
	asked int
}

// bus is a bus in the object tree.
type bus struct {
	path, name, kind string
	virtio           bool // belongs to a virtio device
	plug             bool // devices can be plugged while the machine runs
}

// item is an entry of an object.
type item struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

// child is the type of the object that the entry holds.
func (i item) child() (string, bool) {
	kind, ok := strings.CutPrefix(i.Type, "child<")
	return strings.TrimSuffix(kind, ">"), ok
}

func (w *walk) ask() error {
	if w.asked++; w.asked > limits.QMPLookups {
		return fmt.Errorf("%w: a tree of more than %d objects", ErrProtocol, limits.QMPLookups)
	}
	return nil
}

func (w *walk) list(ctx context.Context, path string) ([]item, error) {
	if err := w.ask(); err != nil {
		return nil, err
	}
	return qomList(ctx, w.x, path)
}

// qomList lists the entries of the object at path.
func qomList(ctx context.Context, x Executor, path string) ([]item, error) {
	items, err := ask[[]item](ctx, x, "qom-list", map[string]any{"path": path})
	if err != nil {
		return nil, err
	}
	if len(items) > limits.QMPItems {
		return nil, fmt.Errorf("qom-list: %w: %d entries", ErrProtocol, len(items))
	}
	for _, i := range items {
		if len(i.Name) > limits.QMPName || len(i.Type) > limits.QMPName {
			return nil, fmt.Errorf("qom-list: %w: an entry named %.40q", ErrProtocol, i.Name)
		}
	}
	slices.SortFunc(items, func(a, b item) int { return byNumber(a.Name, b.Name) })
	return items, nil
}

// Objects are the objects that the machine was given by object-add or its
// command line, at most limits.QMPItems: the type of each by its name.
func Objects(ctx context.Context, x Executor) (map[string]string, error) {
	items, err := qomList(ctx, x, "/objects")
	types := map[string]string{}
	for _, i := range items {
		if kind, ok := i.child(); ok {
			types[i.Name] = kind
		}
	}
	return types, err
}

// byNumber compares names so that rp2 is before rp10.
func byNumber(a, b string) int {
	pa, pb := strings.TrimRight(a, "0123456789"), strings.TrimRight(b, "0123456789")
	if pa == pb && len(a) != len(b) {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

func (w *walk) get(ctx context.Context, path, property string, v any) error {
	if err := w.ask(); err != nil {
		return err
	}
	raw, err := w.x.Execute(ctx, "qom-get", map[string]any{"path": path, "property": property})
	if err != nil {
		return err
	}
	return decode("qom-get", raw, v)
}

// buses lists the buses of the kinds that belong to devices, and the root bus
// of machines where it can be plugged.
func (w *walk) buses(ctx context.Context, kinds ...string) ([]bus, error) {
	var found []bus
	for _, container := range []string{peripheral, peripheralAnon, i440fx} {
		items, err := w.list(ctx, container)
		if container == i440fx {
			if HasClass(err, ClassDeviceNotFound) {
				continue // another machine
			}
			if err == nil {
				err = w.ownBuses(ctx, container, "", items, kinds, &found)
			}
			items = nil
		}
		if err != nil {
			return nil, err
		}
		for _, i := range items {
			kind, ok := i.child()
			if !ok {
				continue
			}
			if strings.Contains(kind, "upstream") {
				continue // a switch's inner bus takes downstream ports only
			}
			path := container + "/" + i.Name
			entries, err := w.list(ctx, path)
			if gone(err) {
				continue
			}
			if err == nil {
				err = w.ownBuses(ctx, path, kind, entries, kinds, &found)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	var usable []bus
	for _, b := range found {
		if named(found, b) {
			usable = append(usable, b)
		}
	}
	return usable, nil
}

// named reports whether device_add finds the bus by its name alone. QEMU calls
// the bus of a port without id pcie.0 too, like the root.
func named(all []bus, b bus) bool {
	if (b.name == "pcie.0" || b.name == "pci.0") && !strings.HasPrefix(b.path, i440fx) {
		return false
	}
	same := 0
	for _, other := range all {
		if other.name == b.name {
			same++
		}
	}
	return same == 1
}

// ownBuses adds the buses among the entries of a device, and for SCSI those of
// the virtio device within it.
func (w *walk) ownBuses(ctx context.Context, path, device string, entries []item, kinds []string, found *[]bus) error {
	for _, e := range entries {
		kind, ok := e.child()
		at := path + "/" + e.Name
		switch {
		case ok && slices.Contains(kinds, kind):
			b := bus{path: at, name: e.Name, kind: kind, virtio: strings.HasPrefix(device, "virtio-scsi")}
			var err error
			if b.plug, err = w.pluggable(ctx, path, at); err != nil {
				return err
			}
			*found = append(*found, b)
		case ok && e.Name == "virtio-backend" && strings.HasSuffix(device, "-pci") && slices.Contains(kinds, "SCSI"):
			inner, err := w.list(ctx, at)
			if err == nil {
				err = w.ownBuses(ctx, at, kind, inner, kinds, found)
			}
			if err != nil && !gone(err) {
				return err
			}
		}
	}
	return nil
}

// pluggable reports whether devices can be plugged into the bus at a path of
// the device at another: the bus has a handler for it, and a port was not told
// to be without (hotplug=off).
func (w *walk) pluggable(ctx context.Context, device, bus string) (bool, error) {
	var handler string
	err := w.get(ctx, bus, "hotplug-handler", &handler)
	if gone(err) || err == nil && handler == "" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	on := true
	if err := w.get(ctx, device, "hotplug", &on); err != nil && !HasClass(err, ClassGeneric) && !gone(err) {
		return false, err // any other device than a port has no such property
	}
	return on, nil
}

// gone is an object that was removed since it was listed.
func gone(err error) bool { return HasClass(err, ClassDeviceNotFound) }

// children are the names of the links from a bus to its devices.
func (w *walk) children(ctx context.Context, path string) ([]string, error) {
	items, err := w.list(ctx, path)
	if gone(err) {
		return nil, nil
	}
	var names []string
	for _, i := range items {
		if strings.HasPrefix(i.Name, "child[") && strings.HasPrefix(i.Type, "link<") {
			names = append(names, i.Name)
		}
	}
	return names, err
}

// numbers reads a property of each device of a bus.
func (w *walk) numbers(ctx context.Context, path string, children []string, property string) ([]int64, error) {
	var out []int64
	for _, c := range children {
		var n int64
		err := w.get(ctx, path+"/"+c, property, &n)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

// freeSlots lists the slots without a device. Slot 0 is the bridge's own.
func (w *walk) freeSlots(ctx context.Context, b bus, children []string) ([]Place, error) {
	devfns, err := w.numbers(ctx, b.path, children, "addr")
	if err != nil {
		return nil, err
	}
	taken := map[int64]bool{}
	for _, d := range devfns {
		taken[d>>3] = true
	}
	var free []Place
	for s := 1; s < limits.PCISlots; s++ {
		if !taken[int64(s)] {
			free = append(free, Place{Bus: b.name, Slot: s})
		}
	}
	return free, nil
}

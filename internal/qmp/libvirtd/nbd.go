package libvirtd

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// NBDDisk is a disk that QEMU gets from an NBD server. libvirt neither gives
// the socket to QEMU's user nor labels it: the server must.
type NBDDisk struct {
	Socket string // path of a Unix socket, or Host and Port
	Host   string
	Port   uint16
	Export string

	Target string // name of the disk in the domain, such as vda
	Bus    string // "virtio", "scsi" or another of libvirt's
	Serial string

	// Reconnect is how long QEMU waits for a lost server, rounded up to
	// seconds; see ReconnectDelay.
	Reconnect time.Duration
	ReadOnly  bool
	Discard   bool
	TLS       bool // of a host, with the certificates that qemu.conf names; else none, whatever qemu.conf says
}

// Element is the disk for a domain's description. Errors are qmp.ErrInvalid.
func (n *NBDDisk) Element() (*libvirtxml.DomainDisk, error) {
	var host libvirtxml.DomainDiskSourceHost
	switch {
	case n.Socket != "" && n.Host == "" && len(n.Socket) <= limits.QEMUSocketPath:
		host.Transport, host.Socket = "unix", n.Socket
	case n.Socket == "" && n.Host != "" && n.Port != 0 && len(n.Host) <= limits.QMPName:
		host.Transport, host.Name, host.Port = "tcp", n.Host, strconv.Itoa(int(n.Port))
	default:
		return nil, fmt.Errorf("%w disk: socket %.200q, host %.200q, port %d: a socket's path of at most %d bytes, or a host and a port", qmp.ErrInvalid, n.Socket, n.Host, n.Port, limits.QEMUSocketPath)
	}
	if n.Target == "" || n.Bus == "" || len(n.Export) > limits.MaxString || n.Reconnect < 0 || n.Reconnect > limits.NBDReconnect {
		return nil, fmt.Errorf("%w disk: target %.40q, bus %.40q, reconnect %v, export of %d bytes", qmp.ErrInvalid, n.Target, n.Bus, n.Reconnect, len(n.Export))
	}
	network := &libvirtxml.DomainDiskSourceNetwork{Protocol: "nbd", Name: n.Export, Hosts: []libvirtxml.DomainDiskSourceHost{host}}
	network.TLS = "no" // what is not said is nbd_tls of qemu.conf, also for a socket
	if n.TLS {
		if n.Host == "" {
			return nil, fmt.Errorf("%w disk: TLS is for a host and a port", qmp.ErrInvalid)
		}
		network.TLS = "yes"
	}
	if n.Reconnect > 0 {
		seconds := int64((n.Reconnect + time.Second - 1) / time.Second)
		network.Reconnect = &libvirtxml.DomainDiskSourceNetworkReconnect{Delay: strconv.FormatInt(seconds, 10)}
	}
	disk := &libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: "raw", Cache: "none"},
		Source: &libvirtxml.DomainDiskSource{Network: network},
		Target: &libvirtxml.DomainDiskTarget{Dev: n.Target, Bus: n.Bus},
		Serial: n.Serial,
	}
	if n.Discard {
		disk.Driver.Discard = "unmap"
	}
	if n.ReadOnly {
		disk.ReadOnly = &libvirtxml.DomainDiskReadOnly{}
	}
	_, err := marshal(disk)
	return disk, err
}

// ReconnectDelay is what a described disk waits for a lost server, 0 for one
// that does not. libvirt before 9.2 drops the element without a word: read it
// back after AttachDisk.
func ReconnectDelay(disk *libvirtxml.DomainDisk) time.Duration {
	if disk.Source == nil || disk.Source.Network == nil || disk.Source.Network.Reconnect == nil {
		return 0
	}
	seconds, err := strconv.ParseInt(disk.Source.Network.Reconnect.Delay, 10, 32)
	if err != nil || seconds < 0 {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// prefixes of target names by bus.
var prefixes = map[string]string{"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd"}

// FreeTarget is the first target name of the bus that none of the
// descriptions, of the running machine and of its next start, has in use.
func FreeTarget(bus string, descriptions ...*libvirtxml.Domain) (string, error) {
	prefix, ok := prefixes[bus]
	if !ok {
		return "", fmt.Errorf("%w bus %.40q", qmp.ErrInvalid, bus)
	}
next:
	for i := range limits.DiskTargets {
		target := prefix + letters(i)
		for _, x := range descriptions {
			if Disk(x, target) != nil {
				continue next
			}
		}
		return target, nil
	}
	return "", fmt.Errorf("%w: %d disks on bus %s", qmp.ErrTooMany, limits.DiskTargets, bus)
}

// IsTarget tells names that FreeTarget may give.
func IsTarget(name string) bool {
	for _, prefix := range prefixes {
		if rest, ok := strings.CutPrefix(name, prefix); ok && rest != "" && strings.Trim(rest, "abcdefghijklmnopqrstuvwxyz") == "" {
			return true
		}
	}
	return false
}

// letters counts a to z, aa to zz and on.
func letters(i int) string {
	if i < 26 {
		return string(rune('a' + i))
	}
	return letters(i/26-1) + letters(i%26)
}

package limits

import "time"

// What a disk that is plugged into a guest may ask of QEMU.
const (
	// NBDOpen bounds open-timeout: blockdev-add answers after it, within
	// QMPChange.
	NBDOpen = 20 * time.Second

	// NBDReconnect bounds reconnect-delay, for which a guest's requests wait.
	NBDReconnect = 24 * time.Hour

	// QEMUSocketPath is the longest path of a Unix socket that QEMU takes.
	QEMUSocketPath = 107

	// VirtIOSerial, SCSISerial and NVMeSerial are the longest serial numbers
	// of the device models (VIRTIO_BLK_ID_BYTES; QEMU's scsi-disk cuts at 36;
	// NVMe base specification, "Serial Number").
	VirtIOSerial = 20
	SCSISerial   = 36
	NVMeSerial   = 20

	// SCSIDeviceID is where scsi-disk cuts a serial number off to make the
	// identifier that udev goes by, unless that is given.
	SCSIDeviceID = 20

	// SCSITargets is the number of targets of a virtio-scsi controller
	// (VIRTIO_SCSI_MAX_TARGET with QEMU).
	SCSITargets = 256

	// DiskTargets bounds the disks of one domain on one kind of bus: names of
	// up to two letters.
	DiskTargets = 26 + 26*26

	// PCISlots is the number of slots of a conventional PCI bus.
	PCISlots = 32

	// UnplugPoll is how often a device that is being unplugged is looked
	// for, should the event be lost.
	UnplugPoll = time.Second
)

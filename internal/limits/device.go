package limits

import "time"

// Devices of the kernel's nbd driver.
const (
	// DeviceIndex is the highest number of a device: the driver's own bound
	// without partitions (MINORBITS in the kernel).
	DeviceIndex = 1<<20 - 1

	// DeviceBlock is the largest logical block in bytes: a page.
	DeviceBlock = 4096

	// DeviceSockets bounds the connections of one device. Four saturate a
	// Unix socket; the driver has a thread and a queue for each.
	DeviceSockets = 16

	// Backend bounds the text by which the driver tells who has attached a
	// device: sysfs shows a page.
	Backend = 2048

	// DeviceURI bounds the URI that a process is told to attach, in bytes: that
	// of an argument (MAX_ARG_STRLEN of Linux).
	DeviceURI = 128 << 10

	// SysfsFile bounds a file of sysfs: it shows at most a page.
	SysfsFile = 4096

	// DeviceTimeout is how long a request to the server may take before its
	// connection counts as dead, and DeviceGrace how long requests wait for
	// a new connection before they fail. Together they stay below the 120 s
	// after which the kernel reports a hung task.
	DeviceTimeout = 30 * time.Second
	DeviceGrace   = 60 * time.Second

	// DeviceTimeMost bounds both when they are chosen.
	DeviceTimeMost = 30 * 24 * time.Hour

	// DevicePoll is how often the size of the export is asked for.
	DevicePoll = 10 * time.Second

	// DevicePollLeast bounds that: each costs the server a handshake.
	DevicePollLeast = 100 * time.Millisecond

	// DeviceRetryLeast and DeviceRetryMost bound the pause before a lost
	// server is asked again.
	DeviceRetryLeast = 50 * time.Millisecond
	DeviceRetryMost  = 2 * time.Second

	// DeviceTick is how often a keeper looks whether its device is still
	// attached and its connections live: the kernel's message of a dead one
	// may be lost.
	DeviceTick = time.Second

	// DeviceGone is how long a detached device may take to let go of its
	// connections.
	DeviceGone = 10 * time.Second

	// RelayBuffer is the buffer of one direction of a relay: a request and
	// its data of the kernel's usual size.
	RelayBuffer = 256 << 10

	// SwapRequests and SwapRequestKiB bound what a swap device has in
	// flight: together they fit the buffer of a Unix socket, so that no
	// reply waits for memory that swapping has to give first.
	SwapRequests   = 4
	SwapRequestKiB = 32

	// SwapTable bounds what is read of /proc/swaps: the kernel has room for
	// 32 areas, whose paths may be long.
	SwapTable = 1 << 20
)

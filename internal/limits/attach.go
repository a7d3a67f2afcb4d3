package limits

import "time"

// Plans of vmdiskctl.
const (
	// AttachUndo is how long taking back one step may take: a guest that has
	// to release the device that it has just been given, or a command that
	// waits behind blockdev-add.
	AttachUndo = QMPUnplug + 5*time.Second

	// AttachRelease is how long ending a state that must not last may take: a
	// guest agent answers nothing while it freezes, and one that was given up
	// after AgentReply may take as long again.
	AttachRelease = 2 * AgentReply

	// AttachSeen is how long a guest with an agent has to show a new disk.
	// Linux takes below a tenth of a second.
	AttachSeen = 10 * time.Second

	// AttachInUse is how long QEMU may call a node in use after its device is
	// gone: a few milliseconds, or as long as a request in flight takes.
	AttachInUse = 5 * time.Second

	// AttachPoll is how often either is asked for.
	AttachPoll = 100 * time.Millisecond

	// AttachReconnect is how long a guest's requests wait for a server that
	// is lost, unless the user has another idea: a restart takes a second,
	// a host's upgrade some more.
	AttachReconnect = time.Minute

	// AttachOpen is how long blockdev-add tries to connect to a server that
	// has just told where it listens.
	AttachOpen = 5 * time.Second

	// AttachPlaces bounds the places that are tried for a device when others
	// take them at the same time.
	AttachPlaces = 8

	// AttachClients bounds the number in the name of a node's NBD client,
	// which counts the times that the disk has grown: what fits NodeName. In
	// that of one with a delay of its own two or three digits fit.
	AttachClients = 99_999

	// AttachCall is how long one request to a server or a machine may take
	// that is not interrupted, so that its outcome is known: an image on slow
	// storage takes a minute to open.
	AttachCall = 90 * time.Second
)

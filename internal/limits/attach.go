package limits

import "time"

// Plans of vmdiskctl.
const (
	// AttachUndo is how long taking back one step may take: a guest that has
	// to release the device that it has just been given, or a command that
	// waits behind blockdev-add.
	AttachUndo = QMPUnplug + 5*time.Second

	// AttachSeen is how long a guest with an agent has to show a new disk.
	// Linux takes below a tenth of a second.
	AttachSeen = 10 * time.Second

	// AttachPoll is how often the agent is asked for it.
	AttachPoll = 200 * time.Millisecond

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
)

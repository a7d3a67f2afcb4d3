package limits

import "time"

// What watching the program may cost.
const (
	// EventQueue bounds the events that wait for one subscriber: a burst of
	// every connection coming back after a restart, at some 300 bytes each.
	EventQueue = 1024

	// EventSubscribers bounds who listens to events at a time: an event is
	// copied to each.
	EventSubscribers = 32

	// EventsPerUser bounds those of one user who may change things: the others of
	// its connections are for what it wants to do.
	EventsPerUser = ControlConnsPerUID / 2

	// EventReaders bounds those among them who may only read, and
	// EventsPerReader those of one user: the others are for who may change
	// things.
	EventReaders    = EventSubscribers / 2
	EventsPerReader = EventReaders / 2

	// EventText bounds the text of an event, in bytes: a line of it, in which each
	// byte may be escaped, fits into ControlEventLine with the name of an export.
	EventText = 4 << 10

	// ReloadTold bounds the changes of a reload that its event names.
	ReloadTold = 20

	// AcceptFailures is how often a listener that cannot accept is said to: a
	// client that holds all descriptors must not fill the journal.
	AcceptFailures = time.Minute

	// EventBurst is the number of events of one kind that a connection may
	// cause per EventInterval, and of lines of one text in the log about one
	// export, image or peer; those in excess are counted.
	EventBurst    = 10
	EventInterval = time.Second

	// LogKinds bounds the texts, each with what it is about, that the log counts
	// apart; all others share one count. LogSubject bounds the name of what a line
	// is about: a path is not longer.
	LogKinds   = 1024
	LogSubject = 4 << 10

	// StuckFactor times the threshold of slow requests is the age at which a
	// request counts as stuck.
	StuckFactor = 10

	// Notify is how long the service manager may leave its socket full before
	// a message to it is given up.
	Notify = time.Second

	// NotifyStatus bounds the status text that the service manager is told:
	// it shows one line.
	NotifyStatus = 512

	// PassedName bounds the name of a socket that the service manager hands
	// over, as systemd does (FDNAME= of sd_notify(3)).
	PassedName = 255

	// KeptSockets bounds how many listeners wait in the service manager while
	// the daemon starts again; FileDescriptorStoreMax= of the units is no more.
	KeptSockets = 256

	// Forgets is how long a listener waits for its address while the service
	// manager, which was told to forget the socket before it, still has that.
	Forgets = 5 * time.Second

	// JournalField bounds a field of a log entry for the journal, whose own
	// bound is far higher; JournalFields bounds how many an entry has.
	JournalField  = 32 << 10
	JournalFields = 64
)

// A line of an event has some words beside these.
var _ [ControlEventLine - 6*(MaxString+EventText) - 1024]struct{}

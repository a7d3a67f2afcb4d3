package limits

// Bounds of what passes from stage 0 to the worker.
const (
	// Handover is the largest description, in bytes: a configuration file at
	// its largest, in base64, and some hundred bytes for each descriptor that a
	// process can have.
	Handover = 64 << 20

	// HandoverProcs is more CPUs than Linux can have.
	HandoverProcs = 1 << 16

	// HandoverSockets is more sockets than systemd passes to a service: its own
	// bound is the 512 of FileDescriptorStoreMax= and some of Sockets=.
	HandoverSockets = 4096
)

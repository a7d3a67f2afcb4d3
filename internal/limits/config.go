package limits

import "time"

// What the configuration, and what is said by the control API, may cost.
const (
	// ConfigFile bounds a configuration file: 10000 exports with a few hundred
	// bytes each.
	ConfigFile = 4 << 20

	// ConfigProblems bounds the problems of a configuration that are named:
	// more than anybody mends at once.
	ConfigProblems = 100

	// ConfigExports bounds the exports of a service: as many as a client can
	// list.
	ConfigExports = MaxListed

	// ConfigListeners bounds the addresses of a service, those of single
	// exports included: one socket for each export.
	ConfigListeners = ConfigExports + 64

	// ConfigGroups bounds the rates that exports share, ConfigRoots the
	// folders of images.
	ConfigGroups = 1024
	ConfigRoots  = 256

	// Grants bounds the grants of one export, and GrantFacts the facts of one
	// kind in one grant. Each client that asks for the export may be compared
	// with all.
	Grants     = 256
	GrantFacts = 1024

	// RateBurst is the longest burst of a rate.
	RateBurst = time.Hour

	// Partitions is the largest number of a partition: as many as a GPT has.
	Partitions = 128

	// PIDFile bounds a file that is taken for a PID file: a number, and the
	// blanks that programs put around it.
	PIDFile = 64

	// UserName bounds the name of a user or a group: Linux allows 256 bytes
	// with the closing zero.
	UserName = 255

	// FilePath bounds a path, and SocketPath that of a Unix socket: the
	// kernel's bounds without the closing zero.
	FilePath   = 4095
	SocketPath = 107

	// ExportJSON and ExportDepth bound an export that is told to the control
	// API: a thousand ranges, and no more levels than anything in it has.
	ExportJSON  = 64 << 10
	ExportDepth = 16

	// StateFile bounds the file of an export that is kept: it has 4096 ranges
	// and 256 grants at most.
	StateFile = 1 << 20

	// ImagesAtOnce bounds the images whose files are opened side by side, those
	// not counted that have not answered in ImageYields: so long only storage takes
	// that hangs, or a disk that has to start turning. ImagesAsked bounds those
	// that are counted and those that are not: each that hangs has two threads, of
	// which Go allows 10000.
	ImagesAtOnce = 64
	ImageYields  = time.Second
	ImagesAsked  = 1024

	// ImageAnswers is how long the storage of all images that are opened together
	// has to open their files: more than a disk needs that has to start turning. A
	// start takes three such times if some is silent (daemon/gather.go), two of stage
	// 0 and one of the worker for remembered overlays, which leave it more than 15 of
	// the 120 seconds that the units allow.
	ImageAnswers = 30 * time.Second

	// LeaseAnswers is how long whoever has a lease on a file has to give it back:
	// less than ImageAnswers, so that this is said, and enough for an NFS server that
	// asks its clients. The kernel takes a lease away after
	// /proc/sys/fs/lease-break-time, 45 seconds if nobody has changed it.
	LeaseAnswers = 20 * time.Second

	// SpareFiles is how many descriptors the exports of the start leave to the
	// rest of the service: to its confinement, the control API and clients.
	SpareFiles = 64
)

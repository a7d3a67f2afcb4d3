package limits

import "time"

// The layers of a disk.
const (
	// ProtectRanges bounds the ranges of a disk that refuse writes. Each write
	// searches them.
	ProtectRanges = 4096

	// LargestBlock bounds the blocks of a disk, whose parts are modified in a
	// buffer of one block: more than any storage has, and the most that the NBD
	// specification allows for a minimum.
	LargestBlock = 64 << 10

	// CloseFlush is how long the flush of a disk that is closed may wait for
	// its turn. It does not bound the storage.
	CloseFlush = 30 * time.Second

	// PauseLongest bounds how long a disk may be paused: guests take I/O that
	// lasts longer for a dead disk (the time-out of Linux's SCSI layer is 30
	// seconds, that of most daemons on top of it a few minutes).
	PauseLongest = 5 * time.Minute

	// OverlayQuota bounds the quota of a temporary overlay, whose clusters have
	// numbers of 31 bits.
	OverlayQuota = 16 << 40

	// OverlayDisk bounds the disk under a temporary overlay: the first level
	// of its table takes 8 bytes for 256 MiB, or 8 MiB.
	OverlayDisk = 256 << 40

	// RateSlack is the least that a rate may run ahead of the clock: it makes
	// up for timers that fire late, and stays below what a guest can notice.
	RateSlack = 10 * time.Millisecond

	// RatePiece is the most of a request without payload that is paid for at
	// once: such a request may be of 4 GiB, and the other disks of its group
	// have to wait for their turn.
	RatePiece = 1 << 20

	// CacheMost is how much of a disk one CACHE reads at most, which is a hint and
	// may name all of it: more than any client has use for at once, and below
	// two seconds of a disk that turns.
	CacheMost = 256 << 20

	// RateEffect is the most of a request without payload that counts as one
	// where its bytes do not count: about what fits a compact request, which has
	// 32 bits for it. Extended headers have 64.
	RateEffect = 4 << 30

	// RateGroups bounds the groups that one disk shares its rates with.
	RateGroups = 8

	// FaultRules bounds the rules that inject faults into one disk: every
	// request is held against each.
	FaultRules = 64

	// InjectDelay bounds an injected delay: longer than any time-out that a
	// guest is likely to be tested with.
	InjectDelay = 10 * time.Minute

	// RequestLogLines bounds the lines of a request log in a second. A guest
	// makes a hundred times more requests, and must not fill the journal.
	RequestLogLines = 2000
)

package uring

// Names and values of linux/io_uring.h, in its own order. Comments give the
// first kernel that has what is newer than 5.13, the oldest that is served.

// Opcodes of submissions.
const (
	opFsync      = 3
	opReadFixed  = 4
	opWriteFixed = 5
	opFallocate  = 17
	opRead       = 22
	opWrite      = 23
)

// opcodes is all that the ring is ever asked for: what the probe must find
// and the restriction lets through.
var opcodes = [...]uint8{opFsync, opReadFixed, opWriteFixed, opFallocate, opRead, opWrite}

// opOpenat is asked for once, and must be refused.
const opOpenat = 18

const (
	sqeFixedFile = 1 << 0 // sqe.flags: fd is an index into the file table

	fsyncDatasync = 1 << 0 // sqe.opFlags of opFsync
)

// Flags of io_uring_setup.
const (
	setupClamp        = 1 << 4
	setupRDisabled    = 1 << 6
	setupSubmitAll    = 1 << 7  // 5.18
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1
	setupNoSQArray    = 1 << 16 // 6.6
)

// Features that io_uring_setup reports.
const (
	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featRsrcTags   = 1 << 10 // 5.13: the registrations in use here
)

// Flags of io_uring_enter.
const (
	enterGetEvents      = 1 << 0
	enterRegisteredRing = 1 << 4 // 5.18
)

// Operations of io_uring_register.
const (
	registerProbe         = 8
	registerRestrictions  = 11
	registerEnableRings   = 12
	registerFiles2        = 13
	registerFilesUpdate2  = 14
	registerBuffers2      = 15
	registerBuffersUpdate = 16
	registerWorkers       = 19 // 5.15
	registerRingFDs       = 20 // 5.18
)

// Kinds of restrictions.
const (
	restrictRegisterOp       = 0
	restrictSQEOp            = 1
	restrictSQEFlagsRequired = 3
)

const opSupported = 1 << 0 // probeOp.flags

// Offsets for mmap of the ring.
const (
	offRings = 0
	offSQEs  = 0x10000000
)

type params struct {
	sqEntries    uint32
	cqEntries    uint32
	flags        uint32
	sqThreadCPU  uint32
	sqThreadIdle uint32
	features     uint32
	wqFD         uint32
	_            [3]uint32
	sq           sqOffsets
	cq           cqOffsets
}

type sqOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	_                                                   uint64
}

type cqOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	_                                                   uint64
}

type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64
	addr     uint64
	len      uint32
	opFlags  uint32
	userData uint64
	bufIndex uint16
	_        uint16
	_        int32
	_        [2]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

type probe struct {
	lastOp uint8
	opsLen uint8
	_      uint16
	_      [3]uint32
	ops    [256]probeOp
}

type probeOp struct {
	op    uint8
	_     uint8
	flags uint16
	_     uint32
}

type restriction struct {
	kind  uint16
	value uint8 // register operation, SQE opcode or SQE flags
	_     uint8
	_     [3]uint32
}

type rsrcRegister struct {
	nr    uint32
	flags uint32
	_     uint64
	data  uint64
	tags  uint64
}

type rsrcUpdate struct {
	offset uint32
	_      uint32
	data   uint64
}

type rsrcUpdate2 struct {
	offset uint32
	_      uint32
	data   uint64
	tags   uint64
	nr     uint32
	_      uint32
}

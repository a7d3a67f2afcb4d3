// Package limits holds every bound of the program, each with its reason, so
// that a reader can see in one place what a peer or an image may cost. Sizes
// are in bytes unless the name says otherwise.
package limits

import "time"

// Sizes of the protocol.
const (
	// MaxString bounds every string a peer sends: export names, descriptions,
	// context queries (NBD proto.md, "Values", "string").
	MaxString = 4096

	// MaxErrorText bounds the human text of an error reply. The
	// specification allows 4096; QEMU drops its node for good when a
	// structured error chunk exceeds 1000 bytes.
	MaxErrorText = 512

	// MaxOption bounds the payload of one option. Larger ones end the
	// connection unread: a legal option of two 4096-byte strings and a few
	// hundred queries fits many times over.
	MaxOption = 64 << 10

	// MaxOptions bounds how many options of one connection are refused, or list
	// all exports. MaxInfos bounds all of its options: clients ask some about
	// each of the exports, and the time of the handshake bounds that too.
	MaxOptions = 64
	MaxInfos   = 4 * MaxListed

	// MaxMetaQueries bounds the queries of LIST_META_CONTEXT and
	// SET_META_CONTEXT.
	MaxMetaQueries = 256

	// MaxContexts bounds the metadata contexts that a connection may have
	// selected.
	MaxContexts = 16

	// AdvertisedIO is the maximum payload that INFO_BLOCK_SIZE announces.
	AdvertisedIO = 32 << 20

	// MaxIO is the largest read or write that is served, whatever was
	// advertised: the kernel's client ignores the announced maximum.
	MaxIO = 64 << 20

	// MaxExtents bounds the descriptors in one block status reply. The
	// protocol allows 2^20, QEMU reads at most 2^17; a client asks again for
	// the rest, and finding this many takes the file system milliseconds.
	MaxExtents = 1 << 13

	// ExtentsLooked bounds the extents of a disk that one block status looks
	// at: neighbours of one state are a single descriptor, however many they
	// are. Enough for a layer that reports its pieces one by one.
	ExtentsLooked = 4 * MaxExtents

	// HoleRead is the shortest read for which a known hole is looked up: below
	// it, sending zeroes costs less.
	HoleRead = 32 << 10

	// MaxListed bounds how many exports one LIST reply names.
	MaxListed = 10000
)

// Time. All of it is monotonic; a suspended host does not age a connection.
const (
	// Handshake is the time from accept to transmission, TLS included.
	Handshake = 10 * time.Second

	// Stall is how long a peer may leave a reply unread or a payload
	// half sent.
	Stall = 60 * time.Second

	// Unread is how long a reply that is sent from the page cache holds its
	// part of the disk while the peer does not take it.
	Unread = time.Second

	// Lookout is how often a connection that waits for its own requests, not for
	// its peer, looks whether there is a peer at all: a client that is started
	// anew takes longer to come back.
	Lookout = 20 * time.Millisecond

	// StallBytes of a payload, or its end, have to come within Stall: whoever
	// sends less keeps memory from others of its peer.
	StallBytes = 2 << 20

	// ShortBytes have to be taken, or sent, between two looks of Stall/8, while
	// others wait for memory, by a peer in whose hands much of it is.
	ShortBytes = 4 << 20

	// EndChanges is how long a reload and requests to the control API that are
	// given up at SIGTERM may take to end, all together. Drain bounds how long
	// requests in flight are waited for then. With two times Sever, and LastClose,
	// they are less than the TimeoutStopSec= of the units.
	EndChanges = 5 * time.Second
	Drain      = 25 * time.Second

	// AskSize is how long a file may take to say how large it is now, before
	// the size that it had is taken: longer than storage that answers needs, and
	// less than who connects or looks at a list waits.
	AskSize = 3 * time.Second

	// Sever is how long clients may take to leave when what they have in
	// flight is not waited for any more; LastClose, after a drain that took
	// too long, how long the disks of others may take to be flushed.
	Sever     = 2 * time.Second
	LastClose = 8 * time.Second

	// Linger bounds the wait for a peer to take the last bytes of a
	// connection that is being closed, or all of them when it is told to leave
	// at once.
	Linger = 500 * time.Millisecond

	// TLSClose bounds the sending of close_notify.
	TLSClose = time.Second

	// Poll is how long a connection looks at its empty socket before it
	// sleeps, and PollPays the sleep below which that would have been
	// better: what it takes to be woken, twice.
	// PollCrowded is the time for one look above which somebody else had the
	// processor meanwhile.
	Poll        = 25 * time.Microsecond
	PollPays    = 100 * time.Microsecond
	PollCrowded = 5 * time.Microsecond

	// PollAfter is how many short sleeps in a row show such a peer.
	PollAfter = 8

	// SlowWrite is how long a copy into the page cache may take before the
	// connection leaves its writes to the engine, for SlowWriteFor: the
	// kernel is slowing writers down, or the storage is far away, and reads
	// on the same connection shall not wait for that. A thread that lost its
	// processor for a moment is not meant.
	SlowWrite    = 10 * time.Millisecond
	SlowWriteFor = 5 * time.Second

	// LongTurn is how long a connection may copy one write after the other into
	// the page cache before it sends the replies that it has, which also shows
	// whether the peer is still there: who takes its place shall not have its
	// writes overwritten. A TurnBuffer of quick writes takes a fraction of that.
	LongTurn = 5 * time.Millisecond

	// KeepAliveIdle, KeepAliveInterval and KeepAliveCount find dead TCP peers
	// in about a minute and a half.
	KeepAliveIdle     = 60 * time.Second
	KeepAliveInterval = 10 * time.Second
	KeepAliveCount    = 3
)

// UnixSendBuffer is the send buffer of a Unix connection: room for a reply of
// 1 MiB, which otherwise leaves in five pieces with a wake-up each. More
// brings nothing. Without privileges the kernel grants what
// net.core.wmem_max allows.
const UnixSendBuffer = 1 << 20

// Connections and their budgets.
const (
	// Connections bounds all connections of the process.
	Connections = 1024

	// ConnectionsPerPeer bounds those of one peer (CID, uid or address).
	// Kernel clients and copy tools use 4 to 16 each; a host's own tools
	// share one uid.
	ConnectionsPerPeer = 256

	// Handshaking bounds the connections in handshake, and HandshakingPerPeer
	// those of one CID, address or process.
	Handshaking        = 128
	HandshakingPerPeer = 64

	// HandshakeGrace is how long a connection in handshake keeps its place when
	// somebody with fewer needs one: a handshake takes some milliseconds, with
	// TLS too. Whoever comes when all of Connections are half open has a turn
	// within Connections / Handshaking times as long, which is 0.8 s.
	HandshakeGrace = 100 * time.Millisecond

	// RequestsPerConn and BytesPerConn bound what one connection may have in
	// flight: decoded, not yet answered or not yet taken by the peer.
	RequestsPerConn = 128
	BytesPerConn    = 32 << 20

	// After each Refused replies with an error that cost no waiting a
	// connection rests for RefusedRest: a guest that asks for nothing right
	// takes no processor from others, and one that does so now and then never
	// notices.
	Refused     = RequestsPerConn
	RefusedRest = 2 * time.Millisecond

	// RequestsPerPeer and BytesPerPeer bound the sum over a peer's
	// connections.
	RequestsPerPeer = 1024
	BytesPerPeer    = 128 << 20

	// BytesPerPeerAlone bounds it for a connection with nothing else in flight:
	// a peer may be the user of many guests, and four whose disks are paused
	// have BytesPerPeer in flight. There is room for one request of 2 MiB of
	// each of 64 others.
	BytesPerPeerAlone = 2 * BytesPerPeer
)

// Endpoints and certificates.
const (
	// Backlog is the queue of connections that wait for accept: a guest's
	// reconnect storm after a restart fits.
	Backlog = 1024

	// PortRetries bounds attempts to find one port that is free in both IP
	// families.
	PortRetries = 16

	// SocketLock is how long the making of a Unix socket waits for another
	// process that makes one in the same directory, which takes that no more
	// than milliseconds.
	SocketLock = time.Second

	// SecurityLabel bounds an SELinux context: the kernel's own bound is a
	// page.
	SecurityLabel = 4096

	// PeerGroups bounds the supplementary groups of a peer: the kernel's
	// NGROUPS_MAX.
	PeerGroups = 64 << 10

	// CertificateFile and RevocationFile bound the PEM files that are read; a
	// revocation list of 10000 entries is about half a megabyte.
	CertificateFile = 1 << 20
	RevocationFile  = 16 << 20

	// CertificateRetry is the shortest time between two attempts to load
	// changed certificate files that could not be loaded.
	CertificateRetry = 5 * time.Second

	// CertificateChain bounds the certificates that a TLS peer sends: a leaf
	// and its intermediates, of which there are rarely two.
	CertificateChain = 8

	// RSABits bounds the RSA keys of a TLS peer, since the cost of a
	// verification grows with the square of the size.
	RSABits = 4096
)

// Memory and engines.
const (
	// TurnBuffer is the buffer that receives the requests of one turn, and
	// the one that collects its replies: 32 reads of 4 KiB and more.
	TurnBuffer = 256 << 10

	// InlineReply is the largest read that is copied into the turn's reply
	// buffer; larger ones get a buffer of their own or leave by sendfile.
	InlineReply = 64 << 10

	// BufferBudget bounds all I/O buffers of the process.
	BufferBudget = 1 << 30

	// BufferCache is how much free buffer memory stays resident between
	// bursts.
	BufferCache = 16 << 20

	// RingArena is the part of the buffer memory that a ring may register,
	// which pins it. Half of the usual RLIMIT_MEMLOCK of 8 MiB, because older
	// kernels count the ring itself there too.
	RingArena = 4 << 20

	// RingEntries is the submission queue of one ring.
	RingEntries = 256

	// RingFiles bounds the registered files of one ring.
	RingFiles = 1024

	// RingWorkers bounds the transfers in flight in one ring, and the threads
	// of the kernel that make those that may block: with one for each, none
	// waits for a thread behind transfers that hang. The kernel's own number is
	// four for each processor and as many as this at most. What ShareSpare leaves
	// one owner of it is more than 32 for each of six connections.
	RingWorkers = 256

	// RemoteWorkers bounds the goroutines that make the transfers of a ring
	// engine on files of other hosts: 48 in flight and more of one that
	// hangs, as many of others.
	RemoteWorkers = 64

	// PoolWorkers bounds the goroutines of the pool engine.
	PoolWorkers = 16

	// MinProcs and PoolProcs are how many processors the Go runtime uses at
	// least, with a ring and with the pool engine, however few there are.
	MinProcs  = 2
	PoolProcs = 8

	// CachedWriters bounds the callers of one engine that write to the page
	// cache themselves. Each has a thread while the kernel slows writers down;
	// what others write goes to the engine's own.
	CachedWriters = 16

	// IORetries bounds how often in a row one call of a transfer is made again
	// because it was interrupted or moved nothing. The Go runtime's own
	// signals interrupt slow fallocate calls several times.
	IORetries = 100

	// BusyRetries bounds how often the pages of a range of a block device are
	// written back so that it can be zeroed or trimmed while somebody else has
	// the device for itself. Other writes may change pages again in between.
	BusyRetries = 10

	// LockRetries bounds attempts to take image locks, which come at growing
	// distances within a second. Another opener may only be testing; and the
	// kernel lets go of the files of a killed server's io_uring a while after
	// its death, when its supervisor has started the next one already.
	LockRetries = 14

	// LockedRetries bounds how often a service tries again after its start to
	// open the exports whose images were locked, each time LockedRetryWait
	// after the last: for a server before it that was killed, and whose I/O has
	// not ended yet.
	LockedRetries   = 5
	LockedRetryWait = time.Second

	// BounceBuffer is the largest transfer that is copied because a direct
	// file demands an alignment that the request does not have. Each direct
	// file keeps one such buffer.
	BounceBuffer = 128 << 10

	// ExtentRuns is how many runs of data and holes a raw file remembers:
	// one for each connection of a copy tool that walks a disk in parallel.
	ExtentRuns = 16

	// ExtentSeeks bounds those who ask a raw file for its data and holes at a
	// time, each with a thread, of which Go allows 10000: where storage hangs
	// they stay. A file system answers in microseconds, one across a network in
	// a round trip.
	ExtentSeeks = 8
)

// Compressed clusters.
const (
	// ZstdWindow bounds the window that a zstd frame asks for. The
	// recommendation of RFC 8878, section 3.1.1.1.2; a cluster has 2 MiB at
	// most.
	ZstdWindow = 8 << 20

	// ZstdFrames bounds the frames that make up one cluster, skippable ones
	// included. QEMU writes one.
	ZstdFrames = 16

	// DeflateWindow is how far a deflate stream that is written looks back:
	// QEMU opens its reader with window bits of 12.
	DeflateWindow = 4 << 10
)

// Images that are chains of layers.
const (
	// CreatePiece is the buffer that fills the storage of a new image: as much
	// as the kernel writes well at a time.
	CreatePiece = 1 << 20

	// ChainDepth bounds the images of one chain, the top included: each costs
	// a descriptor and a look at its tables for every extent. Backup tools keep
	// some dozen.
	ChainDepth = 64

	// MapCache bounds the mapping of one image that is kept in memory: that of
	// 128 GiB of 64 KiB clusters in the worst order, of far more where
	// neighbours lie together.
	MapCache = 64 << 20

	// MapCacheLeast and MapCacheMost bound what an export may ask for instead.
	MapCacheLeast = 1 << 20
	MapCacheMost  = 4 << 30

	// L2Slice is how much of an L2 table of a writable image is read, cached
	// and written as one, in bytes: what QEMU's cache uses too. A power of two.
	L2Slice = 4 << 10

	// DirtySlices bounds the slices of one image that wait for a commit: 4 MiB
	// of L2 tables.
	DirtySlices = 1024

	// CommitDelay is how long a change of the mapping waits for the guest's
	// flush before it is committed without.
	CommitDelay = 5 * time.Second

	// MaxFill is the largest write that is copied so that what is around it in
	// its clusters goes with it in one call.
	MaxFill = 256 << 10

	// MapPage is the guest range whose mapping is loaded and evicted as one:
	// 512 clusters of 64 KiB, what a 4 KiB slice of an L2 table maps. A power
	// of two.
	MapPage = 32 << 20

	// MapSubPage is the range of one piece of a page that has more than
	// MapExtents extents, as clusters of 512 bytes make them; its 2048
	// clusters always fit. A power of two that divides MapPage.
	MapSubPage = 1 << 20

	// MapExtents bounds the extents of a page, 32 bytes each.
	MapExtents = 4096

	// StatusTables bounds the tables that one request for the state of a range
	// looks at: pages of a map of MapPage, or slices of L2Slice. What a request
	// without 64-bit lengths asks for with clusters of 64 KiB, 512 KiB of L2
	// tables; a client asks again from where the answer ended.
	StatusTables = 128

	// MapHoles bounds the large holes of one image that are kept in memory,
	// 320 bytes each; they lie in one sorted list, which moves when one is put
	// in.
	MapHoles = 4096

	// MapHoleScan is how many entries of an L1 table are looked at for the
	// ends of a hole, some 50 microseconds; those of a disk of 32 TiB with
	// clusters of 64 KiB. A power of two.
	MapHoleScan = 64 << 10

	// ClusterCache bounds the decompressed clusters of one image.
	ClusterCache = 64 << 20

	// ClusterReads bounds the compressed clusters of one image that are in
	// memory at a time; one of them takes at most 6 MiB with its output.
	ClusterReads = 32

	// ClusterBatch is how many compressed clusters of one read are gathered
	// before they are decompressed side by side.
	ClusterBatch = 64
)

// Relations that the code relies on: a negative array length does not compile.
var (
	_ [MaxIO - AdvertisedIO]struct{}
	_ [TurnBuffer - InlineReply - 1024]struct{}
	_ [MaxOption - 2*MaxString - 16]struct{}
	_ [BytesPerPeer - BytesPerConn]struct{}
	_ [BufferBudget/2 - BytesPerPeerAlone - MaxIO]struct{}
	_ [BufferCache - RingArena]struct{}
	_ [MapExtents - MapSubPage/512]struct{}
	_ [-(MapPage % MapSubPage)]struct{}
)

// The client's side: what a server may cost it.
const (
	// MaxOptReply bounds the payload of one option reply: two strings and
	// the numbers around them.
	MaxOptReply = 2*MaxString + 64

	// MaxInfoReplies bounds the informations in the answer to INFO and GO:
	// the specification defines four.
	MaxInfoReplies = 64

	// MaxExtentsReply bounds the descriptors of one block status chunk from
	// a server (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS", 2^20).
	MaxExtentsReply = 1 << 20

	// MaxSpans bounds the separate pieces of one read that have arrived
	// while the gaps between them have not. Servers answer in order or in
	// a few parallel pieces.
	MaxSpans = 4096

	// MaxFaults bounds the error chunks of one reply.
	MaxFaults = 1024

	// ClientRequests bounds the requests one client connection has in
	// flight, those included that nobody waits for any more.
	ClientRequests = 1024

	// MaxEffect is the largest range of one zero, trim, cache or block
	// status request; longer ones are sent in pieces. Servers have choked at
	// 2^31.
	MaxEffect = 1 << 30

	// CopyBudget bounds the buffers of one copy.
	CopyBudget = 256 << 20
)

// What the tables of a qcow2 image may cost.
const (
	// MaxTableRead bounds one read of a piece of an L2 or refcount table: the
	// whole L2 table of an image with 64 KiB clusters.
	MaxTableRead = 64 << 10

	// SnapshotTable bounds the snapshot table that is read, in bytes: 65536
	// snapshots without names, or 7000 whose names and extra data have 1 KiB.
	// The disk of an image with a larger one is served all the same.
	SnapshotTable = 8 << 20

	// SnapshotsNamed is how many snapshots the error about an unknown one
	// names.
	SnapshotsNamed = 16
)

// What the header of a qcow2 image may cost.
const (
	// DataFileName bounds the name of an external data file: the kernel's
	// own bound of a path, its closing NUL not counted.
	DataFileName = 4095

	// FeatureNames bounds the feature name table: one name for each bit of
	// the three feature words.
	FeatureNames = 3 * 64

	// JSONName bounds a file name of the form "json:{...}". QEMU keeps at
	// most 1023 bytes in an image; an operator's own may be longer.
	JSONName = 4096
)

package limits

// The account of the clusters of a qcow2 image that is written.
const (
	// ReserveRun bounds what one call reserves: twice the largest request.
	ReserveRun = 2 * MaxIO

	// RefcountPiece is the part of a refcount block that is read and written
	// at once: a page. With 64 KiB clusters it counts 128 MiB of the file.
	RefcountPiece = 4 << 10

	// RefcountPieces bounds the pieces that are kept in memory: 1 MiB that
	// was not changed, and as much that was and is not written yet.
	RefcountPieces = 256

	// RefTableGrowth is the length of a new refcount table in percent of the
	// old one: a table is moved a few times in an image's life.
	RefTableGrowth = 150

	// FundClusters is how many clusters get storage on the host in one call,
	// for tables to come: a table of 64 KiB maps 512 MiB, one of 512 bytes
	// 32 KiB.
	FundClusters = 16

	// ExtendPart, ExtendLeast and ExtendMost are the step in which an image
	// file grows: a part of its size, of at least and at most so many bytes. A
	// crash leaves that much of a hole at its end.
	ExtendPart  = 16
	ExtendLeast = 8 << 20
	ExtendMost  = 64 << 20
)

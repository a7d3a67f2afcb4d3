package limits

// What the check of a qcow2 image may cost. Its other memory is in proportion
// to the metadata that the file really has.
const (
	// CheckProblems bounds the problems that a check keeps with their text:
	// more than anybody reads. All are counted.
	CheckProblems = 1000

	// CheckPiece is how much of a table a check has in memory at a time.
	CheckPiece = 64 << 10

	// CheckPieces bounds the pieces of refcount blocks that a check keeps:
	// the refcounts of 128 GiB of 64 KiB clusters.
	CheckPieces = 64

	// CheckTable bounds a table that a check parses as a whole: the
	// directory of bitmaps, the table of snapshots. Tables that are larger
	// have names of kilobytes each.
	CheckTable = 16 << 20
)

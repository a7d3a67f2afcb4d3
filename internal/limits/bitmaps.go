package limits

// What the persistent dirty bitmaps of a qcow2 image may cost.
const (
	// BitmapMemory bounds the bits and tables of all bitmaps of one image that
	// are kept in memory, and with that how much of the file is read for them:
	// four bitmaps of a 16 TiB disk with 64 KiB per bit, all of whose bits
	// differ from their neighbours.
	BitmapMemory = 128 << 20

	// BitmapDirectory bounds the directory that is parsed and written: 15000
	// bitmaps with names of a kilobyte. It is what a check reads.
	BitmapDirectory = CheckTable

	// BitmapContexts bounds the bitmaps that are offered to clients: the list
	// of an export's metadata contexts is one reply for each.
	BitmapContexts = 1024

	// BitmapPiece is how much of a bitmap is read or written at a time, or one
	// cluster, if that is more.
	BitmapPiece = 256 << 10
)

package format

// Feature bits (section "Header").
const (
	IncompatDirty       = 1 << 0
	IncompatCorrupt     = 1 << 1
	IncompatDataFile    = 1 << 2
	IncompatCompression = 1 << 3
	IncompatExtendedL2  = 1 << 4
	knownIncompat       = 1<<5 - 1

	CompatLazyRefcounts = 1 << 0

	AutoclearBitmaps = 1 << 0
	AutoclearRawData = 1 << 1
	KnownAutoclear   = AutoclearBitmaps | AutoclearRawData
)

// Offsets of the header fields that change while an image is in use. Each run
// lies within one 512-byte sector, so that it is never torn.
const (
	OffSize          = 24
	OffL1            = 36 // L1 size, 32 bits, then L1 offset, 64 bits
	OffRefTable      = 48 // offset, 64 bits, then clusters, 32 bits
	OffSnapshots     = 60 // count, 32 bits, then offset, 64 bits
	OffIncompat      = 72
	OffCompat        = 80
	OffAutoclear     = 88
	offCrypt         = 32
	offOrder         = 96
	offLength        = 100
	Magic            = 0x514649fb
	headerV2         = 72
	headerV3         = 104
	headerCompressed = 112 // with the compression type and its padding
)

// Compression is the type of all compressed clusters of an image.
type Compression uint8

const (
	Deflate Compression = 0 // raw deflate, called zlib by QEMU
	Zstd    Compression = 1
)

// Extension is a header extension that is kept as it is.
type Extension struct {
	Type uint32
	Data []byte // without padding
}

// FeatureName is an entry of the feature name table.
type FeatureName struct {
	Kind uint8 // 0 incompatible, 1 compatible, 2 autoclear
	Bit  uint8
	Name string
}

// BitmapsExtension leads to the bitmap directory (section "Bitmaps extension").
type BitmapsExtension struct {
	Count     uint32
	DirSize   uint64 // bytes
	DirOffset uint64
}

// Header is everything that lies in the first cluster.
type Header struct {
	Version          uint32
	ClusterBits      uint32
	Size             uint64 // of the disk in bytes, a multiple of 512
	L1Size           uint32 // entries
	L1Offset         uint64
	RefTableOffset   uint64
	RefTableClusters uint32
	Snapshots        uint32 // number of snapshots
	SnapshotsOffset  uint64
	Incompat         uint64
	Compat           uint64
	Autoclear        uint64
	RefcountOrder    uint32
	Compression      Compression

	// Length of the fixed fields as the file has it; Unknown are those
	// beyond the ones known here, kept as they are.
	Length  uint32
	Unknown []byte

	Backing       string // "" for none
	BackingFormat string // "" for not said
	DataFile      string // "" for not said
	Bitmaps       *BitmapsExtension
	// BitmapsErr is what is wrong with the bitmaps extension, which then is
	// nil: the disk can be read all the same.
	BitmapsErr error
	// StaleBitmaps: there is a bitmaps extension and its autoclear bit is
	// clear, so that it means nothing and its clusters are leaked.
	StaleBitmaps bool
	FeatureNames []FeatureName // printable ASCII
	Extensions   []Extension   // others, in order
}

// Geometry of the image.
func (h *Header) Geometry() Geometry {
	return NewGeometry(int(h.Version), uint(h.ClusterBits), uint(h.RefcountOrder),
		h.Incompat&IncompatExtendedL2 != 0, h.Incompat&IncompatDataFile != 0)
}

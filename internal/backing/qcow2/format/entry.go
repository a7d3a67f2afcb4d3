package format

// Bits of L1 and L2 entries (section "Cluster mapping").
const (
	FlagCopied     = 1 << 63
	FlagCompressed = 1 << 62
	FlagZero       = 1

	// OffsetMask takes the host offset out of an entry that is not compressed.
	OffsetMask = 0x00fffffffffffe00

	// L1Reserved and L2Reserved must be 0, the latter in entries that are not
	// compressed.
	L1Reserved = 0x7f000000000001ff
	L2Reserved = 0x3f000000000001fe

	maxHostShift = 56
)

// NoHost is the Host of a Cluster that has none.
const NoHost = -1

// Cluster is a decoded L2 entry. A standard entry is treated as one of one
// subcluster, so that bit 0 of Data and Zero says all: a subcluster has data,
// or reads as zeroes, or (in neither set) comes from the backing file.
type Cluster struct {
	// Host is the offset of the host cluster, or that of the compressed
	// data, or NoHost.
	Host int64

	// Length bounds the compressed data in bytes: they may end before, where
	// the file ends, and the last sector may belong to others too.
	Length int64

	Compressed bool
	Copied     bool   // the host cluster has refcount 1
	Data       uint32 // subclusters with their data in the host cluster
	Zero       uint32 // subclusters that read as zeroes
}

// Unallocated is the cluster of an empty entry.
var Unallocated = Cluster{Host: NoHost}

// SubKind is what a subcluster of a Cluster is.
type SubKind uint8

const (
	SubAbsent SubKind = iota // it comes from the backing file
	SubZero                  // it reads as zeroes
	SubData                  // its data are in the host cluster
)

// Kind of subcluster i.
func (c *Cluster) Kind(i int64) SubKind {
	switch bit := uint32(1) << i; {
	case c.Data&bit != 0:
		return SubData
	case c.Zero&bit != 0:
		return SubZero
	}
	return SubAbsent
}

// HasHost reports whether a whole host cluster belongs to c.
func (c *Cluster) HasHost() bool { return c.Host != NoHost && !c.Compressed }

// DecodeL1 splits an entry of an L1 table. off is 0 for "no table". It does
// not know where tables may lie.
func (g *Geometry) DecodeL1(e uint64) (off int64, copied bool, err error) {
	off = int64(e & OffsetMask)
	switch {
	case e&L1Reserved != 0:
		return 0, false, corrupt("L1 entry %#x has reserved bits set", e)
	case !g.Aligned(off):
		return 0, false, corrupt("L2 table at %#x is not on a cluster boundary", off)
	}
	return off, e&FlagCopied != 0, nil
}

// EncodeL1 is the reverse of DecodeL1.
func EncodeL1(off int64, copied bool) uint64 {
	e := uint64(off)
	if copied {
		e |= FlagCopied
	}
	return e
}

// DecodeL2 splits an entry of an L2 table; bitmap is the second word of an
// extended one, else 0. It does not know where clusters may lie.
func (g *Geometry) DecodeL2(word, bitmap uint64) (Cluster, error) {
	switch {
	case word&FlagCompressed != 0:
		return g.decodeCompressed(word)
	case word&L2Reserved != 0:
		return Unallocated, corrupt("L2 entry %#x has reserved bits set", word)
	}
	c := Cluster{Host: int64(word & OffsetMask), Copied: word&FlagCopied != 0}
	switch {
	case !g.Aligned(c.Host):
		return Unallocated, corrupt("cluster at %#x is not on a cluster boundary", c.Host)
	case c.Host == 0 && !(g.DataFile && c.Copied):
		// Only in a data file, where offset 0 is an ordinary cluster, does the
		// COPIED flag tell the two apart.
		if c.Copied {
			return Unallocated, corrupt("L2 entry %#x is marked copied and has no cluster", word)
		}
		c.Host = NoHost
	}
	err := c.setFlags(g, word, bitmap)
	return c, err
}

// setFlags reads which of the subclusters have data or read as zeroes.
func (c *Cluster) setFlags(g *Geometry, word, bitmap uint64) error {
	if g.Extended {
		return c.setBitmap(bitmap)
	}
	return c.setFlag(word, g.Version)
}

// setFlag reads the zero flag of a standard entry.
func (c *Cluster) setFlag(word uint64, version int) error {
	switch {
	case word&FlagZero != 0 && version < 3:
		return corrupt("L2 entry %#x of a version 2 image has the zero flag set", word)
	case word&FlagZero != 0:
		c.Zero = 1
	case c.Host != NoHost:
		c.Data = 1
	}
	return nil
}

// setBitmap reads the second word of an extended entry (section "Extended L2
// Entries").
func (c *Cluster) setBitmap(bitmap uint64) error {
	c.Data, c.Zero = uint32(bitmap), uint32(bitmap>>32)
	switch {
	case c.Data&c.Zero != 0:
		return corrupt("subcluster bitmap %#x has subclusters both allocated and zero", bitmap)
	case c.Data != 0 && c.Host == NoHost:
		return corrupt("subcluster bitmap %#x has data and the entry no cluster", bitmap)
	}
	return nil
}

// compressedShift is where the sector count of a compressed entry begins.
func (g *Geometry) compressedShift() uint { return 62 - (g.ClusterBits - 8) }

// MaxCompressedHost bounds the offsets that a compressed entry can name.
func (g *Geometry) MaxCompressedHost() int64 {
	return 1 << min(g.compressedShift(), maxHostShift)
}

const sector = 512

// decodeCompressed reads a compressed cluster descriptor. The bitmap of an
// extended entry does not count (section "Extended L2 Entries").
func (g *Geometry) decodeCompressed(word uint64) (Cluster, error) {
	if g.DataFile {
		return Unallocated, corrupt("compressed cluster in an image with a data file")
	}
	x := g.compressedShift()
	host := int64(word & (1<<x - 1))
	if host>>maxHostShift != 0 {
		return Unallocated, corrupt("compressed entry %#x has reserved bits set", word)
	}
	sectors := int64(word&^(FlagCopied|FlagCompressed)>>x) + 1
	return Cluster{
		Host: host, Length: sectors*sector - host&(sector-1), Compressed: true,
		Copied: word&FlagCopied != 0, Data: g.AllSubs(),
	}, nil
}

// EncodeL2 is the reverse of DecodeL2. c must make sense: an error is a bug.
func (g *Geometry) EncodeL2(c Cluster) (word, bitmap uint64) {
	if c.Copied {
		word |= FlagCopied
	}
	if c.Compressed {
		sectors := uint64(c.Host&(sector-1)+c.Length+sector-1) / sector
		return word | FlagCompressed | uint64(c.Host) | (sectors-1)<<g.compressedShift(), 0
	}
	if c.Host != NoHost {
		word |= uint64(c.Host)
	}
	if g.Extended {
		return word, uint64(c.Data) | uint64(c.Zero)<<32
	}
	if c.Zero != 0 {
		word |= FlagZero
	}
	return word, 0
}

// DecodeRefTable gives the offset of a refcount block, 0 for none.
func (g *Geometry) DecodeRefTable(e uint64) (off int64, err error) {
	switch {
	case e&0x1ff != 0:
		return 0, corrupt("refcount table entry %#x has reserved bits set", e)
	case int64(e) < 0 || !g.Aligned(int64(e)):
		return 0, corrupt("refcount block at %#x is not on a cluster boundary", e)
	}
	return int64(e), nil
}

package create

import (
	"math/bits"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

const (
	// pointerSize is that of an entry of the L1 and refcount tables.
	pointerSize = 8

	// maxHost bounds the offsets that an L2 entry can name.
	maxHost = 1 << 56

	// namesFrom is the smallest cluster with room for the names of features.
	namesFrom = 8 << 10
)

// plan is where everything goes. Parts are counted in clusters and follow
// each other in this order, after the header.
type plan struct {
	opt           Options
	geo           format.Geometry
	preallocation Preallocation
	head          []byte // the header, encoded

	refTable, blocks, l1, l2, data int64
}

func (p *plan) refTableAt() int64 { return 1 }
func (p *plan) blocksAt() int64   { return p.refTableAt() + p.refTable }
func (p *plan) l1At() int64       { return p.blocksAt() + p.blocks }
func (p *plan) l2At() int64       { return p.l1At() + p.l1 }
func (p *plan) dataAt() int64     { return p.l2At() + p.l2 }
func (p *plan) total() int64      { return p.dataAt() + p.data }

// end is the length of the file in bytes.
func (p *plan) end() int64 { return p.total() << p.geo.ClusterBits }

// guestClusters is how many clusters the disk has.
func (p *plan) guestClusters() int64 { return p.geo.Clusters(p.opt.Size) }

// cluster is the mapping of a guest cluster of a preallocated disk.
func (p *plan) cluster(i int64) format.Cluster {
	c := format.Cluster{Host: i << p.geo.ClusterBits, Copied: true}
	if !p.geo.DataFile {
		c.Host += p.dataAt() << p.geo.ClusterBits
	}
	if p.opt.Backing == "" {
		c.Data = p.geo.AllSubs()
	}
	return c
}

// newPlan checks o and counts.
func newPlan(o Options) (*plan, error) {
	o = o.withDefaults()
	if err := o.check(); err != nil {
		return nil, err
	}
	p := &plan{opt: o, preallocation: o.Preallocation, geo: format.NewGeometry(o.Version,
		log2(o.ClusterSize), log2(int64(o.RefcountBits)), o.ExtendedL2, o.DataFile != "")}
	l1Size := p.geo.L1Size(o.Size)
	if l1Size > format.MaxL1/pointerSize {
		return nil, refuse("size", "%d bytes are more than %d-byte clusters can map", o.Size, o.ClusterSize)
	}
	p.l1 = p.geo.Clusters(l1Size * pointerSize)
	if o.Preallocation != Off {
		p.l2 = l1Size
		if o.DataFile == "" {
			p.data = p.guestClusters()
		}
		if o.Size > maxHost/2 {
			return nil, refuse("preallocation", "%d bytes are too many", o.Size)
		}
	}
	if err := p.countRefcounts(); err != nil {
		return nil, err
	}
	if err := p.encodeHeader(l1Size); err != nil {
		return nil, err
	}
	return p, nil
}

// countRefcounts finds how many refcount blocks count everything, themselves
// included.
func (p *plan) countRefcounts() error {
	g := &p.geo
	for {
		blocks := divideUp(p.total(), g.BlockEntries)
		table := g.Clusters(blocks * pointerSize)
		if table<<g.ClusterBits > format.MaxRefTable {
			return refuse("preallocation", "%d clusters are more than refcounts of %d bits can count",
				p.total(), p.opt.RefcountBits)
		}
		if blocks == p.blocks && table == p.refTable {
			return nil
		}
		p.blocks, p.refTable = blocks, table
	}
}

// encodeHeader needs all the numbers.
func (p *plan) encodeHeader(l1Size int64) error {
	o, g := &p.opt, &p.geo
	h := &format.Header{
		Version: uint32(o.Version), ClusterBits: uint32(g.ClusterBits), Size: uint64(o.Size),
		L1Size:         uint32(l1Size),
		RefTableOffset: uint64(p.refTableAt()) << g.ClusterBits, RefTableClusters: uint32(p.refTable),
		RefcountOrder: uint32(g.RefcountOrder), Compression: o.Compression,
		Backing: o.Backing, BackingFormat: o.BackingFormat, DataFile: o.DataFile,
	}
	if l1Size > 0 {
		h.L1Offset = uint64(p.l1At()) << g.ClusterBits
	}
	if o.ExtendedL2 {
		h.Incompat |= format.IncompatExtendedL2
	}
	if o.Compression != format.Deflate {
		h.Incompat |= format.IncompatCompression
	}
	if o.DataFile != "" {
		h.Incompat |= format.IncompatDataFile
	}
	if o.DataFileRaw {
		h.Autoclear |= format.AutoclearRawData
	}
	if o.Version == 3 && o.ClusterSize >= namesFrom {
		h.FeatureNames = featureNames()
	}
	var err error
	if p.head, err = h.Encode(); err != nil {
		return refuse("cluster size", "%v", err)
	}
	return nil
}

// featureNames lets programs that do not know a feature name it.
func featureNames() []format.FeatureName {
	return []format.FeatureName{
		{Kind: 0, Bit: 0, Name: "dirty bit"},
		{Kind: 0, Bit: 1, Name: "corrupt bit"},
		{Kind: 0, Bit: 2, Name: "external data file"},
		{Kind: 0, Bit: 3, Name: "compression type"},
		{Kind: 0, Bit: 4, Name: "extended L2 entries"},
		{Kind: 1, Bit: 0, Name: "lazy refcounts"},
		{Kind: 2, Bit: 0, Name: "bitmaps"},
		{Kind: 2, Bit: 1, Name: "raw external data"},
	}
}

// log2 of a power of two.
func log2(n int64) uint { return uint(bits.TrailingZeros64(uint64(n))) }

func divideUp(n, d int64) int64 { return n/d + min(1, n%d) }

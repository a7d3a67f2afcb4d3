// Package format is the qcow2 file format as bytes: header, extensions, table
// entries, refcounts, snapshot table, bitmap directory. It does no I/O; every
// function is pure. Rules are cited by section of QEMU's
// docs/interop/qcow2.rst.
package format

import "fmt"

// Bounds of the format and of QEMU, which all images keep.
const (
	MinClusterBits = 9
	MaxClusterBits = 21

	// MaxL1 and MaxRefTable bound two tables, in bytes.
	MaxL1       = 32 << 20
	MaxRefTable = 8 << 20

	// subclusters of one cluster with extended L2 entries.
	subclusters = 32
)

// Corrupt says what is wrong with the bytes of an image.
type Corrupt string

func (c Corrupt) Error() string { return string(c) }

// ErrOther is that a file is no qcow2 image at all.
const ErrOther = Corrupt("image is not in qcow2 format")

func corrupt(text string, args ...any) error { return Corrupt(fmt.Sprintf(text, args...)) }

// Geometry is what the numbers of a header amount to. All sizes are in bytes.
type Geometry struct {
	Version     int // 2 or 3
	ClusterBits uint
	ClusterSize int64

	// Extended: L2 entries have 16 bytes and a bitmap of 32 subclusters.
	Extended   bool
	Subs       int   // subclusters of a cluster: 1 or 32
	SubSize    int64 // bytes of a subcluster
	EntrySize  int64 // of an L2 entry: 8 or 16
	L2Entries  int64 // in one L2 table, which is one cluster
	L2Coverage int64 // guest bytes that one L2 table maps

	RefcountOrder uint  // refcounts have 1<<RefcountOrder bits
	BlockEntries  int64 // refcounts in one block, which is one cluster

	// DataFile: guest clusters lie in an external file, at their guest offset.
	DataFile bool
}

// NewGeometry does the arithmetic; its arguments have been checked.
func NewGeometry(version int, clusterBits, refcountOrder uint, extended, dataFile bool) Geometry {
	g := Geometry{
		Version: version, ClusterBits: clusterBits, ClusterSize: 1 << clusterBits,
		Extended: extended, Subs: 1, EntrySize: 8, RefcountOrder: refcountOrder, DataFile: dataFile,
	}
	if extended {
		g.Subs, g.EntrySize = subclusters, 16
	}
	g.SubSize = g.ClusterSize / int64(g.Subs)
	g.L2Entries = g.ClusterSize / g.EntrySize
	g.L2Coverage = g.L2Entries << clusterBits
	g.BlockEntries = g.ClusterSize * 8 >> refcountOrder
	return g
}

// AllSubs is the set of all subclusters of a cluster.
func (g *Geometry) AllSubs() uint32 { return uint32(1<<g.Subs - 1) }

// Clusters is the number of clusters that n bytes take.
func (g *Geometry) Clusters(n int64) int64 {
	return n>>g.ClusterBits + (n&(g.ClusterSize-1)+g.ClusterSize-1)>>g.ClusterBits
}

// L1Size is the number of L1 entries that a disk of size bytes needs.
func (g *Geometry) L1Size(size int64) int64 {
	return size/g.L2Coverage + min(1, size%g.L2Coverage)
}

// Aligned reports whether off is the start of a cluster.
func (g *Geometry) Aligned(off int64) bool { return off&(g.ClusterSize-1) == 0 }

package qcow2

import (
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// hostRange is [from, to) of the image file, in bytes.
type hostRange struct{ from, to int64 }

// metadata is where the tables of an image lie, so that nothing else is read
// from there. It takes 16 bytes for each table of many clusters and 8 for each
// of one cluster, however large and sparse the file is. Immutable after seal.
type metadata struct {
	clusterSize int64
	ranges      []hostRange // whole clusters, sorted and apart after seal
	singles     []int64     // offsets of clusters, sorted after seal
}

// addRange puts all clusters in that [off, off+n) touches; the range lies in
// the file.
func (m *metadata) addRange(off, n int64) {
	if n <= 0 {
		return
	}
	mask := m.clusterSize - 1
	m.ranges = append(m.ranges, hostRange{off &^ mask, (off+n-1)&^mask + m.clusterSize})
}

// addCluster puts one cluster in.
func (m *metadata) addCluster(off int64) { m.singles = append(m.singles, off) }

// reserve makes room for what part of a table names.
func (m *metadata) reserve(table []byte) {
	n := 0
	for ; len(table) >= 8; table = table[8:] {
		if be64(table) != 0 {
			n++
		}
	}
	m.singles = slices.Grow(m.singles, n)
}

// seal sorts what was added.
func (m *metadata) seal() {
	slices.SortFunc(m.ranges, func(a, b hostRange) int { return compare(a.from, b.from) })
	merged := m.ranges[:0]
	for _, r := range m.ranges {
		if last := len(merged) - 1; last >= 0 && merged[last].to >= r.from {
			merged[last].to = max(merged[last].to, r.to)
			continue
		}
		merged = append(merged, r)
	}
	m.ranges = slices.Clip(merged)
	slices.Sort(m.singles)
	m.singles = slices.Clip(slices.Compact(m.singles))
}

func compare(a, b int64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// gap is the largest range around off that has no metadata; it is empty when
// off lies in some. Only after seal.
func (m *metadata) gap(off int64) hostRange {
	free := hostRange{0, maxHost}
	i, _ := slices.BinarySearchFunc(m.ranges, off, func(r hostRange, off int64) int { return compare(r.from, off+1) })
	if i > 0 {
		free.from = m.ranges[i-1].to
	}
	if i < len(m.ranges) {
		free.to = m.ranges[i].from
	}
	j, _ := slices.BinarySearch(m.singles, off+1)
	if j > 0 {
		free.from = max(free.from, m.singles[j-1]+m.clusterSize)
	}
	if j < len(m.singles) {
		free.to = min(free.to, m.singles[j])
	}
	if off < free.from {
		return hostRange{}
	}
	return free
}

// maxHost is beyond every offset that an entry can name.
const maxHost = 1 << 62

// addBlocks puts in the refcount blocks that part of a refcount table names,
// as far as they begin in a file of fileSize bytes.
func (m *metadata) addBlocks(g *format.Geometry, table []byte, fileSize int64) {
	for ; len(table) >= 8; table = table[8:] {
		off, err := g.DecodeRefTable(be64(table))
		if err == nil && off > 0 && off < fileSize {
			m.addCluster(off)
		}
	}
}

// addTables puts in the L2 tables that part of an L1 table names, as far as
// they begin in a file of fileSize bytes.
func (m *metadata) addTables(g *format.Geometry, l1 []byte, fileSize int64) {
	for ; len(l1) >= 8; l1 = l1[8:] {
		off, _, err := g.DecodeL1(be64(l1))
		if err == nil && off > 0 && off < fileSize {
			m.addCluster(off)
		}
	}
}

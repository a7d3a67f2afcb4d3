package format

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"unicode"
)

// More bounds of QEMU, which all images keep.
const (
	MaxBackingName   = 1023 // bytes
	MaxBackingFormat = 15   // bytes
	MaxSnapshots     = 65536

	// maxDisk is the largest disk whose size and offsets are signed 64-bit
	// numbers and which consists of whole sectors.
	maxDisk = 1<<63 - sector

	// minExtendedBits is the smallest cluster whose 32 subclusters have a
	// sector or more each.
	minExtendedBits = 14
)

// Unsupported says what an image needs and this program does not have.
type Unsupported string

func (u Unsupported) Error() string { return string(u) }

func unsupported(text string, args ...any) error { return Unsupported(fmt.Sprintf(text, args...)) }

// be reads big-endian numbers at fixed places of bytes known to be there.
type be []byte

func (b be) u16(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
func (b be) u32(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
func (b be) u64(at int) uint64 { return binary.BigEndian.Uint64(b[at:]) }

// Begins tells whether a disk of so many bytes begins as a qcow2 image. A guest may
// have written that to a raw disk. What cannot be read does not.
func Begins(ctx context.Context, disk interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}, size int64) bool {
	b := make(be, 4)
	return size >= int64(len(b)) && disk.ReadAt(ctx, b, 0) == nil && b.u32(0) == Magic
}

// ClusterSize reads magic, version and cluster_bits from the first 24 bytes of
// a file, so that the caller can read the first cluster. The size is in bytes.
// Its errors are Corrupt or Unsupported.
func ClusterSize(b []byte) (int64, error) {
	if len(b) < 4 || be(b).u32(0) != Magic {
		return 0, ErrOther
	}
	if len(b) < 24 {
		return 0, corrupt("file ends within the qcow2 header")
	}
	if v := be(b).u32(4); v != 2 && v != 3 {
		return 0, unsupported("unsupported qcow2 version %d", v)
	}
	bits := be(b).u32(20)
	if bits < MinClusterBits || bits > MaxClusterBits {
		return 0, corrupt("unsupported cluster size: 2^%d", bits)
	}
	return 1 << bits, nil
}

// ParseHeader reads the header from the first cluster; b is shorter where the
// file ends before. It copies what it keeps. Whether the places it names lie in
// the file is for Within to say. Its errors are Corrupt or Unsupported.
func ParseHeader(b []byte) (*Header, error) {
	size, err := ClusterSize(b)
	if err != nil {
		return nil, err
	}
	b = b[:min(int64(len(b)), size)]
	h := &Header{}
	if err := h.parseFixed(b); err != nil {
		return nil, err
	}
	end, err := h.parseBacking(b, size)
	if err != nil {
		return nil, err
	}
	extErr := h.parseExtensions(b[h.Length:end])
	// An image of unknown features may have extensions of another form.
	if err := h.checkIncompat(); err != nil {
		return nil, err
	}
	if extErr != nil {
		return nil, extErr
	}
	if err := h.checkFeatures(); err != nil {
		return nil, err
	}
	return h, h.checkTables()
}

// parseFixed reads the fixed fields but for the place of the backing name.
func (h *Header) parseFixed(b be) error {
	if len(b) < headerV2 {
		return corrupt("file ends within the qcow2 header")
	}
	h.Version, h.ClusterBits = b.u32(4), b.u32(20)
	h.Size = b.u64(OffSize) &^ (sector - 1)
	h.L1Size, h.L1Offset = b.u32(OffL1), b.u64(OffL1+4)
	h.RefTableOffset, h.RefTableClusters = b.u64(OffRefTable), b.u32(OffRefTable+8)
	h.Snapshots, h.SnapshotsOffset = b.u32(OffSnapshots), b.u64(OffSnapshots+4)
	switch crypt := b.u32(offCrypt); crypt {
	case 0:
	case 1:
		return unsupported("AES-CBC encrypted images are not supported")
	case 2:
		return unsupported("LUKS encrypted images are not supported")
	default:
		return unsupported("unsupported encryption method %d", crypt)
	}
	h.RefcountOrder, h.Length = 4, headerV2
	if h.Version == 2 {
		return nil
	}
	return h.parseV3(b)
}

// parseV3 reads the fields that version 3 added.
func (h *Header) parseV3(b be) error {
	if len(b) < headerV3 {
		return corrupt("file ends within the qcow2 header")
	}
	h.Incompat, h.Compat, h.Autoclear = b.u64(OffIncompat), b.u64(OffCompat), b.u64(OffAutoclear)
	h.RefcountOrder, h.Length = b.u32(offOrder), b.u32(offLength)
	switch {
	case h.Length < headerV3:
		return corrupt("qcow2 header too short: %d bytes", h.Length)
	case h.Length > 1<<h.ClusterBits:
		return corrupt("qcow2 header exceeds cluster size: %d bytes", h.Length)
	case h.Length%8 != 0:
		return corrupt("qcow2 header length %d is not a multiple of 8", h.Length)
	case int(h.Length) > len(b):
		return corrupt("file ends within the qcow2 header")
	case h.RefcountOrder > 6:
		return corrupt("reference count entry width too large: 2^%d bits", h.RefcountOrder)
	}
	if h.Length >= headerCompressed {
		h.Compression = Compression(b[headerV3])
		h.Unknown = bytes.Clone(b[headerCompressed:h.Length])
	}
	return nil
}

// parseBacking reads the name of the backing file and says where the area of
// the extensions ends.
func (h *Header) parseBacking(b be, clusterSize int64) (end int64, err error) {
	off, n := b.u64(8), b.u32(16)
	switch {
	case off == 0 && n == 0:
		return int64(len(b)), nil
	case off == 0 || n == 0:
		return 0, corrupt("backing file name of %d bytes at offset %#x", n, off)
	case off < uint64(h.Length) || off > uint64(clusterSize):
		return 0, corrupt("invalid backing file offset %#x", off)
	case n > MaxBackingName || off+uint64(n) > uint64(clusterSize):
		return 0, corrupt("backing file name too long: %d bytes", n)
	case off+uint64(n) > uint64(len(b)):
		return 0, corrupt("file ends within the backing file name")
	}
	h.Backing = string(b[off : off+uint64(n)])
	return int64(off), checkName("backing file name", h.Backing)
}

// HasControl tells of characters that another program may cut a name at, or
// that would garble a log: no name in an image has them.
func HasControl(name string) bool { return strings.ContainsFunc(name, unicode.IsControl) }

func checkName(what, name string) error {
	if HasControl(name) {
		return corrupt("%s %q has control characters", what, name)
	}
	return nil
}

// checkIncompat refuses what must be understood and is not.
func (h *Header) checkIncompat() error {
	unknown := h.Incompat &^ knownIncompat
	if unknown == 0 {
		return nil
	}
	var names []string
	for bit := range 64 {
		if unknown>>bit&1 != 0 {
			names = append(names, h.featureName(uint8(bit)))
		}
	}
	return unsupported("unsupported qcow2 features: %s", strings.Join(names, ", "))
}

// featureName names an incompatible feature as the image does.
func (h *Header) featureName(bit uint8) string {
	for _, f := range h.FeatureNames {
		if f.Kind == 0 && f.Bit == bit && f.Name != "" {
			return fmt.Sprintf("%q", f.Name)
		}
	}
	return fmt.Sprintf("bit %d", bit)
}

// checkFeatures refuses features that contradict each other or the fields.
func (h *Header) checkFeatures() error {
	has := func(bit uint64) bool { return h.Incompat&bit != 0 }
	raw := h.Autoclear&AutoclearRawData != 0
	switch {
	case has(IncompatCompression) && h.Compression == Deflate:
		return corrupt("compression type incompatible feature bit must not be set")
	case !has(IncompatCompression) && h.Compression != Deflate:
		return corrupt("compression type incompatible feature bit must be set")
	case h.Compression > Zstd:
		return unsupported("unknown compression type %d", h.Compression)
	case has(IncompatExtendedL2) && h.ClusterBits < minExtendedBits:
		return corrupt("extended L2 entries need clusters of %d bytes or more", 1<<minExtendedBits)
	case raw && !has(IncompatDataFile):
		return corrupt("data-file-raw requires a data file")
	case raw && h.Backing != "":
		return corrupt("data-file-raw excludes a backing file")
	}
	return nil
}

// checkTables bounds the tables by what QEMU writes.
func (h *Header) checkTables() error {
	g := h.Geometry()
	if h.Size > maxDisk {
		return corrupt("image is too big: %d bytes", h.Size)
	}
	if err := g.CheckL1(h.L1Offset, h.L1Size, h.Size); err != nil {
		return err
	}
	switch {
	case h.RefTableClusters == 0:
		return corrupt("image does not contain a reference count table")
	case int64(h.RefTableClusters) > MaxRefTable>>g.ClusterBits:
		return corrupt("reference count table too large: %d clusters", h.RefTableClusters)
	case !g.validTable(h.RefTableOffset, int64(h.RefTableClusters)<<g.ClusterBits):
		return corrupt("reference count table offset %#x invalid", h.RefTableOffset)
	case h.Snapshots > MaxSnapshots:
		return corrupt("snapshot table too large: %d snapshots", h.Snapshots)
	case !g.validTable(h.SnapshotsOffset, h.LeastSnapshotTable()):
		return corrupt("snapshot table offset %#x invalid", h.SnapshotsOffset)
	case h.Snapshots > 0 && h.SnapshotsOffset == 0:
		return corrupt("snapshot table offset is 0")
	}
	return nil
}

// CheckL1 refuses an L1 table of entries that is too large, does not cover a
// disk of size bytes or cannot lie at off. It does not know where the file
// ends. Its errors are Corrupt.
func (g *Geometry) CheckL1(off uint64, entries uint32, size uint64) error {
	switch {
	case size > maxDisk:
		return corrupt("image is too big: %d bytes", size)
	case entries > MaxL1/8:
		return corrupt("L1 table too large: %d entries", entries)
	case int64(entries) < g.L1Size(int64(size)):
		return corrupt("L1 table is too small: %d entries, the disk needs %d", entries, g.L1Size(int64(size)))
	case !g.validTable(off, int64(entries)*8):
		return corrupt("L1 table offset %#x invalid", off)
	case entries > 0 && off == 0:
		return corrupt("L1 table offset is 0")
	}
	return nil
}

// validTable reports whether n bytes can lie at off at all.
func (g *Geometry) validTable(off uint64, n int64) bool {
	return off <= math.MaxInt64 && g.Aligned(int64(off)) && int64(off) <= math.MaxInt64-n
}

// Within refuses tables that the file does not have: size is that of the file
// in bytes. The refcounts count only for an image that will be written to. Its
// errors are Corrupt.
func (h *Header) Within(size int64, write bool) error {
	clusterSize := int64(1) << h.ClusterBits
	inside := func(off uint64, n int64) bool { return int64(off) <= size-n }
	switch {
	case h.L1Size > 0 && !inside(h.L1Offset, int64(h.L1Size)*8):
		return corrupt("L1 table at %#x lies beyond the end of the file", h.L1Offset)
	case h.Snapshots > 0 && !inside(h.SnapshotsOffset, snapshotFixed):
		return corrupt("snapshot table at %#x lies beyond the end of the file", h.SnapshotsOffset)
	case !write:
	case h.RefTableOffset == 0:
		return corrupt("reference count table offset is 0")
	case !inside(h.RefTableOffset, int64(h.RefTableClusters)*clusterSize):
		return corrupt("reference count table at %#x lies beyond the end of the file", h.RefTableOffset)
	}
	return nil
}

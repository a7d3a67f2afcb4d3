package format

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
)

// Bounds of QEMU for bitmaps (section "Bitmaps").
const (
	MaxBitmaps     = 65535
	MaxBitmapDir   = 1024 * MaxBitmaps // bytes
	MaxBitmapTable = 0x8000000         // entries
	MaxBitmapData  = 512 << 20         // bytes
	MaxBitmapName  = 1023              // bytes

	MinGranularityBits = 9
	MaxGranularityBits = 31
)

const (
	bitmapFixed    = 24
	bitmapDirty    = 1 // the only type
	bitmapInUse    = 1 << 0
	bitmapAuto     = 1 << 1
	bitmapExtra    = 1 << 2
	bitmapFlags    = bitmapInUse | bitmapAuto | bitmapExtra
	bitmapOnes     = 1
	bitmapReserved = 0xff000000000001fe
)

// Bitmap is an entry of the bitmap directory (section "Bitmap directory").
type Bitmap struct {
	Name         string // bytes as the file has them: quote it in a log
	TableOffset  int64
	TableEntries uint32

	InUse           bool // not stored after its last change: inconsistent
	Auto            bool // to be kept up to date by whoever writes to the disk
	ExtraCompatible bool // usable by readers that do not know Extra

	GranularityBits uint8 // a bit stands for 1<<GranularityBits guest bytes
	Extra           []byte
}

// ParseBitmaps reads the n entries of a bitmap directory, which fill dir.
// Nothing of dir is kept. What depends on the image is for Check to say. Its
// errors are Corrupt.
func ParseBitmaps(dir []byte, n int) ([]Bitmap, error) {
	if n < 0 || n > MaxBitmaps || len(dir) > MaxBitmapDir || n > len(dir)/bitmapFixed {
		return nil, corrupt("bitmap directory of %d bytes cannot have %d bitmaps", len(dir), n)
	}
	list := make([]Bitmap, n)
	seen := make(map[string]bool, n)
	for i := range list {
		size, err := list[i].parse(dir)
		if err != nil {
			return nil, corrupt("bitmap %d: %v", i, err)
		}
		if seen[list[i].Name] {
			return nil, corrupt("bitmap %d: the name %q occurs twice", i, list[i].Name)
		}
		seen[list[i].Name] = true
		dir = dir[size:]
	}
	if len(dir) != 0 {
		return nil, corrupt("broken bitmap directory: %d bytes more than its bitmaps", len(dir))
	}
	return list, nil
}

// parse reads the entry that dir begins with and says how long it is.
func (m *Bitmap) parse(dir be) (size int, err error) {
	if len(dir) < bitmapFixed {
		return 0, corrupt("broken bitmap directory: it ends within the entry")
	}
	off, flags, kind, nameLen, extraLen := dir.u64(0), dir.u32(12), dir[16], int(dir.u16(18)), dir.u32(20)
	m.TableEntries, m.GranularityBits = dir.u32(8), dir[17]
	switch {
	case off == 0 || off > math.MaxInt64:
		return 0, corrupt("table offset %#x invalid", off)
	case m.TableEntries == 0 || m.TableEntries > MaxBitmapTable:
		return 0, corrupt("table of %d entries", m.TableEntries)
	case flags&^bitmapFlags != 0:
		return 0, corrupt("flags %#x have reserved bits set", flags)
	case kind != bitmapDirty:
		return 0, corrupt("unknown type %d", kind)
	case m.GranularityBits < MinGranularityBits || m.GranularityBits > MaxGranularityBits:
		return 0, corrupt("granularity 2^%d", m.GranularityBits)
	case nameLen == 0 || nameLen > MaxBitmapName:
		return 0, corrupt("name of %d bytes", nameLen)
	case padded(bitmapFixed+int64(extraLen)+int64(nameLen)) > int64(len(dir)):
		return 0, corrupt("broken bitmap directory: it ends within the entry")
	}
	name := bitmapFixed + int(extraLen)
	end := name + nameLen
	m.TableOffset = int64(off)
	m.InUse, m.Auto, m.ExtraCompatible = flags&bitmapInUse != 0, flags&bitmapAuto != 0, flags&bitmapExtra != 0
	m.Extra = bytes.Clone(dir[bitmapFixed:name])
	m.Name = string(dir[name:end])
	return int(padded(int64(end))), nil
}

// Usable reports whether the bits can be believed and are understood.
func (m *Bitmap) Usable() bool { return !m.InUse && (len(m.Extra) == 0 || m.ExtraCompatible) }

// Check refuses a bitmap whose table cannot lie where it should or does not
// suit a disk of size bytes. Its errors are Corrupt.
func (m *Bitmap) Check(g *Geometry, size int64) error {
	data := int64(m.TableEntries) << g.ClusterBits
	gran := int64(1) << m.GranularityBits
	bits := size/gran + min(1, size%gran)
	need := g.Clusters(bits/8 + min(1, bits%8))
	switch {
	case !g.validTable(uint64(m.TableOffset), int64(m.TableEntries)*8):
		return corrupt("bitmap %q: table offset %#x invalid", m.Name, m.TableOffset)
	case data > MaxBitmapData:
		return corrupt("bitmap %q: too large: %d bytes", m.Name, data)
	case !m.InUse && int64(m.TableEntries) != need:
		return corrupt("bitmap %q: table of %d entries, the disk needs %d", m.Name, m.TableEntries, need)
	}
	return nil
}

// EncodeBitmaps is the reverse of ParseBitmaps. It fails when the list breaks
// a bound of the directory.
func EncodeBitmaps(list []Bitmap) ([]byte, error) {
	if len(list) > MaxBitmaps {
		return nil, fmt.Errorf("%d bitmaps are more than %d", len(list), MaxBitmaps)
	}
	var b []byte
	for i := range list {
		m := &list[i]
		if len(m.Name) == 0 || len(m.Name) > MaxBitmapName || len(m.Extra) > MaxBitmapDir {
			return nil, fmt.Errorf("bitmap %d cannot be written: name of %d bytes, extra data of %d",
				i, len(m.Name), len(m.Extra))
		}
		b = m.append(b)
		if len(b) > MaxBitmapDir {
			return nil, fmt.Errorf("bitmap directory is larger than %d bytes", MaxBitmapDir)
		}
	}
	return b, nil
}

func (m *Bitmap) append(b []byte) []byte {
	var flags uint32
	for _, f := range []struct {
		set bool
		bit uint32
	}{{m.InUse, bitmapInUse}, {m.Auto, bitmapAuto}, {m.ExtraCompatible, bitmapExtra}} {
		if f.set {
			flags |= f.bit
		}
	}
	w := binary.BigEndian
	b = w.AppendUint64(b, uint64(m.TableOffset))
	b = w.AppendUint32(b, m.TableEntries)
	b = w.AppendUint32(b, flags)
	b = append(b, bitmapDirty, m.GranularityBits)
	b = w.AppendUint16(b, uint16(len(m.Name)))
	b = w.AppendUint32(b, uint32(len(m.Extra)))
	b = append(b, m.Extra...)
	return appendPadded(b, []byte(m.Name))
}

// DecodeBitmapTable splits an entry of a bitmap table: the offset of a cluster
// of bits, or 0, and then ones says what they all are. It does not know where
// clusters may lie. Its errors are Corrupt.
func (g *Geometry) DecodeBitmapTable(e uint64) (off int64, ones bool, err error) {
	off, ones = int64(e&OffsetMask), e&bitmapOnes != 0
	switch {
	case e&bitmapReserved != 0 || ones && off != 0:
		return 0, false, corrupt("bitmap table entry %#x has reserved bits set", e)
	case !g.Aligned(off):
		return 0, false, corrupt("bitmap cluster at %#x is not on a cluster boundary", off)
	}
	return off, ones, nil
}

// EncodeBitmapTable is the reverse of DecodeBitmapTable.
func EncodeBitmapTable(off int64, ones bool) uint64 {
	if ones {
		return bitmapOnes
	}
	return uint64(off)
}

package format

import (
	"encoding/binary"
	"fmt"
)

// Encode makes the whole first cluster: the fixed fields, Unknown, the
// extensions in the order in which QEMU writes them, the end marker, and the
// name of the backing file. What BitmapsErr stands for and stale bitmaps are
// not in it. It fails when the parts do not fit into the cluster; h must make
// sense otherwise.
func (h *Header) Encode() ([]byte, error) {
	fixed, err := h.encodeFixed()
	if err != nil {
		return nil, err
	}
	b := h.appendExtensions(fixed)
	clusterSize := 1 << h.ClusterBits
	if n := len(b) + len(h.Backing); n > clusterSize || len(h.Backing) > MaxBackingName {
		return nil, fmt.Errorf("header of %d bytes with a backing file name of %d does not fit into a cluster of %d",
			n, len(h.Backing), clusterSize)
	}
	if h.Backing != "" {
		binary.BigEndian.PutUint64(b[8:], uint64(len(b)))
		binary.BigEndian.PutUint32(b[16:], uint32(len(h.Backing)))
		b = append(b, h.Backing...)
	}
	return append(b, make([]byte, clusterSize-len(b))...), nil
}

func (h *Header) encodeFixed() ([]byte, error) {
	length := headerV2
	switch {
	case h.Version == 2:
		if h.Incompat|h.Compat|h.Autoclear != 0 || h.RefcountOrder != 4 || len(h.Unknown) != 0 {
			return nil, fmt.Errorf("header of version 2 cannot hold features")
		}
	case h.Length == headerV3 && h.Compression == Deflate && len(h.Unknown) == 0:
		length = headerV3
	default:
		length = headerCompressed + len(h.Unknown)
	}
	if length%8 != 0 {
		return nil, fmt.Errorf("unknown header fields of %d bytes", len(h.Unknown))
	}
	w := binary.BigEndian
	b := make([]byte, max(length, headerCompressed))
	w.PutUint32(b, Magic)
	w.PutUint32(b[4:], h.Version)
	w.PutUint32(b[20:], h.ClusterBits)
	w.PutUint64(b[OffSize:], h.Size)
	w.PutUint32(b[OffL1:], h.L1Size)
	w.PutUint64(b[OffL1+4:], h.L1Offset)
	w.PutUint64(b[OffRefTable:], h.RefTableOffset)
	w.PutUint32(b[OffRefTable+8:], h.RefTableClusters)
	w.PutUint32(b[OffSnapshots:], h.Snapshots)
	w.PutUint64(b[OffSnapshots+4:], h.SnapshotsOffset)
	w.PutUint64(b[OffIncompat:], h.Incompat)
	w.PutUint64(b[OffCompat:], h.Compat)
	w.PutUint64(b[OffAutoclear:], h.Autoclear)
	w.PutUint32(b[offOrder:], h.RefcountOrder)
	w.PutUint32(b[offLength:], uint32(length))
	b[headerV3] = byte(h.Compression)
	if length > headerCompressed {
		copy(b[headerCompressed:], h.Unknown)
	}
	return b[:length], nil
}

func (h *Header) appendExtensions(b []byte) []byte {
	if h.BackingFormat != "" {
		b = appendExtension(b, extBackingFormat, []byte(h.BackingFormat))
	}
	if h.DataFile != "" {
		b = appendExtension(b, extDataFile, []byte(h.DataFile))
	}
	if len(h.FeatureNames) != 0 {
		table := make([]byte, len(h.FeatureNames)*featureEntry)
		for i, f := range h.FeatureNames {
			e := table[i*featureEntry:][:featureEntry]
			e[0], e[1] = f.Kind, f.Bit
			copy(e[2:], f.Name)
		}
		b = appendExtension(b, extFeatureNames, table)
	}
	if x := h.Bitmaps; x != nil {
		var data []byte
		data = binary.BigEndian.AppendUint64(data, uint64(x.Count)<<32)
		data = binary.BigEndian.AppendUint64(data, x.DirSize)
		data = binary.BigEndian.AppendUint64(data, x.DirOffset)
		b = appendExtension(b, extBitmaps, data)
	}
	for _, x := range h.Extensions {
		b = appendExtension(b, x.Type, x.Data)
	}
	return appendExtension(b, extEnd, nil)
}

func appendExtension(b []byte, kind uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return appendPadded(b, data)
}

// appendPadded appends data and the zeroes that align the end of b, which
// begins aligned, to 8 bytes.
func appendPadded(b, data []byte) []byte {
	b = append(b, data...)
	return append(b, make([]byte, padded(int64(len(b)))-int64(len(b)))...)
}

package format

import (
	"bytes"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Types of header extensions (section "Header extensions").
const (
	extEnd           = 0x00000000
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

const (
	extHead         = 8  // type and length
	featureEntry    = 48 // kind, bit, name
	bitmapsExtBytes = 24
)

// known reports the types that may stand in a header once only.
func known(kind uint32) bool {
	switch kind {
	case extBackingFormat, extFeatureNames, extBitmaps, extEncryption, extDataFile:
		return true
	}
	return false
}

// parseExtensions reads the extensions of area, up to the end marker.
func (h *Header) parseExtensions(area be) error {
	seen := map[uint32]bool{}
	for len(area) >= extHead {
		kind, n := area.u32(0), area.u32(4)
		area = area[extHead:]
		if uint64(n) > uint64(len(area)) {
			return corrupt("header extension %#x too large: %d bytes", kind, n)
		}
		if kind == extEnd {
			return nil
		}
		if known(kind) && seen[kind] {
			return corrupt("header extension %#x occurs twice", kind)
		}
		if known(kind) {
			seen[kind] = true
		}
		if err := h.parseExtension(kind, area[:n]); err != nil {
			return err
		}
		area = area[min(len(area), int(padded(int64(n)))):]
	}
	return nil
}

// padded is n rounded up to the 8 bytes that extensions and entries align to.
func padded(n int64) int64 { return (n + 7) &^ 7 }

func (h *Header) parseExtension(kind uint32, data be) error {
	switch {
	case kind == extBackingFormat:
		return h.parseBackingFormat(data)
	case kind == extFeatureNames:
		h.FeatureNames = parseFeatureNames(data)
	case kind == extBitmaps && h.Autoclear&AutoclearBitmaps == 0:
		h.StaleBitmaps = true
	case kind == extBitmaps:
		h.Bitmaps, h.BitmapsErr = h.parseBitmaps(data)
	case kind == extEncryption:
		return corrupt("encryption header extension in an image that is not encrypted")
	case kind == extDataFile && h.Incompat&IncompatDataFile != 0:
		if len(data) > limits.DataFileName {
			return corrupt("data file name too long: %d bytes", len(data))
		}
		h.DataFile = string(data)
		return checkName("data file name", h.DataFile)
	default:
		h.Extensions = append(h.Extensions, Extension{Type: kind, Data: bytes.Clone(data)})
	}
	return nil
}

func (h *Header) parseBackingFormat(data be) error {
	switch {
	case len(data) > MaxBackingFormat:
		return corrupt("backing format name too long: %d bytes", len(data))
	case len(data) != 0 && string(data) != "raw" && string(data) != "qcow2":
		return unsupported("backing format %q is not supported", data)
	}
	h.BackingFormat = string(data)
	return nil
}

// parseFeatureNames makes the names fit for a log. A piece of an entry at the
// end is dropped.
func parseFeatureNames(data be) []FeatureName {
	n := min(len(data)/featureEntry, limits.FeatureNames)
	if n == 0 {
		return nil
	}
	names := make([]FeatureName, n)
	for i := range names {
		e := data[i*featureEntry:][:featureEntry]
		name, _, _ := bytes.Cut(e[2:], []byte{0})
		names[i] = FeatureName{Kind: e[0], Bit: e[1], Name: printable(name)}
	}
	return names
}

// printable replaces all but the printable characters of ASCII.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(b))
}

func (h *Header) parseBitmaps(data be) (*BitmapsExtension, error) {
	if len(data) != bitmapsExtBytes {
		return nil, corrupt("bitmaps extension: invalid length %d", len(data))
	}
	x := &BitmapsExtension{Count: data.u32(0), DirSize: data.u64(8), DirOffset: data.u64(16)}
	g := h.Geometry()
	switch {
	case data.u32(4) != 0:
		return nil, corrupt("bitmaps extension: reserved field is not zero")
	case x.Count == 0:
		return nil, corrupt("bitmaps extension: found bitmaps extension with zero bitmaps")
	case x.Count > MaxBitmaps:
		return nil, corrupt("bitmaps extension: image has %d bitmaps, more than %d", x.Count, MaxBitmaps)
	case x.DirSize > MaxBitmapDir || x.DirSize < uint64(x.Count)*bitmapFixed:
		return nil, corrupt("bitmaps extension: bitmap directory of %d bytes for %d bitmaps", x.DirSize, x.Count)
	case x.DirOffset == 0 || !g.validTable(x.DirOffset, int64(x.DirSize)):
		return nil, corrupt("bitmaps extension: invalid bitmap directory offset %#x", x.DirOffset)
	}
	return x, nil
}

// Package qcow2 serves a qcow2 image and its backing chain.
//
// Read-only, an image is the top layer of a chain of immutable layers; one
// flattened map of extents answers for all of them (chain.go). For writing, the
// image is a disk above such a chain (disk.go).
//
// The package opens no files: package open resolves the names that images
// contain and hands over what it permitted.
package qcow2

import (
	"log/slog"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// Options says how an image is opened.
type Options struct {
	Path     string // for errors and logs only
	ReadOnly bool   // without it, Open writes

	// Backing is what lies below, nil for nothing. The device closes it.
	Backing Layer

	// DataFile holds the guest clusters of an image that has one, else nil.
	// The device closes it.
	DataFile store.Store

	// Snapshot serves the internal snapshot with this ID or name.
	Snapshot string

	// Lenient reads an image as QEMU does, to rescue data: what lies beyond the
	// end of the file is zeroes, reserved bits of entries do not count, and
	// clusters may lie in metadata. Only with ReadOnly.
	Lenient bool

	// CacheBytes bounds the mapping that is kept in memory, ClusterBytes the
	// decompressed clusters; 0 is limits.MapCache and limits.ClusterCache.
	CacheBytes, ClusterBytes int64

	// Discard is what becomes of clusters that the guest trims.
	Discard Discard

	// Poisoned, if not nil, is called once when nothing is written any more, with
	// what it was that failed. It does not wait for anything.
	Poisoned func(err error)

	Log *slog.Logger // nil: slog.Default
}

// Names are the files that an image asks for, as they stand in its header.
type Names struct {
	Backing, BackingFormat string
	DataFile               string // meaningful with NeedsDataFile
	NeedsDataFile          bool
}

// NamesOf collects what h asks for.
func NamesOf(h *format.Header) Names {
	return Names{
		Backing: h.Backing, BackingFormat: h.BackingFormat,
		DataFile: h.DataFile, NeedsDataFile: h.Incompat&format.IncompatDataFile != 0,
	}
}

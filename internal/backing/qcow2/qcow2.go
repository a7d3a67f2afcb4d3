// Package qcow2 serves a qcow2 image and its backing chain.
//
// An image that is opened read-only is the top layer of a chain of immutable
// layers; one flattened map of extents answers for all of them (chain.go).
// An image that is opened for writing has a writer (writer.go) above the chain
// of its backing files.
//
// The package opens no files: package open resolves the names that images
// contain and hands over what it permitted.
package qcow2

import (
	"log/slog"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// Options says how an image is opened. The zero value opens an image that has
// neither backing nor data file for reading and writing.
type Options struct {
	Path     string // for errors and logs only
	ReadOnly bool

	// Backing is what lies below, nil for nothing. The device closes it.
	Backing Layer

	// DataFile holds the guest clusters of an image that has one, else nil.
	// The device closes it.
	DataFile store.Store

	// Snapshot serves the internal snapshot with this ID or name; the image
	// must be opened read-only.
	Snapshot string

	// Discard says what a trim does.
	Discard DiscardMode

	// CacheBytes bounds the mapping that is kept in memory, ClusterBytes the
	// decompressed clusters; 0 is limits.MapCache and limits.ClusterCache.
	CacheBytes, ClusterBytes int64

	// FullAudit checks all refcounts before an image is written to, however
	// large it is; without it, that stops at limits.AuditMetadata.
	FullAudit bool

	Log *slog.Logger // nil: slog.Default
}

// DiscardMode says what a trim does.
type DiscardMode uint8

const (
	// DiscardUnmap frees the clusters.
	DiscardUnmap DiscardMode = iota
	// DiscardKeep keeps the clusters for the next write, against
	// fragmentation, and gives their storage back (QEMU's discard-no-unref).
	DiscardKeep
	// DiscardIgnore does nothing.
	DiscardIgnore
)

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

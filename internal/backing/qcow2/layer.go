package qcow2

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// Layer is an immutable image in a chain. Safe for concurrent use.
type Layer interface {
	// Size in bytes. What lies beyond reads as zeroes.
	Size() int64

	// Spans yields what the layer itself has of [off, off+n), in order and
	// without gaps, until yield returns false. The range lies in the layer.
	Spans(ctx context.Context, off, n int64, yield func(Span) bool) error

	// Below is the next layer of the chain, nil at its end.
	Below() Layer

	// Close closes the layer and those below.
	Close() error
}

// Clustered is a Layer that knows its cluster size in bytes.
type Clustered interface{ ClusterSize() int64 }

// SpanKind says where the bytes of a Span are.
type SpanKind uint8

const (
	Absent     SpanKind = iota // in the layer below
	Zero                       // they are zeroes
	Data                       // in Store at Off
	Compressed                 // in the compressed cluster at Off of Store
	Damaged                    // nowhere: the mapping is corrupt
)

// Span is a run of guest bytes of one kind.
type Span struct {
	Kind SpanKind
	Len  int64 // guest bytes

	// Data: where the bytes lie. Compressed: where the compressed data begin.
	// Zero: Store is set when a host cluster is allocated for it, at Off, else
	// nil.
	Store store.Store
	Off   int64

	// Compressed: the bound of the compressed data in bytes, and where in the
	// decompressed cluster the span begins.
	InLen int64
	Skip  int64

	// Compressed: the decompressed size of the whole cluster, and how it is
	// compressed. Skip+Len is at most Cluster.
	Cluster int64
	Codec   format.Compression

	Err error // Damaged: what is wrong
}

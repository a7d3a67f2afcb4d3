package qcow2

import (
	"context"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// gather reads the spans of one request. Compressed clusters are put off, so
// that they are decompressed side by side.
type gather struct {
	cache *clusterCache
	batch *clusterBatch // nil for nothing yet
}

type clusterBatch struct{ reads []clusterRead }

var clusterBatches = sync.Pool{New: func() any {
	return &clusterBatch{make([]clusterRead, 0, limits.ClusterBatch)}
}}

// read fills p with the bytes of s, now or when finish is called.
func (g *gather) read(ctx context.Context, s *Span, p []byte) error {
	switch s.Kind {
	case Compressed:
		return g.add(ctx, s, p)
	case Data:
		return readData(ctx, s, p)
	case Damaged:
		return s.Err
	}
	clear(p)
	return nil
}

// readData fills p. What a file never had of its last cluster is zero.
func readData(ctx context.Context, s *Span, p []byte) error {
	n, err := s.Store.ReadAt(ctx, p, s.Off)
	if err != nil {
		return err
	}
	clear(p[n:])
	return nil
}

// add has a part of a compressed cluster read into p.
func (g *gather) add(ctx context.Context, s *Span, p []byte) error {
	if g.batch == nil {
		g.batch = clusterBatches.Get().(*clusterBatch)
	}
	b := g.batch
	if len(b.reads) == cap(b.reads) {
		if err := g.cache.readAll(ctx, b.reads); err != nil {
			return err
		}
		b.reads = b.reads[:0]
	}
	key := clusterKey{store: s.Store, off: s.Off, inLen: s.InLen, size: s.Cluster, codec: s.Codec}
	b.reads = append(b.reads, clusterRead{key: key, skip: s.Skip, p: p})
	return nil
}

// finish reads what was put off.
func (g *gather) finish(ctx context.Context) error {
	if g.batch == nil {
		return nil
	}
	return g.cache.readAll(ctx, g.batch.reads)
}

// free lets go of the request's memory.
func (g *gather) free() {
	if b := g.batch; b != nil {
		clear(b.reads)
		b.reads = b.reads[:0]
		clusterBatches.Put(b)
		g.batch = nil
	}
}

// span is x as gather reads it.
func (x *piece) span() Span {
	s := Span{Kind: x.kind, Len: x.n}
	switch x.kind {
	case Data:
		s.Store, s.Off = x.store(), x.off
	case Compressed:
		s.Store, s.Off, s.Codec = x.store(), x.off, x.codec
		s.InLen, s.Skip, s.Cluster = int64(x.inLen), int64(x.skip), int64(x.cluster)
	case Damaged:
		s.Err = x.err()
	}
	return s
}

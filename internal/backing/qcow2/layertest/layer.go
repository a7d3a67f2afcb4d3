// Package layertest has layers of qcow2 chains that tests make up.
package layertest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/codec"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// Layer is a layer that consists of a list of spans.
type Layer struct {
	size   int64
	spans  []qcow2.Span
	below  qcow2.Layer
	calls  atomic.Int64
	closed atomic.Int64

	mu sync.Mutex
	// hook is called at the start of every Spans; guarded by mu.
	hook func(off, n int64) error
}

// New makes a layer of the spans, which begin at offset 0. below may be nil.
func New(below qcow2.Layer, spans ...qcow2.Span) *Layer {
	l := &Layer{below: below, spans: spans}
	for _, s := range spans {
		l.size += s.Len
	}
	return l
}

// SetHook has f called at the start of every Spans, with its range; what f
// returns other than nil is the answer.
func (l *Layer) SetHook(f func(off, n int64) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hook = f
}

// Calls is how often Spans was called.
func (l *Layer) Calls() int64 { return l.calls.Load() }

// Closed is how often Close was called.
func (l *Layer) Closed() int64 { return l.closed.Load() }

// Size is the sum of the spans.
func (l *Layer) Size() int64 { return l.size }

// Below is what New was given.
func (l *Layer) Below() qcow2.Layer { return l.below }

// Spans yields the parts of the spans that lie in the range.
func (l *Layer) Spans(ctx context.Context, off, n int64, yield func(qcow2.Span) bool) error {
	l.calls.Add(1)
	l.mu.Lock()
	hook := l.hook
	l.mu.Unlock()
	if hook != nil {
		if err := hook(off, n); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if off < 0 || n <= 0 || off > l.size-n {
		return fmt.Errorf("spans at %d+%d of a layer of %d bytes", off, n, l.size)
	}
	at := int64(0)
	for _, s := range l.spans {
		lo, hi := max(off, at), min(off+n, at+s.Len)
		if lo < hi && !yield(Part(s, lo-at, hi-lo)) {
			return nil
		}
		at += s.Len
	}
	return nil
}

// Part is the part of s that begins skip bytes into it.
func Part(s qcow2.Span, skip, n int64) qcow2.Span {
	s.Len = n
	switch s.Kind {
	case qcow2.Data:
		s.Off += skip
	case qcow2.Compressed:
		s.Skip += skip
	}
	return s
}

// Close counts, and closes the layer below.
func (l *Layer) Close() error {
	l.closed.Add(1)
	if l.below != nil {
		return l.below.Close()
	}
	return nil
}

// Random makes a layer of size bytes whose clusters are of all readable kinds,
// in a store that file makes of its contents. It also returns what a guest
// reads from it when under is what it reads from the layer below.
func Random(r *rand.Rand, size, cluster int64, below qcow2.Layer, under []byte, file func([]byte) store.Store) (*Layer, []byte) {
	guest := make([]byte, size)
	copy(guest, under)
	host := make([]byte, r.Int64N(3)*512) // nothing begins at 0 by accident
	var spans []qcow2.Span
	for at := int64(0); at < size; {
		n := min(cluster, size-at)
		s := qcow2.Span{Kind: qcow2.SpanKind(r.IntN(4)), Len: n}
		p := guest[at : at+n]
		switch s.Kind {
		case qcow2.Zero:
			clear(p)
		case qcow2.Data:
			fill(r, p, 256)
			if r.IntN(2) == 0 { // elsewhere than what came before
				host = append(host, make([]byte, 512)...)
			}
			s.Off = int64(len(host))
			host = append(host, p...)
		case qcow2.Compressed:
			fill(r, p, 4)
			s.Codec, s.Cluster = format.Compression(r.IntN(2)), cluster
			whole := make([]byte, cluster)
			copy(whole, p)
			s.Off = int64(len(host))
			var shorter bool
			if host, shorter = codec.Encode(s.Codec, host, whole); !shorter {
				clear(p)
				s = qcow2.Span{Kind: qcow2.Zero, Len: n}
			}
			s.InLen = int64(len(host)) - s.Off
		}
		spans = append(spans, s)
		at += n
	}
	st := file(host)
	for i := range spans {
		if k := spans[i].Kind; k == qcow2.Data || k == qcow2.Compressed {
			spans[i].Store = st
		}
	}
	return New(below, spans...), guest
}

// fill writes random bytes below most into p, none of them zero.
func fill(r *rand.Rand, p []byte, most int) {
	for i := range p {
		p[i] = byte(1 + r.IntN(most-1))
	}
}

package qcow2

import (
	"context"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// rawLayer is a raw image: every byte is its own, at its own offset.
type rawLayer struct {
	st   store.Store
	size int64
}

// NewRawLayer makes the lowest layer of a raw image and takes over st, also
// when it fails. The size is that of the file now.
func NewRawLayer(st store.Store) (Layer, error) {
	size, err := st.Size()
	if err != nil {
		return nil, errors.Join(backing.Wrap("open", -1, 0, err), st.Close())
	}
	return &rawLayer{st: st, size: size}, nil
}

// Size of the file in bytes.
func (l *rawLayer) Size() int64 { return l.size }

// Below is nil: a raw image names no other.
func (l *rawLayer) Below() Layer { return nil }

// Close closes the file.
func (l *rawLayer) Close() error { return l.st.Close() }

// sectorBelow is the logical sector of the block device that a chain of layers
// stands on and has byte for byte, in bytes; 0 if there is none.
func sectorBelow(l Layer) int64 {
	for l.Below() != nil {
		l = l.Below()
	}
	if r, ok := l.(*rawLayer); ok {
		return r.st.Sector()
	}
	return 0
}

// Spans yields the data of the file, and its holes as zeroes.
func (l *rawLayer) Spans(ctx context.Context, off, n int64, yield func(Span) bool) error {
	if err := checkRange("map", "", off, n, l.size); err != nil {
		return err
	}
	m := merger{yield: yield}
	end := off + n
	err := l.st.Extents(ctx, off, n, func(e backing.Extent) bool {
		s := Span{Kind: Data, Len: min(e.Len, end-off), Store: l.st, Off: off}
		if e.Zero {
			s = Span{Kind: Zero, Len: s.Len}
		}
		off += s.Len
		return m.add(s) && off < end
	})
	if err != nil && !errors.Is(err, backing.ErrNotSupported) {
		return backing.Wrap("map", off, end-off, err)
	}
	if off < end { // the file says no more of it
		m.add(Span{Kind: Data, Len: end - off, Store: l.st, Off: off})
	}
	m.flush()
	return nil
}

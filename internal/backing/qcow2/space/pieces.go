package space

import (
	"context"
	"maps"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// pieces are parts of refcount blocks, by offset in the file. Dirty ones stay
// until they are written, of the others limits.RefcountPieces do.
type pieces struct {
	clean map[int64][]byte
	dirty map[int64][]byte
}

func (s *Space) pieceSize() int64 { return min(s.g.ClusterSize, limits.RefcountPiece) }

// perPiece is the number of refcounts in a piece.
func (s *Space) perPiece() int64 { return s.pieceSize() * 8 >> s.g.RefcountOrder }

// piece is where the refcount of cluster c lies, in the block at off: the
// offset of the piece and the clusters [first, end) that it counts.
func (s *Space) piece(off, c int64) (at, first, end int64) {
	per := s.perPiece()
	first = c / per * per
	return off + first%s.g.BlockEntries/per*s.pieceSize(), first, first + per
}

// load is the piece at an offset. What the file does not have is zero.
func (s *Space) load(ctx context.Context, at int64) ([]byte, error) {
	k := &s.commit.pieces
	if p := k.dirty[at]; p != nil {
		return p, nil
	}
	if p := k.clean[at]; p != nil {
		return p, nil
	}
	p := make([]byte, s.pieceSize())
	n, err := s.st.ReadAt(ctx, p, at)
	if err != nil {
		return nil, backing.WrapIn("read refcounts", "", at, int64(len(p)), err)
	}
	clear(p[n:])
	k.keep(at, p)
	return p, nil
}

// keep puts a clean piece in and lets go of any other.
func (k *pieces) keep(at int64, p []byte) {
	for old := range k.clean {
		if len(k.clean) < limits.RefcountPieces {
			break
		}
		delete(k.clean, old)
	}
	k.clean[at] = p
}

// stain says that the piece at an offset was changed.
func (k *pieces) stain(at int64, p []byte) {
	delete(k.clean, at)
	k.dirty[at] = p
}

// writeDirty writes all dirty pieces. They never hold a decrement whose
// reference may still be in the file, so that this is right at any time.
func (s *Space) writeDirty(ctx context.Context) error {
	k := &s.commit.pieces
	for _, at := range slices.Sorted(maps.Keys(k.dirty)) {
		p := k.dirty[at]
		if err := s.st.WriteAt(ctx, p, at, false); err != nil {
			return backing.WrapIn("write refcounts", "", at, int64(len(p)), err)
		}
		delete(k.dirty, at)
		k.keep(at, p)
	}
	return nil
}

// spill writes the dirty pieces when there are many.
func (s *Space) spill(ctx context.Context) error {
	if len(s.commit.pieces.dirty) < limits.RefcountPieces {
		return nil
	}
	return s.writeDirty(ctx)
}

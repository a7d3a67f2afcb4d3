package check

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrCorrupt says that an image has more wrong than leaks.
var ErrCorrupt = errors.New("the image is corrupt, leaks cannot be told from data")

// sector is what is written at once, so that no write is torn.
const sector = 512

// RepairLeaks lowers the refcounts of the clusters that r has as leaked, and
// makes that durable. r must be the Run of the same image, which nothing may
// have changed since. Whatever is interrupted leaves some leaks behind.
//
// Autoclear bits that are not known are cleared before: what belonged to them
// is a leak (section "Header", autoclear_features). An image with corruptions
// is not touched: ErrCorrupt.
func RepairLeaks(ctx context.Context, st store.Store, h *format.Header, r *Report) error {
	if r.Corruptions > 0 || r.Errors > 0 {
		return fmt.Errorf("%w: %d corruptions, %d errors", ErrCorrupt, r.Corruptions, r.Errors)
	}
	if r.Leaks == 0 {
		return nil
	}
	if err := clearUnknown(ctx, st, h); err != nil {
		return err
	}
	g := h.Geometry()
	end := r.ImageEnd >> g.ClusterBits
	for c := int64(0); ; {
		if c = r.leaked.Next(c, end); c >= end {
			return st.Sync(ctx)
		}
		next := (c/g.BlockEntries + 1) * g.BlockEntries
		if err := repairBlock(ctx, st, h, r, c, next); err != nil {
			return err
		}
		c = next
	}
}

func clearUnknown(ctx context.Context, st store.Store, h *format.Header) error {
	bits := h.Autoclear & format.KnownAutoclear
	if h.Version < 3 || bits == h.Autoclear {
		return nil
	}
	b := binary.BigEndian.AppendUint64(nil, bits)
	if err := st.WriteAt(ctx, b, format.OffAutoclear, false); err != nil {
		return err
	}
	return st.Sync(ctx)
}

// repairBlock lowers the refcounts of the leaked clusters of [c, end), which
// have one refcount block.
func repairBlock(ctx context.Context, st store.Store, h *format.Header, r *Report, c, end int64) error {
	g := h.Geometry()
	var e [8]byte
	if err := store.ReadFull(ctx, st, e[:], int64(h.RefTableOffset)+c/g.BlockEntries*8); err != nil {
		return err
	}
	off, err := g.DecodeRefTable(binary.BigEndian.Uint64(e[:]))
	if err != nil {
		return err
	}
	per := int64(sector) * 8 >> g.RefcountOrder
	for c = r.leaked.Next(c, end); c < end; {
		first := c / per * per
		at := off + first%g.BlockEntries/per*sector
		if err := repairSector(ctx, st, &g, r, at, first, first+per); err != nil {
			return err
		}
		c = r.leaked.Next(first+per, end)
	}
	return nil
}

// repairSector sets the refcounts of the leaked clusters of [first, end),
// which lie in the sector at, to the references that were counted.
func repairSector(ctx context.Context, st store.Store, g *format.Geometry, r *Report, at, first, end int64) error {
	var p, before [sector]byte
	if err := store.ReadFull(ctx, st, p[:], at); err != nil {
		return err
	}
	before = p
	for c := r.leaked.Next(first, end); c < end; c = r.leaked.Next(c+1, end) {
		n := r.refs.get(c)
		if have := g.Refcount(p[:], c-first); have < n {
			return fmt.Errorf("%w: the refcount of cluster %d changed to %d", ErrCorrupt, c, have)
		}
		g.SetRefcount(p[:], c-first, n)
	}
	if bytes.Equal(p[:], before[:]) {
		return nil
	}
	return st.WriteAt(ctx, p[:], at, false)
}

var _ [limits.CheckPiece % sector]struct{} // a sector never spans two pieces

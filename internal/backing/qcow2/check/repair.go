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

// RepairLeaks lowers the refcounts of the clusters that r has as leaked, sets
// the copied flag of what is the disk's alone then, and makes both durable. r
// must be the Run of the same image, which nothing may have changed since.
// Whatever is interrupted leaves some leaks behind, or such flags, and can be
// done again.
//
// Autoclear bits that are not known are cleared before: what belonged to them
// is a leak (section "Header", autoclear_features). An image with other
// corruptions is not touched: ErrCorrupt.
func RepairLeaks(ctx context.Context, st store.Store, h *format.Header, r *Report) error {
	if n := r.Corruptions - r.unmarked; n > 0 || r.Errors > 0 {
		return fmt.Errorf("%w: %d corruptions, %d errors", ErrCorrupt, n, r.Errors)
	}
	if r.Leaks == 0 && r.unmarked == 0 {
		return nil
	}
	if err := clearUnknown(ctx, st, h); err != nil {
		return err
	}
	if err := lower(ctx, st, h, r); err != nil {
		return err
	}
	if err := (&marker{ctx, st, h.Geometry(), r}).l1(h); err != nil {
		return err
	}
	return st.Sync(ctx)
}

// lower sets the refcounts of all leaked clusters, durably.
func lower(ctx context.Context, st store.Store, h *format.Header, r *Report) error {
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

// ClearMarks takes the marks away, durably, that the image of h is dirty or corrupt,
// as qemu-img check does: it is for an image in which Run finds nothing, and which
// nothing may have changed since.
func ClearMarks(ctx context.Context, st store.Store, h *format.Header) error {
	bits := h.Incompat &^ (format.IncompatDirty | format.IncompatCorrupt)
	if bits == h.Incompat {
		return nil
	}
	if err := st.WriteAt(ctx, binary.BigEndian.AppendUint64(nil, bits), format.OffIncompat, false); err != nil {
		return err
	}
	if err := st.Sync(ctx); err != nil {
		return err
	}
	h.Incompat = bits
	return nil
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

// marker sets copied flags where they are missing: of what has one reference,
// which its refcount says by now.
type marker struct {
	ctx context.Context
	st  store.Store
	g   format.Geometry
	r   *Report
}

// l1 does the active L1 table and all L2 tables that it names.
func (m *marker) l1(h *format.Header) error {
	return m.table(int64(h.L1Offset), int64(h.L1Size)*8, 8, func(e uint64) (bool, error) {
		off := int64(e & format.OffsetMask)
		if off == 0 {
			return false, nil
		}
		err := m.table(off, m.g.ClusterSize, m.g.EntrySize, m.l2)
		return m.alone(off), err
	})
}

// l2 is for the entries of L2 tables: those of compressed clusters and of a data
// file have no refcount of their own.
func (m *marker) l2(e uint64) (bool, error) {
	off := int64(e & format.OffsetMask)
	return e&format.FlagCompressed == 0 && off != 0 && !m.g.DataFile && m.alone(off), nil
}

func (m *marker) alone(off int64) bool { return m.r.refs.get(off>>m.g.ClusterBits) == 1 }

// table sets the flag of those of the n bytes of entries at off that are to
// have it, a sector at a time.
func (m *marker) table(off, n, entry int64, marked func(e uint64) (bool, error)) error {
	p := make([]byte, min(n, limits.CheckPiece))
	for end := off + n; off < end; off += int64(len(p)) {
		p = p[:min(int64(len(p)), end-off)]
		if err := store.ReadPadded(m.ctx, m.st, p, off); err != nil {
			return err
		}
		for at := 0; at < len(p); at += sector {
			s := p[at:min(at+sector, len(p))]
			changed, err := mark(s, entry, marked)
			if err == nil && changed {
				err = m.st.WriteAt(m.ctx, s, off+int64(at), false)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// mark sets flags in p, a number of whole entries.
func mark(p []byte, entry int64, marked func(e uint64) (bool, error)) (changed bool, err error) {
	for ; len(p) > 0; p = p[entry:] {
		e := binary.BigEndian.Uint64(p)
		yes, err := marked(e)
		if err != nil {
			return changed, err
		}
		if yes && e&format.FlagCopied == 0 {
			binary.BigEndian.PutUint64(p, e|format.FlagCopied)
			changed = true
		}
	}
	return changed, nil
}

var _ [limits.CheckPiece % sector]struct{} // a sector never spans two pieces

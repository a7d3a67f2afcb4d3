// Package create lays out new qcow2 images.
//
// An image is header, refcount table, refcount blocks, L1 table and, when it
// is preallocated, L2 tables and guest clusters, in this order. The header is
// written last: what is there before it, after a crash say, is not an image.
package create

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Measure is the length in bytes of the file that Image makes; a block device
// must have it. Guest clusters in a data file are not counted. The error is
// an *OptionError, and Image has no other of that type for the same options.
func Measure(o Options) (int64, error) {
	p, err := newPlan(o)
	if err != nil {
		return 0, err
	}
	return p.end(), nil
}

// Image makes an image in st, an empty file or a block device, and, with
// o.DataFile, in o.Data. Both stay the caller's. When it returns without an
// error the image is on stable storage. Errors: an *OptionError, with nothing
// written; ErrInvalid for a file that is not empty, ErrNoSpace for a block
// device that is too small, and those of the stores.
func Image(ctx context.Context, st store.Store, o Options) error {
	p, err := newPlan(o)
	if err != nil {
		return err
	}
	if (o.DataFile != "") != (o.Data != nil) {
		return &OptionError{Option: "data file", Why: "name and file must come together"}
	}
	if o.Data != nil {
		if err := Room(o.Data, o.Size); err != nil {
			return fmt.Errorf("data file: %w", err)
		}
	}
	if err := prepare(st, p.end()); err != nil {
		return err
	}
	w := &writer{ctx: ctx, st: st, plan: p}
	if st.Fixed() {
		if err := w.wipeHeader(); err != nil {
			return err
		}
	}
	if err := w.body(); err != nil {
		return err
	}
	if err := w.dataFile(); err != nil {
		return err
	}
	if err := st.Sync(ctx); err != nil {
		return err
	}
	if err := st.WriteAt(ctx, p.head, 0, false); err != nil {
		return err
	}
	return st.Sync(ctx)
}

// Room refuses a block device of less than n bytes: ErrNoSpace. A file gets its
// length when something is made in it.
func Room(st store.Store, n int64) error {
	size, err := st.Size()
	if err == nil && st.Fixed() && size < n {
		err = &backing.Error{Op: "create", Off: -1, Kind: backing.ErrNoSpace,
			Err: fmt.Errorf("the block device has %d bytes, the image needs %d", size, n)}
	}
	return err
}

// prepare gives an empty file its length; a block device must have it.
func prepare(st store.Store, n int64) error {
	if st.Fixed() {
		return Room(st, n)
	}
	size, err := st.Size()
	if err != nil {
		return err
	}
	if size != 0 {
		return &backing.Error{Op: "create", Off: -1, Kind: backing.ErrInvalid,
			Err: fmt.Errorf("the file is not empty but has %d bytes", size)}
	}
	return st.Truncate(n)
}

// writer writes the parts of an image.
type writer struct {
	ctx  context.Context
	st   store.Store
	plan *plan
}

// wipeHeader makes sure that what a block device has is not taken for an
// image until there is one.
func (w *writer) wipeHeader() error {
	return w.st.WriteAt(w.ctx, make([]byte, w.plan.geo.ClusterSize), 0, true)
}

// put writes one cluster. Zeroes are left out where the file has them anyway.
func (w *writer) put(cluster int64, p []byte) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if !w.st.Fixed() && backing.AllZero(p) {
		return nil
	}
	return w.st.WriteAt(w.ctx, p, cluster<<w.plan.geo.ClusterBits, false)
}

// body writes all but the header.
func (w *writer) body() error {
	p := w.plan
	if err := w.pointers(p.refTableAt(), p.refTable, p.blocksAt(), p.blocks, 0); err != nil {
		return err
	}
	if err := w.refBlocks(); err != nil {
		return err
	}
	if err := w.pointers(p.l1At(), p.l1, p.l2At(), p.l2, format.FlagCopied); err != nil {
		return err
	}
	if err := w.l2Tables(); err != nil {
		return err
	}
	g := &p.geo
	return fill(w.ctx, w.st, p.dataAt()<<g.ClusterBits, p.data<<g.ClusterBits, p.preallocation)
}

// pointers writes a table of n clusters at cluster at, whose first entries
// name the clusters from `to` on, with flags; count of them.
func (w *writer) pointers(at, n, to, count int64, flags uint64) error {
	g := &w.plan.geo
	per := g.ClusterSize / pointerSize
	p := make([]byte, g.ClusterSize)
	for i := range n {
		clear(p)
		for j := range min(per, max(0, count-i*per)) {
			host := uint64(to+i*per+j) << g.ClusterBits
			binary.BigEndian.PutUint64(p[j*pointerSize:], host|flags)
		}
		if err := w.put(at+i, p); err != nil {
			return err
		}
	}
	return nil
}

// refBlocks gives every cluster of the image the refcount 1.
func (w *writer) refBlocks() error {
	g, total := &w.plan.geo, w.plan.total()
	p := make([]byte, g.ClusterSize)
	for i := range g.BlockEntries {
		g.SetRefcount(p, i, 1)
	}
	for b := range w.plan.blocks {
		for i := min(g.BlockEntries, total-b*g.BlockEntries); i < g.BlockEntries; i++ {
			g.SetRefcount(p, i, 0)
		}
		if err := w.put(w.plan.blocksAt()+b, p); err != nil {
			return err
		}
	}
	return nil
}

// l2Tables maps the whole disk, if it is preallocated.
func (w *writer) l2Tables() error {
	g, clusters := &w.plan.geo, w.plan.guestClusters()
	p := make([]byte, g.ClusterSize)
	for i := range w.plan.l2 {
		clear(p)
		for j := range min(g.L2Entries, clusters-i*g.L2Entries) {
			word, bitmap := g.EncodeL2(w.plan.cluster(i*g.L2Entries + j))
			binary.BigEndian.PutUint64(p[j*g.EntrySize:], word)
			if g.Extended {
				binary.BigEndian.PutUint64(p[j*g.EntrySize+8:], bitmap)
			}
		}
		if err := w.put(w.plan.l2At()+i, p); err != nil {
			return err
		}
	}
	return nil
}

// dataFile gives the external data file its length and storage and makes it
// durable.
func (w *writer) dataFile() error {
	st, p := w.plan.opt.Data, w.plan
	if st == nil {
		return nil
	}
	if err := prepare(st, p.opt.Size); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	if err := fill(w.ctx, st, 0, p.opt.Size, p.preallocation); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	return st.Sync(w.ctx)
}

// fill makes a range, which no one has written to, read as zeroes, and
// allocates it where the mode says so. Nothing of a block device is known to
// be zero.
func fill(ctx context.Context, st store.Store, off, n int64, mode Preallocation) error {
	if n == 0 || mode == Off || mode == Metadata && !st.Fixed() {
		return nil
	}
	if mode != Full {
		if err := st.Zero(ctx, off, n); !errors.Is(err, backing.ErrNotSupported) {
			return err
		}
	}
	p := make([]byte, min(n, limits.CreatePiece))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(n, int64(len(p)))
		if err := st.WriteAt(ctx, p[:step], off, false); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// MeasureRaw is Measure for Raw.
func MeasureRaw(size int64, mode Preallocation) (int64, error) {
	switch {
	case size < 0:
		return 0, refuse("size", "%d is negative", size)
	case mode != "" && mode != Off && mode != Falloc && mode != Full:
		return 0, refuse("preallocation", "%q is not one of off, falloc and full", string(mode))
	}
	return size, nil
}

// Raw makes a raw image of size bytes in st, an empty file, and makes it
// durable. Metadata is not a mode of raw images. Errors as of Image.
func Raw(ctx context.Context, st store.Store, size int64, mode Preallocation) error {
	n, err := MeasureRaw(size, mode)
	if err != nil {
		return err
	}
	if err := prepare(st, n); err != nil {
		return err
	}
	if err := fill(ctx, st, 0, n, cmp.Or(mode, Off)); err != nil {
		return err
	}
	return st.Sync(ctx)
}

package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// disk serves an image for reading and writing, above an immutable chain.
//
// A write to clusters that are the disk's alone goes to them straight. Any
// other claims its clusters (claim.go), writes them to reserved space and then
// links them in the mapping in memory (l2.go). The file learns of that by a
// commit (commit.go), in an order that leaves at worst a leak behind wherever
// it is cut off. What was unlinked waits in quarantine (epoch.go).
type disk struct {
	backing.Unsupported
	described
	log    *slog.Logger
	header *format.Header
	g      format.Geometry
	info   backing.Info // without Size

	st, data store.Store // the image, and what has the guest clusters
	end      int64       // where st ended when the disk was opened
	space    *space.Space
	below    *chainDevice // nil for nothing
	clusters *clusterCache
	discard  Discard
	poisoned func(error) // may be nil

	resizing sync.Mutex
	size     atomic.Int64 // of the disk in bytes
	reach    atomic.Int64 // up to where the mapping goes: size, or what it will be

	// ends is held, all of [0, 1), by who makes reach larger, and shared by who
	// takes the last subcluster of the disk for whole. Before commits.one.
	ends backing.RangeLocks

	m        mapping
	claims   map[int64]*claim // guarded by m.mu; by guest cluster
	epoch    *epoch           // guarded by m.mu
	unlinked []space.Ref      // guarded by m.mu; since the last commit began

	commits    commits
	marking    sync.WaitGroup // of the image as corrupt
	quarantine []quarantined  // the commit's own; oldest first
}

// Discard says what becomes of host clusters that the guest trims.
type Discard string

const (
	Unmap       Discard = "unmap"  // they are freed; also the zero value
	KeepCluster Discard = "keep"   // they stay where they are, as holes of the host file that read as zeroes
	IgnoreTrim  Discard = "ignore" // nothing
)

// openDisk takes over top. It refuses what cannot be written to safely.
func openDisk(ctx context.Context, top *Image, o Options) (*disk, error) {
	h := top.header
	if err := writableImage(h, o); err != nil {
		return nil, err
	}
	if _, _, err := ReadSnapshots(ctx, top.st, h, limits.SnapshotTable); err != nil {
		return nil, err
	}
	log := o.Log
	if log == nil {
		log = slog.Default()
	}
	// Before the audit, to which damaged bitmaps are corruptions like any.
	set, err := loadBitmaps(ctx, top, log)
	if err != nil {
		return nil, err
	}
	r, err := audit(ctx, top.st, h)
	if err != nil {
		return nil, err
	}
	if r.Leaks > 0 {
		log.Warn("image has leaked clusters", "path", o.Path, "clusters", r.Leaks)
	}
	d := &disk{
		described: described{path: o.Path, bitmaps: set}, log: log, header: h, g: top.g, st: top.st, data: top.data, end: top.stSize,
		clusters: newClusterCache(o.ClusterBytes), discard: o.Discard, poisoned: o.Poisoned,
		claims: map[int64]*claim{}, epoch: new(epoch),
	}
	if d.space, err = space.New(top.st, h, r, log); err != nil {
		return nil, err
	}
	d.space.Demand()
	if top.below != nil {
		d.below = newChainDevice(top.below, o)
		d.below.clusters = d.clusters
	}
	d.descriptions = append([]string{depthContext}, d.bitmaps.Exposed(true)...)
	d.m.init(&d.g, top.l1, o.CacheBytes)
	d.commits.init(d)
	d.size.Store(top.size)
	d.reach.Store(top.size)
	d.info = backing.Info{
		MinBlock: 1, Preferred: max(4096, min(d.g.SubSize, defaultPreferred)), Sector: sectorBelow(top),
		Caps: backing.CanWrite | backing.CanFlush | backing.CanFUA | backing.CanTrim | backing.CanZero |
			backing.CanFastZero | backing.CanMultiConn | backing.CanExtents | backing.CanCache,
	}
	return d, d.clearAutoclear(ctx)
}

// wayOut is what to do about an image that is not served for writing.
const wayOut = "`qemu-img check -r all IMAGE` repairs it, --readonly serves it as it is"

// unmark is that for one that is only marked so.
const unmark = "`vmdiskctl image check --repair=leaks IMAGE` takes the mark away if it finds no corruptions, else " + wayOut

// writableImage refuses marks in the header that stand against writing.
func writableImage(h *format.Header, o Options) error {
	switch {
	case o.Snapshot != "":
		return invalid(o.Path, "a snapshot can only be served read-only")
	case h.Incompat&format.IncompatCorrupt != 0:
		return invalid(o.Path, "image is marked corrupt: "+unmark)
	case h.Incompat&format.IncompatDirty != 0:
		return invalid(o.Path, "image is marked dirty, it was not closed properly: "+unmark)
	}
	return nil
}

// loadBitmaps reads the bitmaps of the disk, all of which must be usable or known
// not to be.
func loadBitmaps(ctx context.Context, top *Image, log *slog.Logger) (*bitmaps.Set, error) {
	set, err := bitmaps.Load(ctx, top.st, top.header, top.size, bitmaps.Options{Log: log})
	if errors.Is(err, backing.ErrInvalid) {
		return nil, invalid(top.path, "%w: `vmdiskctl image check --repair=bitmaps IMAGE` drops them, --readonly serves it without them", err)
	}
	return set, err
}

// audit holds the whole mapping against the refcounts: an image where they
// disagree must not be written to.
func audit(ctx context.Context, st store.Store, h *format.Header) (*check.Report, error) {
	r, err := check.Run(ctx, st, h, check.Options{Sound: true})
	if why := format.Corrupt(""); errors.As(err, &why) {
		return nil, format.Corrupt(fmt.Sprintf("image is corrupt: %v: "+wayOut, why))
	}
	return r, err
}

// clearAutoclear clears the bits of features that writing would break (section
// "Header", autoclear_features), before the first write.
func (d *disk) clearAutoclear(ctx context.Context) error {
	h := d.header
	keep := h.Autoclear & format.KnownAutoclear
	if h.Version < 3 || h.Autoclear == keep {
		return nil
	}
	err := d.st.WriteAt(ctx, binary.BigEndian.AppendUint64(nil, keep), format.OffAutoclear, false)
	if err == nil {
		err = d.st.Sync(ctx)
	}
	if err == nil {
		h.Autoclear = keep
	}
	return err
}

// begin comes before every change of the disk, which may take none any more. The
// bitmaps that it changes must not be believed before they are stored again.
func (d *disk) begin(ctx context.Context) error {
	if err := d.writable(); err != nil || d.bitmaps.Begun() {
		return err
	}
	return d.commits.exclusive(func() error { return d.bitmaps.Begin(ctx) })
}

// Bitmaps are those of the image: what is changed there is in the file when the
// disk was closed.
func (d *disk) Bitmaps() *bitmaps.Set { return d.bitmaps }

// Info changes when the disk grows.
func (d *disk) Info() backing.Info {
	i := d.info
	i.Size = d.size.Load()
	return i
}

// Close commits what is left and closes all files. No request is in flight and
// no Mapping open. What a failure leaves behind are leaks, and bitmaps that
// nobody believes.
func (d *disk) Close() error {
	ctx := context.Background()
	err := d.commits.stop()
	if err != nil { // who opens it again does not find all that was written
		d.stopWrites(&backing.Error{Op: "close", Path: d.path, Off: -1, Kind: backing.ErrPoisoned, Err: err})
	}
	d.marking.Wait()
	if err == nil {
		err = errors.Join(d.saveBitmaps(ctx), d.space.Trim(ctx))
	}
	err = errors.Join(err, d.st.Close())
	if d.data != d.st {
		err = errors.Join(err, d.data.Close())
	}
	if d.below != nil {
		err = errors.Join(err, d.below.Close())
	}
	return d.wrap("close", -1, 0, err)
}

// saveBitmaps stores what the bitmaps are now; else they are lost to a backup.
func (d *disk) saveBitmaps(ctx context.Context) error {
	err := d.commits.exclusive(func() error { return d.bitmaps.Save(ctx, d.space) })
	if err == nil {
		return nil
	}
	return &backing.Error{Op: "store bitmaps", Path: d.path, Off: -1, Kind: backing.KindOf(err), Err: err}
}

// Cache is a hint that is passed on for data.
func (d *disk) Cache(ctx context.Context, off, n int64) error {
	return d.wrap("cache", off, n, d.eachSpan(ctx, off, n, func(at int64, s *Span) error {
		var err error
		switch {
		case s.Kind == Data:
			err = s.Store.Cache(ctx, s.Off, s.Len)
		case s.Kind == Absent && d.belowHas(at) > 0:
			err = d.below.Cache(ctx, at, min(s.Len, d.belowHas(at)))
		}
		if errors.Is(err, backing.ErrNotSupported) {
			err = nil
		}
		return err
	}))
}

var _ backing.Device = (*disk)(nil)

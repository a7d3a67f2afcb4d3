package qcow2

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/bitmaps"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// defaultPreferred is the request size of a chain whose top layer does not say
// its cluster size, and the largest for any: the default cluster size.
const defaultPreferred = 64 << 10

// mapPieces bounds the extents that one Map looks at.
const mapPieces = 4 * backing.MaxRuns

// chainDevice serves a chain of layers for reading.
type chainDevice struct {
	backing.Unsupported
	described
	chain    *chain
	clusters *clusterCache
	info     backing.Info
}

// Open opens the image in st and serves it with what lies below. It takes over
// st, o.Backing and o.DataFile, also when it fails. It fails as OpenImage does;
// without o.ReadOnly also for every image that must not be written to.
func Open(ctx context.Context, st store.Store, o Options) (backing.Device, error) {
	top, err := OpenImage(ctx, st, o)
	if err != nil {
		return nil, err
	}
	if o.ReadOnly {
		d := newChainDevice(top, o)
		d.loadBitmaps(ctx, top, o)
		return d, nil
	}
	if o.Lenient {
		return nil, errors.Join(invalid(o.Path, "nothing is written to what is read leniently"), top.Close())
	}
	d, err := openDisk(ctx, top, o)
	if err != nil {
		return nil, errors.Join(refusal(o.Path, err), top.Close())
	}
	return d, nil
}

// NewChainDevice serves a chain of layers for reading. It takes over top and
// what is below; Close closes them. Of o it uses Path, CacheBytes and
// ClusterBytes. The dynamic types of the layers' stores must be comparable.
func NewChainDevice(top Layer, o Options) backing.Device { return newChainDevice(top, o) }

// loadBitmaps adds the bitmaps of the disk, which are of no use for a snapshot.
// If they cannot be used the disk is served without.
func (d *chainDevice) loadBitmaps(ctx context.Context, top *Image, o Options) {
	if o.Snapshot != "" || top.header.BitmapsErr != nil {
		return
	}
	log := o.Log
	if log == nil {
		log = slog.Default()
	}
	set, err := bitmaps.Load(ctx, top.st, top.header, top.size, bitmaps.Options{Log: log})
	if err != nil {
		log.Warn("image has bitmaps that cannot be used", "path", o.Path, "error", err)
		return
	}
	d.bitmaps = set
	d.descriptions = append(d.descriptions, set.Exposed(false)...)
}

func newChainDevice(top Layer, o Options) *chainDevice {
	d := &chainDevice{
		described: described{path: o.Path, descriptions: []string{depthContext}},
		chain:     newChain(top, o.CacheBytes), clusters: newClusterCache(o.ClusterBytes),
	}
	d.info = backing.Info{
		Size: d.chain.size, MinBlock: 1, Preferred: defaultPreferred, Sector: sectorBelow(top),
		Caps: backing.CanFlush | backing.CanMultiConn | backing.CanExtents | backing.CanCache,
	}
	if c, ok := top.(Clustered); ok {
		d.info.Preferred = max(4096, min(c.ClusterSize(), defaultPreferred))
	}
	return d
}

// Info is the same in every call.
func (d *chainDevice) Info() backing.Info { return d.info }

// Stats says how the mapping is cached.
func (d *chainDevice) Stats() MapStats { return d.chain.stats() }

func (d *chainDevice) cursor(off, n int64) cursor {
	return cursor{chain: d.chain, off: off, end: off + n}
}

// ReadAt fills p. Compressed clusters are decompressed side by side.
func (d *chainDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.wrap("read", off, int64(len(p)), d.readAt(ctx, p, off))
}

func (d *chainDevice) readAt(ctx context.Context, p []byte, off int64) error {
	g := gather{cache: d.clusters}
	defer g.free()
	for k := d.cursor(off, int64(len(p))); k.off < k.end; {
		x, err := k.next(ctx)
		if err != nil {
			return err
		}
		s := x.span()
		if err := g.read(ctx, &s, p[k.off-x.n-off:k.off-off]); err != nil {
			return err
		}
	}
	return g.finish(ctx)
}

// Cache loads the mapping of the range and asks the stores to read ahead what
// it leads to. A store that cannot do that is no error.
func (d *chainDevice) Cache(ctx context.Context, off, n int64) error {
	for k := d.cursor(off, n); k.off < k.end; {
		x, err := k.next(ctx)
		if err == nil && x.kind == Data {
			err = x.store().Cache(ctx, x.off, x.n)
		} else if err == nil && x.kind == Compressed {
			err = x.store().Cache(ctx, x.off, int64(x.inLen))
		}
		if err != nil && !errors.Is(err, backing.ErrNotSupported) {
			return d.wrap("cache", off, n, err)
		}
	}
	return nil
}

// Map names the runs behind a range whose mapping is in memory. Compressed and
// damaged clusters are not mappable.
func (d *chainDevice) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op != engine.OpRead {
		return backing.ErrReadOnly
	}
	if off < 0 || n <= 0 || off > d.info.Size || n > d.info.Size-off {
		return backing.ErrNotMappable
	}
	k := d.cursor(off, n)
	x, ok := k.nextCached()
	if ok && x.kind == Data && k.off == k.end {
		return x.store().Map(op, x.off, x.n, m)
	}
	j := joins.Get().(*join)
	for range mapPieces {
		if !ok || !j.add(op, &x) {
			break
		}
		if k.off == k.end {
			j.give(m)
			return nil
		}
		x, ok = k.nextCached()
	}
	j.abandon()
	return backing.ErrNotMappable
}

// join puts the mappings of several pieces together. It is the lease of the
// whole.
type join struct {
	sum, part backing.Mapping
	size      int64 // bytes of sum; sum.Reused is that of any piece
	leases    [backing.MaxRuns + 1]backing.Lease
	n         int // number of leases

	// The range of a write, which is marked when it is over; marks is nil for
	// no write.
	marks    *bitmaps.Set
	off, len int64
}

var joins = sync.Pool{New: func() any { return new(join) }}

// add takes the runs of x in; it tells whether that could be done.
func (j *join) add(op engine.Op, x *piece) bool {
	switch x.kind {
	case Absent, Zero:
		return j.run(backing.Run{Len: x.n})
	case Data:
		return j.mapped(x.store().Map(op, x.off, x.n, &j.part))
	}
	return false
}

// mapped takes in what is in j.part, if err is nil and there is room.
func (j *join) mapped(err error) bool {
	if err != nil {
		return false
	}
	ok := j.keep(j.part.Lease)
	j.sum.Reused = j.sum.Reused || j.part.Reused
	if ok {
		j.part.Lease = nil
	}
	for _, r := range j.part.Runs[:j.part.N] {
		ok = ok && j.run(r)
	}
	j.part.Release()
	return ok
}

// keep makes a lease, if there is one, part of that of the whole.
func (j *join) keep(l backing.Lease) bool {
	switch {
	case l == nil:
		return true
	case j.n == len(j.leases):
		return false
	}
	j.leases[j.n] = l
	j.n++
	return true
}

// run appends r, or makes the last run longer. Memory that suits a direct file
// for the first byte has to do so where r begins.
func (j *join) run(r backing.Run) bool {
	if r.File != nil && r.File.Direct && j.size&int64(r.File.Align-1) != 0 {
		return false
	}
	j.size += r.Len
	if k := j.sum.N; k > 0 {
		last := &j.sum.Runs[k-1]
		if last.File == r.File && (r.File == nil || last.Off+last.Len == r.Off) {
			last.Len += r.Len
			return true
		}
	}
	if j.sum.N == backing.MaxRuns {
		return false
	}
	j.sum.Runs[j.sum.N] = r
	j.sum.N++
	return true
}

// give moves the runs to m. j is free after that, or the lease of m.
func (j *join) give(m *backing.Mapping) {
	*m = j.sum
	if j.n > 0 {
		m.Lease = j
		return
	}
	j.abandon()
}

// Release ends the leases of all pieces.
func (j *join) Release() {
	if j.marks != nil {
		j.marks.Mark(j.off, j.len)
	}
	j.abandon()
}

// abandon ends what leases there are and frees j.
func (j *join) abandon() {
	for _, l := range j.leases[:j.n] {
		l.Release()
	}
	*j = join{}
	joins.Put(j)
}

// Close closes the layers.
func (d *chainDevice) Close() error { return d.chain.top.Close() }

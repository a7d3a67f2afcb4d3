package qcow2

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// mapShards spreads the pages of a map over locks; a power of two.
const mapShards = 16

// chain is the flattened map of a chain of layers: for each guest byte the
// store and the offset that it is read from, whichever layer says so. It keeps
// pages of limits.MapPage, or pieces of limits.MapSubPage of such a page where
// one has too many extents, and one page for each large hole. Safe for
// concurrent use.
type chain struct {
	top    Layer
	size   int64
	shards [mapShards]mapShard
	holes  holeMap
}

// mapShard holds a part of the pages. Pages do not change once they are in.
type mapShard struct {
	hits, misses atomic.Int64

	mu      sync.RWMutex
	pages   map[int64]*page     // guarded by mu; by key
	clock   clock[*page]        // guarded by mu; of pages
	loading map[int64]*pageLoad // guarded by mu; by key
}

// pageLoad is a page on its way. page and err are set before done is closed.
type pageLoad struct {
	done chan struct{}
	page *page
	err  error
}

// page is the mapping of a guest range, complete and immutable.
type page struct {
	clockNode
	key     int64
	off, n  int64 // guest range in bytes
	split   bool  // no mapping here: the pieces have it
	extents []extent
	stores  []store.Store
	errs    []error // what is wrong with damaged extents
}

// Memory that a page takes, roughly: for itself with its place in map and
// ring, for an extent, and for the other things it refers to.
const (
	pageCost   = 288
	extentCost = 32
	storeCost  = 16
	errorCost  = 256
)

func (p *page) cost() int64 {
	return pageCost + extentCost*int64(len(p.extents)) + storeCost*int64(len(p.stores)) + errorCost*int64(len(p.errs))
}

// extent is a run of guest bytes; it ends where the next one begins. Absent
// stands for what no layer has.
type extent struct {
	off       int64  // Data, Compressed: in the store
	at        uint32 // where it begins in the page
	inLen     uint32 // Compressed, as in Span
	skip      uint32 // Compressed, as in Span
	cluster   uint32 // Compressed, as in Span
	ref       uint16 // Data, Compressed: index of the store; Damaged: of the error
	depth     uint16 // the layer it comes from, 0 the top
	kind      SpanKind
	codec     format.Compression
	allocated bool // Zero: has a host cluster
}

// from is what remains of x without its first n bytes.
func (x extent) from(n int64) extent {
	switch x.kind {
	case Data:
		x.off += n
	case Compressed:
		x.skip += uint32(n)
	}
	return x
}

// continues tells whether y is what follows the first n bytes of x.
func (x extent) continues(n int64, y extent) bool {
	if x.kind == Compressed && int64(x.skip)+n > int64(x.cluster) {
		return false
	}
	x = x.from(n)
	x.at = y.at
	if x.kind == Damaged {
		x.ref = y.ref
	}
	return x == y
}

func newChain(top Layer, cacheBytes int64) *chain {
	c := &chain{top: top, size: top.Size()}
	if cacheBytes <= 0 {
		cacheBytes = limits.MapCache
	}
	share := cacheBytes / (mapShards + 1)
	c.holes.clock.most = min(share, limits.MapHoles*(pageCost+extentCost))
	for i := range c.shards {
		s := &c.shards[i]
		s.clock.most, s.pages, s.loading = share, map[int64]*page{}, map[int64]*pageLoad{}
	}
	return c
}

// pageKey and subKey name the pages that may hold off. Their lowest bit tells
// them apart.
func pageKey(off int64) int64 { return off &^ (limits.MapPage - 1) }
func subKey(off int64) int64  { return off&^(limits.MapSubPage-1) | 1 }

func (c *chain) shard(key int64) *mapShard {
	return &c.shards[uint64(key)*0x9e3779b97f4a7c15>>(64-4)&(mapShards-1)]
}

// find returns a page that is in memory, or nil.
func (s *mapShard) find(key int64) *page {
	s.mu.RLock()
	p := s.pages[key]
	s.mu.RUnlock()
	if p != nil {
		p.touch()
	}
	return p
}

// cached returns the page with the mapping of off if it is in memory, or nil.
// It does not block for I/O.
func (c *chain) cached(off int64) *page {
	key := pageKey(off)
	s := c.shard(key)
	p := s.find(key)
	if p == nil {
		if p = c.holes.find(off); p != nil {
			return p
		}
	}
	if p == nil || p.split {
		key = subKey(off)
		p = c.shard(key).find(key)
	}
	if p == nil {
		s.misses.Add(1)
	} else {
		s.hits.Add(1)
	}
	return p
}

// get returns the page with the mapping of off, which lies in the disk. Where
// a page cannot be loaded, the piece with off may be: an error concerns no
// more of the disk than it must.
func (c *chain) get(ctx context.Context, off int64) (*page, error) {
	if p := c.cached(off); p != nil {
		return p, nil
	}
	if p := c.hole(off); p != nil {
		return p, nil
	}
	p, err := c.loaded(ctx, pageKey(off))
	if err == nil && !p.split {
		return p, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return c.loaded(ctx, subKey(off))
}

// loaded returns the page of that name, from memory or from the layers. It is
// loaded once for all who ask meanwhile; errors are not kept.
func (c *chain) loaded(ctx context.Context, key int64) (*page, error) {
	s := c.shard(key)
	for {
		s.mu.Lock()
		if p := s.pages[key]; p != nil {
			s.mu.Unlock()
			return p, nil
		}
		l := s.loading[key]
		if l == nil {
			l = &pageLoad{done: make(chan struct{})}
			s.loading[key] = l
			s.mu.Unlock()
			l.page, l.err = c.load(ctx, key)
			s.loaded(key, l)
			return l.page, l.err
		}
		s.mu.Unlock()
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if !backing.GaveUp(l.err) {
			return l.page, l.err
		}
	}
}

// loaded keeps the page of l, if there is one, and lets those go on who wait.
func (s *mapShard) loaded(key int64, l *pageLoad) {
	s.mu.Lock()
	delete(s.loading, key)
	if l.err == nil {
		s.keepLocked(l.page)
	}
	s.mu.Unlock()
	close(l.done)
}

// keepLocked takes p in and drops others for it.
func (s *mapShard) keepLocked(p *page) {
	cost := p.cost()
	for old := range s.clock.evict(cost) {
		delete(s.pages, old.key)
	}
	s.pages[p.key] = p
	s.clock.add(p, cost)
}

// MapStats is what a map has in memory, and how often that helped.
type MapStats struct {
	Pages, Bytes, Hits, Misses int64
}

func (c *chain) stats() (t MapStats) {
	c.holes.mu.RLock()
	t.Pages, t.Bytes = int64(c.holes.clock.count), c.holes.clock.bytes
	c.holes.mu.RUnlock()
	t.Hits = c.holes.hits.Load()
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		t.Pages += int64(s.clock.count)
		t.Bytes += s.clock.bytes
		s.mu.RUnlock()
		t.Hits += s.hits.Load()
		t.Misses += s.misses.Load()
	}
	return t
}

// errFragmented says that a range has more extents than a page may hold.
var errFragmented = fmt.Errorf("%w: mapping is too fragmented", backing.ErrIO)

// load walks the layers for the mapping of a page, or of a piece of one.
func (c *chain) load(ctx context.Context, key int64) (p *page, err error) {
	p = &page{key: key, off: key, n: limits.MapPage}
	piece := key&1 != 0
	if piece {
		p.off, p.n = key-1, limits.MapSubPage
	}
	p.n = min(p.n, c.size-p.off)
	b := weaver{end: p.n, list: []extent{{kind: Absent}}}
	for l, depth := c.top, 0; l != nil; l, depth = l.Below(), depth+1 {
		lo, hi := b.absent()
		if lo == hi {
			break
		}
		err = b.overlay(ctx, l, p.off, lo, hi, uint16(min(depth, math.MaxUint16)))
		switch {
		case err == errFragmented && !piece:
			p.split = true
			return p, nil
		case err != nil:
			return nil, err
		}
	}
	p.extents, p.stores, p.errs = slices.Clone(b.list), slices.Clip(b.stores), slices.Clip(b.errs)
	return p, nil
}

// weaver puts one layer below another. Offsets are those in the page.
type weaver struct {
	end    int64 // of the page
	list   []extent
	stores []store.Store
	errs   []error

	// While a layer is put below the extents in old, list has what lies
	// before pos, and old[i] is the extent at pos.
	old  []extent
	i    int
	pos  int64
	full bool // list was full: its rest is missing
}

// absent is the range from the first to the last byte that the layers so far
// do not have.
func (b *weaver) absent() (lo, hi int64) {
	for i, x := range b.list {
		if x.kind != Absent {
			continue
		}
		if hi == 0 {
			lo = int64(x.at)
		}
		hi = endOf(b.list, i, b.end)
	}
	return lo, hi
}

// endOf is where extent i of a list ends.
func endOf(list []extent, i int, end int64) int64 {
	if i+1 < len(list) {
		return int64(list[i+1].at)
	}
	return end
}

// overlay fills what is absent in [lo, hi) with what l has. base is the guest
// offset of the page.
func (b *weaver) overlay(ctx context.Context, l Layer, base, lo, hi int64, depth uint16) error {
	b.old, b.list = b.list, b.old[:0]
	b.i, b.pos = 0, 0
	b.weave(extent{kind: Absent}, lo)
	if end := min(hi, l.Size()-base); end > lo {
		bad := false
		err := l.Spans(ctx, base+lo, end-lo, func(s Span) bool {
			if bad = s.Len <= 0 || s.Len > end-b.pos; bad {
				return false
			}
			b.weave(b.extentOf(s, depth), s.Len)
			return !b.full && b.pos < end
		})
		switch {
		case err != nil:
			return err
		case b.full:
			return errFragmented
		case bad || b.pos != end:
			return fmt.Errorf("%w: layer %d does not cover %d+%d", backing.ErrIO, depth, base+lo, end-lo)
		}
	}
	b.weave(extent{kind: Zero, depth: depth}, hi-b.pos)
	b.weave(extent{kind: Absent}, b.end-b.pos)
	if b.full {
		return errFragmented
	}
	return nil
}

// weave adds the next n bytes: x where they are absent so far.
func (b *weaver) weave(x extent, n int64) {
	for n > 0 && !b.full {
		o, end := b.old[b.i], endOf(b.old, b.i, b.end)
		k := min(n, end-b.pos)
		if o.kind == Absent {
			b.add(x)
		} else {
			b.add(o.from(b.pos - int64(o.at)))
		}
		b.pos += k
		if b.pos == end {
			b.i++
		}
		if n -= k; n > 0 {
			x = x.from(k)
		}
	}
}

// add puts x at pos, as a part of the last extent if it continues that.
func (b *weaver) add(x extent) {
	x.at = uint32(b.pos)
	if k := len(b.list); k > 0 {
		if last := b.list[k-1]; last.continues(b.pos-int64(last.at), x) {
			return
		}
	}
	if b.full = len(b.list) == limits.MapExtents; !b.full {
		b.list = append(b.list, x)
	}
}

// extentOf takes over what a layer says. A span whose numbers cannot be is
// damaged.
func (b *weaver) extentOf(s Span, depth uint16) extent {
	x := extent{kind: s.Kind, depth: depth}
	switch s.Kind {
	case Absent:
		return extent{kind: Absent}
	case Zero:
		x.allocated = s.Store != nil
		return x
	case Data:
		if s.Store == nil || s.Off < 0 || s.Off > math.MaxInt64-s.Len {
			return b.damaged(x, fmt.Errorf("data at %d+%d cannot be", s.Off, s.Len))
		}
		x.off = s.Off
	case Compressed:
		if err := checkCompressed(s); err != nil {
			return b.damaged(x, err)
		}
		x.off, x.codec = s.Off, s.Codec
		x.inLen, x.skip, x.cluster = uint32(s.InLen), uint32(s.Skip), uint32(s.Cluster)
	default:
		return b.damaged(x, s.Err)
	}
	i := slices.Index(b.stores, s.Store)
	if i < 0 {
		if i = len(b.stores); i > math.MaxUint16 {
			return b.damaged(x, errors.New("too many files in one range"))
		}
		b.stores = append(b.stores, s.Store)
	}
	x.ref = uint16(i)
	return x
}

// checkCompressed allows what a compressed cluster descriptor can say: up to
// twice the cluster, in sectors.
func checkCompressed(s Span) error {
	const most = 1 << format.MaxClusterBits
	switch {
	case s.Store == nil || s.Off < 0 || s.Off > math.MaxInt64-most*4,
		s.Cluster <= 0 || s.Cluster > most,
		s.InLen <= 0 || s.InLen > 2*s.Cluster+512,
		s.Skip < 0 || s.Skip > s.Cluster || s.Len > s.Cluster-s.Skip:
		return fmt.Errorf("compressed cluster at %d+%d of %d bytes cannot be", s.Off, s.InLen, s.Cluster)
	}
	return nil
}

// damaged is an extent that cannot be read. Runs of them keep the first error.
func (b *weaver) damaged(x extent, err error) extent {
	if err == nil {
		err = errors.New("mapping is corrupt")
	}
	d := extent{kind: Damaged, depth: x.depth}
	if k := len(b.list); k > 0 && b.list[k-1].kind == Damaged {
		d.ref = b.list[k-1].ref
		return d
	}
	if len(b.errs) <= limits.MapExtents { // else the list is full before it is used
		b.errs = append(b.errs, err)
	}
	d.ref = uint16(len(b.errs) - 1)
	return d
}

// cursor walks a guest range that lies in the disk, extent by extent.
type cursor struct {
	chain    *chain
	off, end int64 // what is left, in guest bytes

	page *page
	i    int
}

// piece is the part of an extent that a request concerns.
type piece struct {
	extent
	page *page
	n    int64 // guest bytes
}

func (x *piece) store() store.Store { return x.page.stores[x.ref] }
func (x *piece) err() error         { return x.page.errs[x.ref] }

// enter makes p, which has the mapping of k.off, the current page.
func (k *cursor) enter(p *page) {
	k.page = p
	if len(p.extents) == 1 { // a hole is longer than offsets of extents say
		k.i = 0
		return
	}
	at := uint32(k.off - p.off)
	k.i = sort.Search(len(p.extents), func(i int) bool { return p.extents[i].at > at }) - 1
}

// inside tells whether the current page has the next byte.
func (k *cursor) inside() bool { return k.page != nil && k.off < k.page.off+k.page.n }

// next is the next piece, loading what is missing; k.off < k.end.
func (k *cursor) next(ctx context.Context) (piece, error) {
	if !k.inside() {
		if err := ctx.Err(); err != nil {
			return piece{}, err
		}
		p, err := k.chain.get(ctx, k.off)
		if err != nil {
			return piece{}, err
		}
		k.enter(p)
	}
	return k.take(), nil
}

// nextCached is next for what is in memory; it tells whether it was.
func (k *cursor) nextCached() (piece, bool) {
	if !k.inside() {
		p := k.chain.cached(k.off)
		if p == nil {
			return piece{}, false
		}
		k.enter(p)
	}
	return k.take(), true
}

func (k *cursor) take() piece {
	p := k.page
	x := p.extents[k.i]
	end := min(p.off+endOf(p.extents, k.i, p.n), k.end)
	t := piece{extent: x.from(k.off - p.off - int64(x.at)), page: p, n: end - k.off}
	k.off = end
	k.i++
	return t
}

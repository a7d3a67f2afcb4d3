package qcow2

import (
	"context"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/codec"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// clusterKey names a compressed cluster by all that its bytes depend on: two
// descriptors of a bad image may begin at the same place.
type clusterKey struct {
	store store.Store
	off   int64 // where the compressed data begin
	inLen int64 // at most so many bytes
	size  int64 // decompressed
	codec format.Compression
}

// clusterRead is one part of one compressed cluster that a caller wants: p is
// what begins skip bytes into it.
type clusterRead struct {
	key  clusterKey
	skip int64
	p    []byte
}

// whole tells whether the read wants all of the cluster.
func (r *clusterRead) whole() bool { return r.skip == 0 && int64(len(r.p)) == r.key.size }

// clusterCache reads compressed clusters, and keeps those that were wanted in
// part: the rest is likely to be wanted soon. Safe for concurrent use.
type clusterCache struct {
	// Both bound what goes on at a time, by their capacity: compressed
	// clusters in memory, and decompressions. Taken in this order.
	inputs, decoders chan struct{}
	buffers          bufferPool

	hits, misses atomic.Int64

	mu    sync.Mutex
	byKey map[clusterKey]*cluster // guarded by mu; those on their way too
	clock clock[*cluster]         // guarded by mu; of those that are kept
}

// cluster is a decompressed cluster. data and err are set before done is
// closed. data goes back to the pool when nobody reads it and it is not kept.
type cluster struct {
	clockNode
	key  clusterKey
	done chan struct{}
	data *buffer
	err  error

	refs int  // guarded by clusterCache.mu; who reads data
	kept bool // guarded by clusterCache.mu; in the clock
}

func newClusterCache(bytes int64) *clusterCache {
	if bytes <= 0 {
		bytes = limits.ClusterCache
	}
	return &clusterCache{
		clock: clock[*cluster]{most: bytes}, byKey: map[clusterKey]*cluster{},
		inputs:   make(chan struct{}, limits.ClusterReads),
		decoders: make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
}

// read fills r.p.
func (c *clusterCache) read(ctx context.Context, r *clusterRead) error {
	for {
		x, mine := c.take(r)
		if x == nil {
			return c.direct(ctx, r)
		}
		if mine {
			c.fill(ctx, x)
		} else if err := x.wait(ctx); err != nil {
			c.release(x)
			return err
		}
		err := x.err
		if err == nil {
			copy(r.p, x.data.b[r.skip:])
		}
		c.release(x)
		if mine || !backing.GaveUp(err) {
			return err
		}
	}
}

// wait returns when x is there, or when the caller gives up.
func (x *cluster) wait(ctx context.Context) error {
	select {
	case <-x.done:
		return nil
	default:
	}
	select {
	case <-x.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take returns the cluster that r wants and a reference to it; mine asks the
// caller to fill it. It returns nil for a whole cluster that is not there,
// which needs no place in the cache.
func (c *clusterCache) take(r *clusterRead) (x *cluster, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x = c.byKey[r.key]; x != nil {
		c.hits.Add(1)
		x.refs++
		x.touch()
		return x, false
	}
	c.misses.Add(1)
	if r.whole() {
		return nil, false
	}
	x = &cluster{key: r.key, done: make(chan struct{}), refs: 1}
	c.byKey[r.key] = x
	return x, true
}

// release gives a reference back.
func (c *clusterCache) release(x *cluster) {
	c.mu.Lock()
	x.refs--
	last := x.refs == 0 && !x.kept
	c.mu.Unlock()
	if last {
		c.buffers.put(x.data)
	}
}

// direct decompresses into the caller's buffer.
func (c *clusterCache) direct(ctx context.Context, r *clusterRead) error {
	if err := acquire(ctx, c.inputs); err != nil {
		return err
	}
	defer release(c.inputs)
	return c.decompress(ctx, r.key, r.p)
}

// fill decompresses x and keeps it, unless that fails.
func (c *clusterCache) fill(ctx context.Context, x *cluster) {
	if x.err = acquire(ctx, c.inputs); x.err == nil {
		x.data = c.buffers.get(x.key.size)
		x.err = c.decompress(ctx, x.key, x.data.b)
		release(c.inputs)
	}
	c.mu.Lock()
	if x.err != nil {
		delete(c.byKey, x.key)
	} else {
		c.keepLocked(x)
	}
	c.mu.Unlock()
	close(x.done)
}

// keepLocked takes x in and drops others for it.
func (c *clusterCache) keepLocked(x *cluster) {
	for old := range c.clock.evict(x.key.size) {
		delete(c.byKey, old.key)
		old.kept = false
		if old.refs == 0 {
			c.buffers.put(old.data)
			old.data = nil
		}
	}
	x.kept = true
	c.clock.add(x, x.key.size)
}

// decompress reads and decompresses one cluster into dst, which is as long as
// the cluster. The caller holds one of inputs.
func (c *clusterCache) decompress(ctx context.Context, k clusterKey, dst []byte) error {
	in := c.buffers.get(k.inLen)
	defer c.buffers.put(in)
	n, err := k.store.ReadAt(ctx, in.b, k.off)
	if err != nil {
		return err
	}
	if err := acquire(ctx, c.decoders); err != nil {
		return err
	}
	defer release(c.decoders)
	return codec.Decode(k.codec, dst, in.b[:n])
}

// readAll fills all of reads, side by side. It returns one of the errors, and
// may leave the rest alone then.
func (c *clusterCache) readAll(ctx context.Context, reads []clusterRead) error {
	// On one CPU side by side is slower, whatever GOMAXPROCS says.
	workers := min(len(reads), cap(c.decoders), runtime.NumCPU())
	if workers == 1 {
		for i := range reads {
			if err := c.read(ctx, &reads[i]); err != nil {
				return err
			}
		}
		return nil
	}
	var (
		next  atomic.Int64
		wg    sync.WaitGroup
		once  sync.Once
		first error
	)
	for range workers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(reads)); i = next.Add(1) - 1 {
				if err := c.read(ctx, &reads[i]); err != nil {
					once.Do(func() { first = err })
					next.Store(int64(len(reads)))
				}
			}
		})
	}
	wg.Wait()
	return first
}

// acquire takes one of the places that ch has.
func acquire(ctx context.Context, ch chan struct{}) error {
	select {
	case ch <- struct{}{}:
		return nil
	default:
	}
	select {
	case ch <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func release(ch chan struct{}) { <-ch }

// buffer is memory from a bufferPool.
type buffer struct{ b []byte }

// bufferPool reuses buffers of up to 8 MiB, by powers of two.
type bufferPool struct {
	sizes [24]sync.Pool
}

// get returns n bytes of any contents.
func (p *bufferPool) get(n int64) *buffer {
	class := bits.Len64(uint64(n - 1))
	x, _ := p.sizes[class].Get().(*buffer)
	if x == nil {
		x = &buffer{make([]byte, 1<<class)}
	}
	x.b = x.b[:n]
	return x
}

// put gives x back, which may be nil.
func (p *bufferPool) put(x *buffer) {
	if x != nil {
		p.sizes[bits.Len64(uint64(cap(x.b)-1))].Put(x)
	}
}

// Package copier copies disks: files, block devices and NBD exports in any
// combination.
package copier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrRefused marks a copy that was not begun because it would do harm or
// cannot succeed. The destination is as it was.
var ErrRefused = errors.New("refused")

// ErrDiffers is returned when the verification finds other bytes at the
// destination than at the source.
var ErrDiffers = errors.New("destination differs from source")

// Disk is one end of a copy. ReadAt, WriteAt and Zero are safe for concurrent
// use; their ranges keep to the Shape and lie within Size. Buffers are not
// kept.
type Disk interface {
	// Size is in bytes and never changes.
	Size() int64
	Shape() Shape
	// ReadAt fills p or fails.
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes n bytes read as zeroes; with allocate they stay backed by
	// storage. Where the disk has no such command it writes zeroes.
	Zero(ctx context.Context, off, n int64, allocate bool) error
	// Flush makes all writes stable that have returned.
	Flush(ctx context.Context) error
	// Extents tells data and zeroes apart from the beginning to the end,
	// without gaps, until yield returns false.
	Extents(ctx context.Context, yield func(Extent) bool) error
	Close() error
}

// Shape is what the requests to a disk must look like.
type Shape struct {
	// Align is a power of two that offsets and lengths are multiples of, in
	// bytes.
	Align int64
	// MaxIO is the largest read or write in bytes, a multiple of Align.
	MaxIO int64
	// Requests is how many requests are worth having in flight.
	Requests int
	// Granule is the smallest range of zeroes inside data that is worth a
	// request of its own, a power of two; 0 for what suits most disks.
	Granule int64
}

// Extent is a range of a disk that reads as zeroes, or that may not.
type Extent struct {
	Off, Len int64
	Zero     bool
}

// Options say how to copy.
type Options struct {
	// RequestSize is that of reads and writes in bytes, as far as both disks
	// allow it.
	RequestSize int64
	// Allocated keeps the whole destination backed by storage.
	Allocated bool
	// DestinationIsZero says that the destination reads as zeroes before the
	// copy, so that zeroes need not be written.
	DestinationIsZero bool
	// Flush makes the destination stable before success is reported.
	Flush bool
	// Verify reads both disks again and compares them.
	Verify bool
	// Progress, if not nil, is told of bytes done, of Work in all. It must be
	// safe for concurrent use.
	Progress func(n int64)
}

const (
	// maxZero bounds one request for zeroes, so that progress is seen and an
	// interruption heard.
	maxZero = 128 << 20

	// granule is the Granule that suits most disks, and the largest.
	granule = 32 << 10
)

// Work is how many bytes Progress will be told of.
func (o *Options) Work(src Disk) int64 {
	if o.Verify {
		return 2 * src.Size()
	}
	return src.Size()
}

// copying is one copy under way.
type copying struct {
	src, dst Disk
	Options
	align, step int64
	granule     int64
	workers     int
}

// Copy makes the first bytes of dst equal to src. It returns nil only when
// every byte was read without error and its write was acknowledged, and so
// was the flush.
func Copy(ctx context.Context, src, dst Disk, o Options) error {
	c := &copying{src: src, dst: dst, Options: o}
	if err := c.plan(); err != nil {
		return err
	}
	if err := c.run(ctx, c.pieces, c.copyPiece); err != nil {
		return err
	}
	if o.Flush {
		if err := dst.Flush(ctx); err != nil {
			return fmt.Errorf("flush destination: %w", err)
		}
	}
	if !o.Verify {
		return nil
	}
	return c.run(ctx, c.slices, c.comparePiece)
}

// plan fits the requests to both disks.
func (c *copying) plan() error {
	a, b := c.src.Shape(), c.dst.Shape()
	c.align = max(a.Align, b.Align)
	size := c.src.Size()
	switch {
	case c.dst.Size() < size:
		return fmt.Errorf("%w: destination has %d bytes, source %d", ErrRefused, c.dst.Size(), size)
	case size%c.align != 0:
		return fmt.Errorf("%w: source has %d bytes, which is no multiple of the block size %d", ErrRefused, size, c.align)
	case a.MaxIO < c.align || b.MaxIO < c.align:
		return fmt.Errorf("%w: block size %d of one disk is above the largest request of the other", ErrRefused, c.align)
	}
	c.step = max(min(c.RequestSize, a.MaxIO, b.MaxIO)&^(c.align-1), c.align)
	c.granule = granule
	if b.Granule > 0 {
		c.granule = min(b.Granule, granule)
	}
	c.workers = max(1, min(max(a.Requests, b.Requests), int(limits.CopyBudget/(2*c.step))))
	return nil
}

// run feeds what produce yields to the workers until all is done or the first
// error.
func (c *copying) run(ctx context.Context, produce func(context.Context, func(Extent) bool) error,
	work func(context.Context, Extent, []byte) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	queue := make(chan Extent)
	var wg sync.WaitGroup
	for range c.workers {
		wg.Go(func() { c.workLoop(ctx, cancel, queue, work) })
	}
	err := produce(ctx, func(e Extent) bool {
		select {
		case queue <- e:
			return true
		case <-ctx.Done():
			return false
		}
	})
	if err != nil {
		cancel(err)
	}
	close(queue)
	wg.Wait()
	return context.Cause(ctx)
}

func (c *copying) workLoop(ctx context.Context, cancel context.CancelCauseFunc, queue <-chan Extent,
	work func(context.Context, Extent, []byte) error) {
	var buf []byte
	for e := range queue {
		if ctx.Err() != nil {
			continue
		}
		if buf == nil {
			buf = make([]byte, 2*c.step) // the second half is for comparing
		}
		if err := work(ctx, e, buf); err != nil {
			cancel(err)
			continue
		}
		if c.Progress != nil {
			c.Progress(e.Len)
		}
	}
}

// pieces yields the source in the pieces of the copy.
func (c *copying) pieces(ctx context.Context, yield func(Extent) bool) error {
	var a aligner
	a.align, a.size = c.align, c.src.Size()
	a.yield = func(e Extent) bool {
		step := c.step
		if e.Zero {
			step = maxZero &^ (c.align - 1)
		}
		return cut(e, step, yield)
	}
	if err := c.src.Extents(ctx, a.add); err != nil {
		return fmt.Errorf("extents of source: %w", err)
	}
	return a.end()
}

// slices yields the whole of the disk as data.
func (c *copying) slices(_ context.Context, yield func(Extent) bool) error {
	cut(Extent{Len: c.src.Size()}, c.step, yield)
	return nil
}

// cut yields e in pieces of at most step bytes.
func cut(e Extent, step int64, yield func(Extent) bool) bool {
	for e.Len > 0 {
		n := min(e.Len, step)
		if !yield(Extent{Off: e.Off, Len: n, Zero: e.Zero}) {
			return false
		}
		e.Off, e.Len = e.Off+n, e.Len-n
	}
	return true
}

func (c *copying) copyPiece(ctx context.Context, e Extent, buf []byte) error {
	if e.Zero {
		return c.zero(ctx, e.Off, e.Len)
	}
	buf = buf[:e.Len]
	if err := c.src.ReadAt(ctx, buf, e.Off); err != nil {
		return fmt.Errorf("read source at %d+%d: %w", e.Off, e.Len, err)
	}
	return c.put(ctx, buf, e.Off)
}

// put writes p, the zeroes in it as zeroes unless they are to be allocated.
func (c *copying) put(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		n, zero := len(p), false
		if !c.Allocated {
			n, zero = prefix(p, int(max(c.granule, c.align)))
		}
		var err error
		if zero {
			err = c.zero(ctx, off, int64(n))
		} else if err = c.dst.WriteAt(ctx, p[:n], off); err != nil {
			err = fmt.Errorf("write destination at %d+%d: %w", off, n, err)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (c *copying) zero(ctx context.Context, off, n int64) error {
	if c.DestinationIsZero && !c.Allocated {
		return nil
	}
	if err := c.dst.Zero(ctx, off, n, c.Allocated); err != nil {
		return fmt.Errorf("zero destination at %d+%d: %w", off, n, err)
	}
	return nil
}

// prefix is the longest beginning of p, in whole granules of g bytes and the
// rest at its end, that is zero or has no zero granule.
func prefix(p []byte, g int) (n int, zero bool) {
	zero = backing.AllZero(p[:min(g, len(p))])
	for n < len(p) {
		end := min(n+g, len(p))
		if backing.AllZero(p[n:end]) != zero {
			break
		}
		n = end
	}
	return n, zero
}

// comparePiece reads both sides in halves of the buffer.
func (c *copying) comparePiece(ctx context.Context, e Extent, buf []byte) error {
	buf, other := buf[:e.Len], buf[e.Len:2*e.Len]
	if err := c.src.ReadAt(ctx, buf, e.Off); err != nil {
		return fmt.Errorf("verify: read source at %d+%d: %w", e.Off, e.Len, err)
	}
	if err := c.dst.ReadAt(ctx, other, e.Off); err != nil {
		return fmt.Errorf("verify: read destination at %d+%d: %w", e.Off, e.Len, err)
	}
	if bytes.Equal(buf, other) {
		return nil
	}
	for i := range buf {
		if buf[i] != other[i] {
			return fmt.Errorf("verify: %w at %d", ErrDiffers, e.Off+int64(i))
		}
	}
	return nil
}

// aligner makes a list of extents fit an alignment: zeroes shrink, data grows.
type aligner struct {
	align, size int64
	yield       func(Extent) bool
	done        int64 // all before has been yielded
	next        int64 // where the next extent must begin
	err         error
}

// add takes the next extent.
func (a *aligner) add(e Extent) bool {
	if e.Off != a.next || e.Len <= 0 || e.Len > a.size-e.Off {
		a.err = fmt.Errorf("extent %d+%d of source does not follow %d", e.Off, e.Len, a.next)
		return false
	}
	a.next = e.Off + e.Len
	if !e.Zero {
		return true
	}
	start, end := (e.Off+a.align-1)&^(a.align-1), a.next&^(a.align-1)
	if start >= end {
		return true
	}
	if !a.data(start) {
		return false
	}
	a.done = end
	return a.yield(Extent{Off: start, Len: end - start, Zero: true})
}

// data yields what is between the last zeroes and end.
func (a *aligner) data(end int64) bool {
	if a.done == end {
		return true
	}
	e := Extent{Off: a.done, Len: end - a.done}
	a.done = end
	return a.yield(e)
}

// end yields the rest. What the source has not spoken of is data.
func (a *aligner) end() error {
	if a.err == nil {
		a.data(a.size)
	}
	return a.err
}

package layer

import (
	"context"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// BlockSizeOptions are the sizes of requests in bytes, powers of two.
type BlockSizeOptions struct {
	// Min is the block that every request must consist of; 0 keeps that of the
	// device. It may be smaller than the device's: then parts of blocks are
	// read, modified and written here.
	Min int64

	// Preferred is what guests are told to use; 0 keeps that of the device. It
	// is raised to Min and to 512.
	Preferred int64

	// Max splits larger reads and writes; 0 splits none.
	Max int64
}

// BlockSize changes which requests a device takes. A write of part of a block
// is exclusive for that block: no other write, zeroing or trim of it runs
// between the read and the write.
type BlockSize struct {
	backing.Passthrough
	opt   BlockSizeOptions
	inner int64 // block of the device below
	locks backing.RangeLocks
	bufs  sync.Pool // *[]byte of inner bytes
}

// NewBlockSize stands on dev. Sizes that are no powers of two, a Min above
// limits.LargestBlock, and a Max below Min or the block of dev are ErrInvalid.
func NewBlockSize(dev backing.Device, o BlockSizeOptions) (*BlockSize, error) {
	i := dev.Info()
	for _, n := range []int64{o.Min, o.Preferred, o.Max} {
		if n < 0 || n&(n-1) != 0 {
			return nil, invalid("set block size", "%d is not a power of two", n)
		}
	}
	if o.Min == 0 {
		o.Min = i.MinBlock
	}
	switch {
	case o.Min > limits.LargestBlock || i.MinBlock > limits.LargestBlock:
		return nil, invalid("set block size", "blocks are larger than %d bytes", limits.LargestBlock)
	case o.Preferred > limits.MaxIO:
		return nil, invalid("set block size", "the preferred block is larger than %d bytes", limits.MaxIO)
	case o.Max != 0 && o.Max < max(o.Min, i.MinBlock):
		return nil, invalid("set block size", "the largest request of %d bytes is smaller than a block", o.Max)
	}
	b := &BlockSize{Passthrough: backing.Passthrough{Next: dev}, opt: o, inner: i.MinBlock}
	b.bufs.New = func() any { p := make([]byte, b.inner); return &p }
	return b, nil
}

// Info has the sizes of the options. A last part of the disk that is smaller
// than a block is not shown.
func (b *BlockSize) Info() backing.Info {
	i := b.Next.Info()
	i.MinBlock = b.opt.Min
	if b.opt.Preferred != 0 {
		i.Preferred = b.opt.Preferred
	}
	i.Preferred = max(i.Preferred, i.MinBlock, 512)
	i.Size &^= max(b.opt.Min, b.inner) - 1
	return i
}

// fits tells whether a range needs neither modifying nor splitting.
func (b *BlockSize) fits(off, n int64) bool {
	return (off|n)&(b.inner-1) == 0 && (b.opt.Max == 0 || n <= b.opt.Max)
}

// modifies tells whether parts of blocks are ever written here.
func (b *BlockSize) modifies() bool { return b.opt.Min < b.inner }

// share locks a range of whole blocks against writes of parts of them. The
// lease is nil where there are none.
func (b *BlockSize) share(ctx context.Context, off, n int64) (backing.Lease, error) {
	if !b.modifies() {
		return nil, nil
	}
	return b.locks.Lock(ctx, off, off+n, false)
}

func release(l backing.Lease) {
	if l != nil {
		l.Release()
	}
}

// piece is the length of the first request for [off, off+n): whole blocks up
// to Max, or a part of one block.
func (b *BlockSize) piece(off, n int64) (length int64, whole bool) {
	if in := off & (b.inner - 1); in != 0 || n < b.inner {
		return min(n, b.inner-in), false
	}
	n &^= b.inner - 1
	if b.opt.Max != 0 {
		n = min(n, b.opt.Max)
	}
	return n, true
}

// block lends a buffer of one block.
func (b *BlockSize) block() (p []byte, giveBack func()) {
	v := b.bufs.Get().(*[]byte)
	return *v, func() { b.bufs.Put(v) }
}

func (b *BlockSize) ReadAt(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		n, whole := b.piece(off, int64(len(p)))
		var err error
		if whole {
			err = b.Next.ReadAt(ctx, p[:n], off)
		} else {
			err = b.readPart(ctx, p[:n], off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readPart reads within one block.
func (b *BlockSize) readPart(ctx context.Context, p []byte, off int64) error {
	buf, giveBack := b.block()
	defer giveBack()
	lo := off &^ (b.inner - 1)
	if err := b.Next.ReadAt(ctx, buf, lo); err != nil {
		return err
	}
	copy(p, buf[off-lo:])
	return nil
}

func (b *BlockSize) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	for len(p) > 0 {
		n, whole := b.piece(off, int64(len(p)))
		var err error
		if whole {
			err = b.writeBlocks(ctx, p[:n], off, f)
		} else {
			err = b.modify(ctx, off, n, f, func(part []byte) { copy(part, p) })
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (b *BlockSize) writeBlocks(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	l, err := b.share(ctx, off, int64(len(p)))
	if err != nil {
		return err
	}
	defer release(l)
	return b.Next.WriteAt(ctx, p, off, f)
}

// modify changes [off, off+n) within one block.
func (b *BlockSize) modify(ctx context.Context, off, n int64, f backing.Flags, change func(part []byte)) error {
	lo := off &^ (b.inner - 1)
	l, err := b.locks.Lock(ctx, lo, lo+b.inner, true)
	if err != nil {
		return err
	}
	defer l.Release()
	buf, giveBack := b.block()
	defer giveBack()
	if err := b.Next.ReadAt(ctx, buf, lo); err != nil {
		return err
	}
	change(buf[off-lo : off-lo+n])
	return b.Next.WriteAt(ctx, buf, lo, f)
}

// Zero writes zeroes into parts of blocks. With FastZero a range that has such
// parts is ErrNotSupported: reading first is not fast.
func (b *BlockSize) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	head, body := b.split(off, n)
	if f&backing.FastZero != 0 && body != n {
		return backing.ErrNotSupported
	}
	if body > 0 {
		if err := b.zeroBlocks(ctx, off+head, body, f); err != nil {
			return err
		}
	}
	for _, part := range [][2]int64{{off, head}, {off + head + body, n - head - body}} {
		if part[1] == 0 {
			continue
		}
		if err := b.modify(ctx, part[0], part[1], f&backing.FUA, func(p []byte) { clear(p) }); err != nil {
			return err
		}
	}
	return nil
}

func (b *BlockSize) zeroBlocks(ctx context.Context, off, n int64, f backing.Flags) error {
	l, err := b.share(ctx, off, n)
	if err != nil {
		return err
	}
	defer release(l)
	return b.Next.Zero(ctx, off, n, f)
}

// split gives the length of the part before the first whole block, and of the
// whole blocks. A range within a block is all head.
func (b *BlockSize) split(off, n int64) (head, body int64) {
	head = min(-off&(b.inner-1), n)
	return head, (n - head) &^ (b.inner - 1)
}

// Trim trims the whole blocks in the range, if there are any.
func (b *BlockSize) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	head, body := b.split(off, n)
	if body == 0 {
		return nil
	}
	l, err := b.share(ctx, off+head, body)
	if err != nil {
		return err
	}
	defer release(l)
	return b.Next.Trim(ctx, off+head, body, f)
}

// Cache widens the range to whole blocks.
func (b *BlockSize) Cache(ctx context.Context, off, n int64) error {
	lo, hi := b.widen(off, n)
	return b.Next.Cache(ctx, lo, hi-lo)
}

// widen gives the ends of the blocks that a range touches.
func (b *BlockSize) widen(off, n int64) (lo, hi int64) {
	return off &^ (b.inner - 1), off + n + -(off+n)&(b.inner-1)
}

// Extents reports whole blocks of the layer: a block of several states is
// data.
func (b *BlockSize) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	lo, hi := b.widen(off, n)
	r := blockRuns[backing.Extent]{
		clip: clip{skip: off - lo, left: n}, block: b.opt.Min,
		join: func(x, y backing.Extent) backing.Extent {
			return backing.Extent{Hole: x.Hole && y.Hole, Zero: x.Zero && y.Zero}
		},
		emit: func(n int64, x backing.Extent) bool {
			x.Len = n
			return yield(x) && f&backing.ReqOne == 0
		},
	}
	return b.Next.Extents(ctx, lo, hi-lo, f&^backing.ReqOne, func(x backing.Extent) bool { return r.add(x.Len, x) })
}

// Describe reports whole blocks of the layer, too: a client takes less than a block
// for a block that nothing is said of. Of several values one has the lowest that is
// not 0: that of a bitmap's bits that are set, of a chain's image on top.
func (b *BlockSize) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	lo, hi := b.widen(off, n)
	r := blockRuns[uint32]{
		clip: clip{skip: off - lo, left: n}, block: b.opt.Min,
		join: func(x, y uint32) uint32 { return min(x-1, y-1) + 1 }, // 0 is the largest
		emit: func(n int64, v uint32) bool {
			return yield(backing.Status{Len: n, Value: v}) && f&backing.ReqOne == 0
		},
	}
	return b.Passthrough.Describe(ctx, name, lo, hi-lo, f&^backing.ReqOne, func(s backing.Status) bool { return r.add(s.Len, s.Value) })
}

// blockRuns makes runs of whole blocks out of runs of any length. join is the state
// of a block that has two; emit reports whether more is wanted.
type blockRuns[S any] struct {
	clip
	block int64
	join  func(x, y S) S
	emit  func(n int64, state S) bool

	part  int64 // of a block that is not whole yet: its bytes so far
	state S     // of the part
}

// add takes the state of the next n bytes and reports whether more is wanted.
func (r *blockRuns[S]) add(n int64, state S) bool {
	n = r.take(n)
	if r.part > 0 && n > 0 {
		k := min(n, r.block-r.part)
		r.part, r.state = r.part+k, r.join(r.state, state)
		if n -= k; r.part < r.block {
			return r.left > 0
		}
		r.part = 0
		if !r.emit(r.block, r.state) {
			return false
		}
	}
	whole := n &^ (r.block - 1)
	if n -= whole; n > 0 {
		r.part, r.state = n, state
	}
	return (whole == 0 || r.emit(whole, state)) && r.left > 0
}

// clip cuts a sequence of lengths down to left bytes after the first skip.
type clip struct{ skip, left int64 }

// take is what is left of the next length.
func (c *clip) take(n int64) int64 {
	k := min(n, c.skip)
	c.skip -= k
	n = min(n-k, c.left)
	c.left -= n
	return n
}

// Map forwards whole blocks. A mapped write holds off writes of parts of its
// blocks.
func (b *BlockSize) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if !b.fits(off, n) {
		return backing.ErrNotMappable
	}
	if op == engine.OpRead || !b.modifies() {
		return b.Next.Map(op, off, n, m)
	}
	held, ok := b.locks.TryShare(off, off+n)
	if !ok {
		return backing.ErrNotMappable
	}
	if err := b.Next.Map(op, off, n, m); err != nil {
		held.Release()
		return err
	}
	l := pairs.Get().(*pair)
	l.inner, l.outer = m.Lease, held
	m.Lease = l
	return nil
}

// pair is the lease of the device below, and the lock above it.
type pair struct{ inner, outer backing.Lease }

var pairs = sync.Pool{New: func() any { return new(pair) }}

func (l *pair) Release() {
	release(l.inner)
	l.outer.Release()
	*l = pair{}
	pairs.Put(l)
}

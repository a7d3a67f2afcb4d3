package bufpool

import (
	"bytes"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// arenaBufs is how many buffers of the first classes lie in the arena: many
// of the sizes that guests use at high depth, a few of those whose pinning
// costs little beside the copy.
var arenaBufs = [...]int{256, 64, 32, 32, 16} // 4, 8, 16, 32, 64 KiB

// The table above fills the arena exactly.
var (
	_ [limits.RingArena - (256*4+64*8+32*16+32*32+16*64)<<10]struct{}
	_ [(256*4+64*8+32*16+32*32+16*64)<<10 - limits.RingArena]struct{}
)

// mapMemory gets n bytes of zeroed memory that no core dump shows.
func mapMemory(n int) ([]byte, error) {
	addr, err := unix.MmapPtr(-1, 0, nil, uintptr(n), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of buffer memory: %w", n, err)
	}
	mem := unsafe.Slice((*byte)(addr), n)
	if err := unix.Madvise(mem, unix.MADV_DONTDUMP); err != nil {
		return nil, errors.Join(fmt.Errorf("keep buffers out of core dumps: %w", err), unmap(mem))
	}
	return mem, nil
}

func unmap(mem []byte) error {
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(mem)), uintptr(len(mem)))
}

// Arena is the region that an io_uring may register as one buffer, or nil. It
// lives as long as the pool and is never given back to the system piecewise:
// the kernel would go on using the pinned pages behind the old addresses. A
// buffer lies in it when its address does.
func (p *Pool) Arena() []byte { return p.arena }

// carveArena maps the arena and puts its buffers on the free lists. Without
// memory for it the pool works without an arena.
func (p *Pool) carveArena() {
	mem, err := mapMemory(limits.RingArena)
	if err != nil {
		return
	}
	p.arena = mem
	for i, n := range arenaBufs {
		c := &p.classes[i]
		size := int(c.size)
		bufs := p.carve(mem[:n*size], i)
		for j := range bufs {
			b := &bufs[j]
			b.arena = true
			b.next, c.arena = c.arena, b
		}
		mem = mem[n*size:]
		p.idle.Add(int64(n * size))
	}
}

// carve cuts mem into buffers of class i.
func (p *Pool) carve(mem []byte, i int) []Buf {
	size := int(p.classes[i].size)
	bufs := make([]Buf, len(mem)/size)
	for j := range bufs {
		bufs[j] = Buf{pool: p, mem: mem[j*size : (j+1)*size : (j+1)*size], class: uint8(i)}
	}
	return bufs
}

// grow returns a buffer of class c that is not resident yet: a cold one, or a
// new one.
func (p *Pool) grow(c *class) (*Buf, error) {
	c.mu.Lock()
	b := c.popColdLocked()
	c.mu.Unlock()
	if c.size < slabBytes {
		if b != nil {
			return b, nil
		}
		return p.growSlab(c)
	}
	if b == nil {
		b = &Buf{pool: p, class: uint8(classOf(int(c.size)))}
	}
	mem, err := mapMemory(int(c.size))
	if err != nil {
		c.mu.Lock()
		b.next, c.cold = c.cold, b
		c.mu.Unlock()
		return nil, err
	}
	b.mem = mem
	return b, nil
}

// growSlab cuts a new slab into buffers and returns one of them.
func (p *Pool) growSlab(c *class) (*Buf, error) {
	mem, err := mapMemory(slabBytes)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.slabs = append(p.slabs, mem)
	p.mu.Unlock()
	bufs := p.carve(mem, classOf(int(c.size)))
	c.mu.Lock()
	defer c.mu.Unlock()
	for j := range bufs[1:] {
		b := &bufs[1+j]
		b.next, c.cold = c.cold, b
	}
	return &bufs[0], nil
}

// shed keeps the free memory within limits.BufferCache after b, just
// released, took it above. What other classes keep goes first, so that the
// class in use stays warm; then b itself.
func (p *Pool) shed(b *Buf, c *class) {
	for i := classes - 1; i >= 0 && p.idle.Load() > limits.BufferCache; i-- {
		if o := &p.classes[i]; o != c {
			p.cool(o)
		}
	}
	if p.idle.Load() > limits.BufferCache && p.discard(b, c) {
		return
	}
	c.mu.Lock()
	b.next, c.hot = c.hot, b
	c.mu.Unlock()
}

// cool discards free buffers of c until the cache is within its bound or c
// has none left.
func (p *Pool) cool(c *class) {
	for p.idle.Load() > limits.BufferCache {
		c.mu.Lock()
		b := c.hot
		if b != nil {
			c.hot = b.next
		}
		c.mu.Unlock()
		if b == nil {
			return
		}
		if !p.discard(b, c) {
			c.mu.Lock()
			b.next, c.hot = c.hot, b
			c.mu.Unlock()
			return
		}
	}
}

// discard gives b's memory back to the system and puts b on the cold stack.
// It reports false when the system refuses, as it does for a part of locked
// memory (mlockall); that is not tried again.
func (p *Pool) discard(b *Buf, c *class) bool {
	if c.size < slabBytes {
		if p.locked.Load() {
			return false
		}
		if unix.Madvise(b.mem, unix.MADV_DONTNEED) != nil {
			p.locked.Store(true)
			return false
		}
	} else {
		if unmap(b.mem) != nil {
			return false
		}
		b.mem = nil
	}
	p.idle.Add(-c.size)
	c.mu.Lock()
	b.next, c.cold = c.cold, b
	c.mu.Unlock()
	return true
}

// Close unmaps everything. While a buffer is lent it changes nothing and says
// so. No engine may have the arena registered any more.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	if !p.charged.CompareAndSwap(0, uint64(closedMark)) {
		bufs, bytes := p.Outstanding()
		return fmt.Errorf("close buffer pool: %d buffers of %d bytes are still lent", bufs, bytes)
	}
	p.closed = true
	var errs []error
	for i := range p.classes {
		c := &p.classes[i]
		for b := c.hot; b != nil && c.size >= slabBytes; b = b.next {
			errs = append(errs, unmap(b.mem))
		}
		c.arena, c.hot, c.cold = nil, nil, nil
	}
	for _, s := range p.slabs {
		errs = append(errs, unmap(s))
	}
	if p.arena != nil {
		errs = append(errs, unmap(p.arena))
	}
	p.slabs, p.arena = nil, nil
	p.idle.Store(0)
	return errors.Join(errs...)
}

// fill overwrites mem, which is not empty, with the poison byte. It takes few
// steps: the race detector stops at each.
func fill(mem []byte) {
	mem[0] = poison
	for n := 1; n < len(mem); n *= 2 {
		copy(mem[n:], mem[:n])
	}
}

// checkPoison fills a buffer that is about to be lent, after making sure that
// nobody wrote to it since it was released.
func (b *Buf) checkPoison(resident bool) {
	if resident && b.filled && (b.mem[0] != poison || !bytes.Equal(b.mem[1:], b.mem[:len(b.mem)-1])) {
		panic("bufpool: buffer written to after it was released")
	}
	fill(b.mem)
}

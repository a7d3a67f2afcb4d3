package client

import (
	"errors"
	"fmt"
	"io"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// readLoop takes replies until the connection ends.
func (c *Client) readLoop() {
	defer close(c.readDone)
	for {
		err := c.readReply()
		if err == nil {
			continue
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			err = fmt.Errorf("%w: server hung up", ErrClosed)
		case !errors.Is(err, ErrProtocol):
			err = fmt.Errorf("%w: %w", ErrClosed, err)
		}
		c.fail(err)
		return
	}
}

// peek returns the next n bytes, which stay valid until the next read. n is
// smaller than the buffer.
func (c *Client) peek(n int) ([]byte, error) { return c.br.Peek(n) }

// skip passes over n bytes that were peeked at.
func (c *Client) skip(n int) { c.br.Discard(n) }

// readReply takes one simple reply or one chunk.
func (c *Client) readReply() error {
	p, err := c.peek(4)
	if err != nil {
		return err
	}
	magic := be.Uint32(p)
	switch {
	case magic == wire.MagicReply && c.replies != Extended:
		return c.simpleReply()
	case magic == wire.MagicChunk && c.replies == Structured:
		return c.chunkReply(wire.ChunkSize, wire.DecodeChunk)
	case magic == wire.MagicExtResponse && c.replies == Extended:
		return c.chunkReply(wire.ExtChunkSize, wire.DecodeExtChunk)
	}
	return violation("reply begins with %#x in a session with %v replies", magic, c.replies)
}

// find returns the call that a reply is for.
func (c *Client) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.pending[cookie]; k != nil {
		return k, nil
	}
	if c.err != nil {
		return nil, ErrClosed
	}
	return nil, violation("reply to cookie %#x, which no request has", cookie)
}

// complete ends a call whose whole reply has arrived.
func (c *Client) complete(k *call) {
	switch {
	case !c.forget(k): // fail was faster
	case k.fault != nil:
		k.finish(k.fault)
	default:
		k.finish(nil)
	}
}

func (c *Client) simpleReply() error {
	p, err := c.peek(wire.SimpleReplySize)
	if err != nil {
		return err
	}
	e, cookie, _ := wire.DecodeSimpleReply(p)
	c.skip(wire.SimpleReplySize)
	k, err := c.find(cookie)
	if err != nil {
		return err
	}
	if k.faults > 0 || k.covered.n > 0 {
		return violation("simple reply behind chunks to %v", k.req.Cmd)
	}
	if e != wire.OK {
		k.blame(e, nil)
		c.complete(k)
		return nil
	}
	switch k.req.Cmd {
	case wire.CmdExtents:
		return violation("simple reply to %v", k.req.Cmd)
	case wire.CmdRead:
		if c.replies != Simple {
			return violation("simple reply to %v in a session with %v replies", k.req.Cmd, c.replies)
		}
		if err := c.fill(k, 0, k.req.Len); err != nil {
			return err
		}
	}
	c.complete(k)
	return nil
}

// fill moves n bytes from the connection into the call's buffer at off. It
// never holds the buffer while it waits.
func (c *Client) fill(k *call, off, n uint64) error {
	for n > 0 {
		if _, err := c.peek(1); err != nil {
			return err
		}
		p, err := c.peek(int(min(uint64(c.br.Buffered()), n)))
		if err != nil {
			return err
		}
		k.put(p, off)
		c.skip(len(p))
		off, n = off+uint64(len(p)), n-uint64(len(p))
	}
	return nil
}

// blame notes an error of the reply; the first one is the call's.
func (k *call) blame(e wire.Errno, text []byte) {
	k.faults++
	if k.fault == nil {
		k.fault = &Error{Cmd: k.req.Cmd, Off: int64(k.req.Off), Len: int64(k.req.Len), Errno: e, Text: clip(text)}
	}
}

// chunkReply takes one chunk, its header being of size bytes.
func (c *Client) chunkReply(size int, decode func([]byte) (wire.Chunk, error)) error {
	p, err := c.peek(size)
	if err != nil {
		return err
	}
	h, err := decode(p)
	if err != nil {
		return violation("chunk: %v", err)
	}
	c.skip(size)
	k, err := c.find(h.Cookie)
	if err != nil {
		return err
	}
	if c.replies == Extended && h.Off != k.req.Off {
		return violation("reply for offset %d to %v at %d", h.Off, k.req.Cmd, k.req.Off)
	}
	if err := c.chunk(k, h); err != nil {
		return err
	}
	if h.Flags&wire.ChunkDone == 0 {
		return nil
	}
	if err := k.whole(c.ids); err != nil {
		return err
	}
	c.complete(k)
	return nil
}

func (c *Client) chunk(k *call, h wire.Chunk) error {
	switch {
	case h.Type.IsError():
		return c.errorChunk(k, h)
	case h.Type == wire.ChunkNone:
		if h.Len != 0 || h.Flags&wire.ChunkDone == 0 {
			return violation("%v with %d bytes and flags %#x", h.Type, h.Len, h.Flags)
		}
		return nil
	case h.Type == wire.ChunkData && k.req.Cmd == wire.CmdRead:
		return c.dataChunk(k, h)
	case h.Type == wire.ChunkHole && k.req.Cmd == wire.CmdRead:
		return c.holeChunk(k, h)
	case h.Type == wire.ChunkExtents && k.req.Cmd == wire.CmdExtents && c.replies == Structured:
		return c.extentsChunk(k, h, compactExtents)
	case h.Type == wire.ChunkExtentsExt && k.req.Cmd == wire.CmdExtents && c.replies == Extended:
		return c.extentsChunk(k, h, extendedExtents)
	}
	return violation("%v to %v", h.Type, k.req.Cmd)
}

// whole checks that a reply that ends has everything a success needs.
func (k *call) whole(ids []uint32) error {
	if k.fault != nil {
		return nil
	}
	switch k.req.Cmd {
	case wire.CmdRead:
		if k.covered.n != k.req.Len {
			return violation("read of %d bytes ends with %d", k.req.Len, k.covered.n)
		}
	case wire.CmdExtents:
		for i, l := range k.lists {
			if l == nil {
				return violation("block status without context %d", ids[i])
			}
		}
	}
	return nil
}

// within checks a piece of a read and returns its place in the buffer.
func (k *call) within(off, n uint64) (uint64, error) {
	start := off - k.req.Off
	if off < k.req.Off || n == 0 || start > k.req.Len || n > k.req.Len-start {
		return 0, violation("piece %d+%d of a read at %d+%d", off, n, k.req.Off, k.req.Len)
	}
	if err := k.covered.add(start, n); err != nil {
		return 0, err
	}
	return start, nil
}

func (c *Client) dataChunk(k *call, h wire.Chunk) error {
	if h.Len < 9 || h.Len > 8+k.req.Len {
		return violation("%v of %d bytes to a read of %d", h.Type, h.Len, k.req.Len)
	}
	p, err := c.peek(8)
	if err != nil {
		return err
	}
	off := be.Uint64(p)
	c.skip(8)
	at, err := k.within(off, h.Len-8)
	if err != nil {
		return err
	}
	return c.fill(k, at, h.Len-8)
}

func (c *Client) holeChunk(k *call, h wire.Chunk) error {
	if h.Len != 12 {
		return violation("%v of %d bytes", h.Type, h.Len)
	}
	p, err := c.peek(12)
	if err != nil {
		return err
	}
	off, n := be.Uint64(p), uint64(be.Uint32(p[8:]))
	c.skip(12)
	at, err := k.within(off, n)
	if err != nil {
		return err
	}
	k.zero(at, n)
	return nil
}

// errorChunk takes an error of a known or unknown type: all begin with a
// number and a text (proto.md, "Structured reply types").
func (c *Client) errorChunk(k *call, h wire.Chunk) error {
	if h.Len < 6 || h.Len > 6+limits.MaxString+8 {
		return violation("%v of %d bytes", h.Type, h.Len)
	}
	p, err := c.peek(int(h.Len))
	if err != nil {
		return err
	}
	e, text, off, err := wire.DecodeError(h.Type, p)
	used := 6 + len(text)
	if h.Type == wire.ChunkErrorOffset {
		used += 8
		if err == nil && k.req.Len > 0 && (off < k.req.Off || off-k.req.Off >= k.req.Len) {
			return violation("error at %d in a request at %d+%d", off, k.req.Off, k.req.Len)
		}
	}
	known := h.Type == wire.ChunkError || h.Type == wire.ChunkErrorOffset
	switch {
	case err != nil, len(text) > limits.MaxString, known && used != len(p):
		return violation("%v of %d bytes does not fit its text", h.Type, h.Len)
	case e == wire.OK:
		return violation("%v without an error", h.Type)
	case k.faults == limits.MaxFaults:
		return violation("more than %d errors in one reply", limits.MaxFaults)
	}
	k.blame(e, text)
	c.skip(len(p))
	return nil
}

// extentForm is the layout of a block status chunk.
type extentForm struct {
	head  uint64 // bytes before the descriptors
	entry uint64 // bytes of a descriptor
	get   func([]byte) (n, flags uint64)
}

var (
	compactExtents = extentForm{4, 8, func(p []byte) (uint64, uint64) {
		return uint64(be.Uint32(p)), uint64(be.Uint32(p[4:]))
	}}
	extendedExtents = extentForm{8, 16, func(p []byte) (uint64, uint64) {
		return be.Uint64(p), be.Uint64(p[8:])
	}}
)

func (c *Client) extentsChunk(k *call, h wire.Chunk, form extentForm) error {
	count := (h.Len - form.head) / form.entry
	if h.Len < form.head+form.entry || (h.Len-form.head)%form.entry != 0 || count > limits.MaxExtentsReply {
		return violation("%v of %d bytes", h.Type, h.Len)
	}
	p, err := c.peek(int(form.head))
	if err != nil {
		return err
	}
	if h.Type == wire.ChunkExtentsExt && uint64(be.Uint32(p[4:])) != count {
		return violation("%v counts %d extents in %d bytes", h.Type, be.Uint32(p[4:]), h.Len)
	}
	index := -1
	for i, id := range c.ids {
		if id == be.Uint32(p) {
			index = i
		}
	}
	if index < 0 || k.lists[index] != nil {
		return violation("block status of context %d, unknown or twice", be.Uint32(p))
	}
	if k.req.Flags&wire.FlagReqOne != 0 && count != 1 {
		return violation("%d extents where one was asked for", count)
	}
	c.skip(int(form.head))
	list, err := c.extentList(k, form, count, c.export.Contexts[index] == wire.ContextAllocation)
	k.lists[index] = list
	return err
}

// extentList reads count descriptors. Only the last may run beyond the
// request, where it is cut off (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS").
func (c *Client) extentList(k *call, form extentForm, count uint64, allocation bool) ([]Extent, error) {
	var list []Extent
	off, rest := k.req.Off, k.req.Len
	for i := range count {
		p, err := c.peek(int(form.entry))
		if err != nil {
			return nil, err
		}
		n, flags := form.get(p)
		c.skip(int(form.entry))
		switch {
		case n == 0:
			return nil, violation("extent of no bytes at %d", off)
		case n >= rest && i != count-1:
			return nil, violation("%d extents behind the end of the request", count-1-i)
		case allocation && flags>>32 != 0:
			return nil, violation("state %#x of an extent", flags)
		}
		n = min(n, rest)
		list = append(list, Extent{Off: int64(off), Len: int64(n), Flags: flags})
		off, rest = off+n, rest-n
	}
	return list, nil
}

package nbdtest

import (
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// request is one request in flight and what has come of its reply.
type request struct {
	wire.Request
	reply
	spans []span          // content received, sorted, no overlap
	told  map[uint32]bool // contexts answered
}

// span is a range of bytes of the export.
type span struct{ off, end uint64 }

// reply is a whole reply.
type reply struct {
	errno   wire.Errno
	text    string // of an error chunk
	data    []byte // of a READ
	extents map[uint32][]extent
	chunks  []wire.Chunk // empty for a simple reply
	content int          // number of content chunks
}

// extent is one descriptor of a block status reply.
type extent struct{ length, flags uint64 }

// encode returns the bytes of a request under a new cookie and expects its
// reply. In extended form a WRITE gets the flag that it must have.
func (p *peer) encode(r wire.Request, payload []byte) []byte {
	p.cookie++
	return p.encodeAs(0x5eed<<32|p.cookie, r, payload)
}

// encodeAs is encode with a chosen cookie.
func (p *peer) encodeAs(cookie uint64, r wire.Request, payload []byte) []byte {
	if p.form != extended && r.Len > 1<<32-1 {
		p.c.failf("%v of %d bytes does not fit a compact request: mistake in the check", r.Cmd, r.Len)
	}
	r.Cookie = cookie
	if r.Cmd == wire.CmdWrite && p.form == extended {
		r.Flags |= wire.FlagPayloadLen
	}
	if r.Cmd != wire.CmdDisc {
		p.pending[cookie] = append(p.pending[cookie], &request{Request: r})
	}
	if p.form == extended {
		return append(wire.AppendExtRequest(make([]byte, 0, wire.ExtRequestSize+len(payload)), r), payload...)
	}
	return append(wire.AppendRequest(make([]byte, 0, wire.RequestSize+len(payload)), r), payload...)
}

// most is n, or the largest aligned length that fits a request.
func (p *peer) most(n uint64) uint64 {
	if p.form == extended {
		return n
	}
	return min(n, 1<<32-512)
}

// do sends one request and waits for its reply, with none other in flight.
func (p *peer) do(r wire.Request, payload []byte) *request {
	wait := p.sendAside(p.encode(r, payload), whole)
	got := p.next()
	p.sent(wait)
	return got
}

// wantErrno is do, with the expected outcome.
func (p *peer) wantErrno(r wire.Request, payload []byte, want ...wire.Errno) *request {
	got := p.do(r, payload)
	if !slices.Contains(want, got.errno) {
		p.c.failf("%v flags %#x offset %d length %d: got %v %q, want %v", r.Cmd, uint16(r.Flags), r.Off, r.Len, got.errno, got.text, want)
	}
	return got
}

// next reads messages until one reply is complete, and returns it.
func (p *peer) next() *request {
	for {
		if r := p.message(); r != nil {
			l := p.pending[r.Cookie]
			l = slices.Delete(l, slices.Index(l, r), slices.Index(l, r)+1)
			if p.pending[r.Cookie] = l; len(l) == 0 {
				delete(p.pending, r.Cookie)
			}
			return r
		}
	}
}

// collect reads n replies and returns them by cookie.
func (p *peer) collect(n int) map[uint64]*request {
	m := make(map[uint64]*request, n)
	for range n {
		r := p.next()
		m[r.Cookie] = r
	}
	return m
}

// message reads one message and returns its request when that completes the
// reply.
func (p *peer) message() *request {
	magic := p.recv(4, "magic of a reply")
	switch m := be.Uint32(magic); {
	case m == wire.MagicReply && p.form != extended:
		return p.simpleReply(append(magic, p.recv(wire.SimpleReplySize-4, "simple reply")...))
	case m == wire.MagicChunk && p.form == structured:
		h, _ := wire.DecodeChunk(append(magic, p.recv(wire.ChunkSize-4, "chunk header")...))
		return p.chunk(h)
	case m == wire.MagicExtResponse && p.form == extended:
		h, _ := wire.DecodeExtChunk(append(magic, p.recv(wire.ExtChunkSize-4, "extended chunk header")...))
		return p.chunk(h)
	default:
		p.c.failf("reply starts with %#08x on a connection with %s replies", m, p.form)
	}
	return nil
}

// request finds the oldest request in flight with the cookie.
func (p *peer) request(cookie uint64) *request {
	l := p.pending[cookie]
	if len(l) == 0 {
		p.c.failf("reply to cookie %#x, which is not in flight", cookie)
	}
	return l[0]
}

func (p *peer) simpleReply(b []byte) *request {
	e, cookie, _ := wire.DecodeSimpleReply(b)
	r := p.request(cookie)
	r.errno = e
	p.checkErrno(r, e)
	// "Structured reply chunk message": a READ is never answered by a simple
	// reply once structured replies were agreed on.
	if p.form == structured && (r.Cmd == wire.CmdRead || r.Cmd == wire.CmdExtents && e == wire.OK) {
		p.c.failf("%v answered by a simple reply (%v) on a structured connection", r.Cmd, e)
	}
	if e == wire.OK && r.Cmd == wire.CmdRead {
		r.data = p.recv(int(r.Len), "data of a simple reply")
	}
	if e == wire.OK && r.Cmd == wire.CmdExtents {
		p.c.failf("%v succeeds with a simple reply", r.Cmd)
	}
	return r
}

// checkErrno holds the number to the eight of the protocol.
func (p *peer) checkErrno(r *request, e wire.Errno) {
	switch e {
	case wire.OK, wire.EPERM, wire.EIO, wire.ENOMEM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW, wire.ENOTSUP, wire.ESHUTDOWN:
	default:
		p.c.failf("%v answered with error %d, which the protocol does not know", r.Cmd, uint32(e))
	}
	if e == wire.ENOTSUP && r.Flags&wire.FlagFastZero == 0 {
		p.c.failf("%v answered with ENOTSUP without FAST_ZERO", r.Cmd)
	}
}

// chunk reads the payload of a chunk and returns its request if it was the
// last one.
func (p *peer) chunk(h wire.Chunk) *request {
	r := p.request(h.Cookie)
	if p.form == extended && h.Off != r.Off {
		p.c.failf("%v at %d: chunk repeats offset %d", r.Cmd, r.Off, h.Off)
	}
	r.chunks = append(r.chunks, h)
	switch {
	case h.Type == wire.ChunkNone:
		if h.Len != 0 || h.Flags&wire.ChunkDone == 0 {
			p.c.failf("%v: %v with length %d and flags %#x", r.Cmd, h.Type, h.Len, uint16(h.Flags))
		}
	case h.Type == wire.ChunkData && r.Cmd == wire.CmdRead:
		p.dataChunk(r, h)
	case h.Type == wire.ChunkHole && r.Cmd == wire.CmdRead:
		p.holeChunk(r, h)
	case h.Type == wire.ChunkExtents && r.Cmd == wire.CmdExtents && p.form == structured,
		h.Type == wire.ChunkExtentsExt && r.Cmd == wire.CmdExtents && p.form == extended:
		p.extentsChunk(r, h)
	case h.Type == wire.ChunkError, h.Type == wire.ChunkErrorOffset:
		p.errorChunk(r, h)
	default:
		p.c.failf("%v: chunk %v on a connection with %s replies", r.Cmd, h.Type, p.form)
	}
	if h.Flags&wire.ChunkDone == 0 {
		return nil
	}
	p.complete(r)
	return r
}

// claim notes that [off, off+n) of a READ has been received.
func (p *peer) claim(r *request, off, n uint64) []byte {
	if n == 0 || off < r.Off || off-r.Off > r.Len || n > r.Len-(off-r.Off) {
		p.c.failf("READ of %d+%d: content at %d+%d", r.Off, r.Len, off, n)
	}
	s := span{off, off + n}
	i, _ := slices.BinarySearchFunc(r.spans, s, func(a, b span) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	if i > 0 && r.spans[i-1].end > s.off || i < len(r.spans) && r.spans[i].off < s.end {
		p.c.failf("READ of %d+%d: content at %d+%d comes twice", r.Off, r.Len, off, n)
	}
	r.spans = slices.Insert(r.spans, i, s)
	if r.data == nil {
		r.data = make([]byte, r.Len)
	}
	r.content++
	return r.data[off-r.Off:][:n]
}

func (p *peer) dataChunk(r *request, h wire.Chunk) {
	if h.Len <= 8 {
		p.c.failf("READ: data chunk of %d bytes", h.Len)
	}
	off := be.Uint64(p.recv(8, "offset of a data chunk"))
	p.recvInto(p.claim(r, off, h.Len-8), "data chunk")
}

func (p *peer) holeChunk(r *request, h wire.Chunk) {
	if h.Len != 12 {
		p.c.failf("READ: hole chunk of %d bytes", h.Len)
	}
	b := p.recv(12, "hole chunk")
	p.claim(r, be.Uint64(b), uint64(be.Uint32(b[8:])))
}

func (p *peer) errorChunk(r *request, h wire.Chunk) {
	if h.Len > 6+4096+8 {
		p.c.failf("%v: error chunk of %d bytes", r.Cmd, h.Len)
	}
	b := p.recv(int(h.Len), "error chunk")
	e, text, _, err := wire.DecodeError(h.Type, b)
	want := 6 + len(text)
	if h.Type == wire.ChunkErrorOffset {
		want += 8
	}
	if err != nil || len(b) != want || e == wire.OK {
		p.c.failf("%v: error chunk %v: number %d, text of %d bytes, %d bytes in all (%v)", r.Cmd, h.Type, e, len(text), len(b), err)
	}
	p.checkErrno(r, e)
	if r.errno == wire.OK {
		r.errno, r.text = e, string(text)
	}
}

// extentsChunk reads one context's answer and holds it to the rules of
// "NBD_REPLY_TYPE_BLOCK_STATUS".
func (p *peer) extentsChunk(r *request, h wire.Chunk) {
	if h.Len > 16<<20 {
		p.c.failf("BLOCK_STATUS: chunk of %d bytes", h.Len)
	}
	b := p.recv(int(h.Len), "block status")
	head, each := 4, 8
	if h.Type == wire.ChunkExtentsExt {
		head, each = 8, 16
	}
	if len(b) < head+each || (len(b)-head)%each != 0 {
		p.c.failf("BLOCK_STATUS: chunk of %d bytes", len(b))
	}
	id := be.Uint32(b)
	if _, ok := p.contexts[id]; !ok || r.told[id] {
		p.c.failf("BLOCK_STATUS: context %d is not selected or answered twice", id)
	}
	var l []extent
	for b := b[head:]; len(b) > 0; b = b[each:] {
		if each == 16 {
			l = append(l, extent{be.Uint64(b), be.Uint64(b[8:])})
		} else {
			l = append(l, extent{uint64(be.Uint32(b)), uint64(be.Uint32(b[4:]))})
		}
	}
	if head == 8 && int(be.Uint32(b[4:])) != len(l) {
		p.c.failf("BLOCK_STATUS: count %d, want %d", be.Uint32(b[4:]), len(l))
	}
	p.checkExtents(r, l)
	if r.told == nil {
		r.told, r.extents = map[uint32]bool{}, map[uint32][]extent{}
	}
	r.told[id], r.extents[id] = true, l
}

func (p *peer) checkExtents(r *request, l []extent) {
	n := r.Len
	if r.Flags&wire.FlagPayloadLen != 0 {
		n = p.export.size - r.Off // the request's own length is in its payload
	}
	var sum uint64
	for i, e := range l {
		if e.length == 0 {
			p.c.failf("BLOCK_STATUS of %d+%d: extent %d of length 0", r.Off, r.Len, i)
		}
		if sum >= n {
			p.c.failf("BLOCK_STATUS of %d+%d: extent %d of %d starts past the request", r.Off, r.Len, i, len(l))
		}
		sum += e.length
	}
	if r.Off+sum > p.export.size {
		p.c.failf("BLOCK_STATUS of %d+%d: extents reach %d, past the end %d", r.Off, r.Len, r.Off+sum, p.export.size)
	}
	if r.Flags&wire.FlagReqOne != 0 && (len(l) != 1 || sum > n) {
		p.c.failf("BLOCK_STATUS REQ_ONE of %d+%d: %d extents of %d bytes", r.Off, r.Len, len(l), sum)
	}
}

// complete holds a finished structured reply to the rules of its command.
func (p *peer) complete(r *request) {
	if r.errno != wire.OK {
		return
	}
	switch r.Cmd {
	case wire.CmdRead:
		var n uint64
		for _, s := range r.spans {
			n += s.end - s.off
		}
		if n != r.Len {
			p.c.failf("READ of %d+%d succeeds with %d bytes", r.Off, r.Len, n)
		}
		if r.Flags&wire.FlagDF != 0 && r.content != 1 {
			p.c.failf("READ with DF comes in %d chunks", r.content)
		}
	case wire.CmdExtents:
		if len(r.told) == 0 || r.Flags&wire.FlagPayloadLen == 0 && len(r.told) != len(p.contexts) {
			p.c.failf("BLOCK_STATUS succeeds with %d of %d contexts", len(r.told), len(p.contexts))
		}
	}
}

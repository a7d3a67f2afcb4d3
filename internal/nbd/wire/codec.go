package wire

import (
	"encoding/binary"
	"errors"
)

var be = binary.BigEndian

// Errors of the decoders. None of them can be answered: the stream is out of
// step and the connection ends.
var (
	ErrMagic = errors.New("wrong magic")
	ErrShort = errors.New("truncated")
)

// Request is one request of the transmission phase, compact or extended.
type Request struct {
	Flags  CmdFlags
	Cmd    Cmd
	Cookie uint64
	Off    uint64
	// Len is the effect length, or the payload length of a request that
	// carries one. A compact request has 32 bits of it.
	Len uint64
}

// head is what requests and chunks of either form begin with.
type head struct {
	flags, kind uint16
	cookie      uint64
}

// headSize is its size, with the magic.
const headSize = 16

// cutHead splits the head off a message of size bytes.
func cutHead(b []byte, size int, magic uint32) (h head, rest []byte, err error) {
	if len(b) < size {
		return head{}, nil, ErrShort
	}
	if be.Uint32(b) != magic {
		return head{}, nil, ErrMagic
	}
	return head{be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:])}, b[headSize:], nil
}

func appendHead(b []byte, magic uint32, h head) []byte {
	b = be.AppendUint32(b, magic)
	b = be.AppendUint16(b, h.flags)
	b = be.AppendUint16(b, h.kind)
	return be.AppendUint64(b, h.cookie)
}

func (r *Request) head() head { return head{uint16(r.Flags), uint16(r.Cmd), r.Cookie} }

func request(h head, off, n uint64) Request {
	return Request{Flags: CmdFlags(h.flags), Cmd: Cmd(h.kind), Cookie: h.cookie, Off: off, Len: n}
}

// DecodeRequest reads a compact request from the first RequestSize bytes.
func DecodeRequest(b []byte) (Request, error) {
	h, b, err := cutHead(b, RequestSize, MagicRequest)
	if err != nil {
		return Request{}, err
	}
	return request(h, be.Uint64(b), uint64(be.Uint32(b[8:]))), nil
}

// DecodeExtRequest reads an extended request from the first ExtRequestSize
// bytes.
func DecodeExtRequest(b []byte) (Request, error) {
	h, b, err := cutHead(b, ExtRequestSize, MagicExtRequest)
	if err != nil {
		return Request{}, err
	}
	return request(h, be.Uint64(b), be.Uint64(b[8:])), nil
}

// AppendRequest appends r in compact form; r.Len must fit 32 bits.
func AppendRequest(b []byte, r Request) []byte {
	b = be.AppendUint64(appendHead(b, MagicRequest, r.head()), r.Off)
	return be.AppendUint32(b, uint32(r.Len))
}

// AppendExtRequest appends r in extended form.
func AppendExtRequest(b []byte, r Request) []byte {
	b = be.AppendUint64(appendHead(b, MagicExtRequest, r.head()), r.Off)
	return be.AppendUint64(b, r.Len)
}

// AppendSimpleReply appends a simple reply header.
func AppendSimpleReply(b []byte, e Errno, cookie uint64) []byte {
	b = be.AppendUint32(b, MagicReply)
	b = be.AppendUint32(b, uint32(e))
	return be.AppendUint64(b, cookie)
}

// Chunk is the header of one chunk of a structured or extended reply.
type Chunk struct {
	Flags  ChunkFlags
	Type   ChunkType
	Cookie uint64
	// Off repeats the request's offset, even for data from its middle
	// (extended form only).
	Off uint64
	// Len is the payload length that follows.
	Len uint64
}

func (c *Chunk) head() head { return head{uint16(c.Flags), uint16(c.Type), c.Cookie} }

func chunk(h head, off, n uint64) Chunk {
	return Chunk{Flags: ChunkFlags(h.flags), Type: ChunkType(h.kind), Cookie: h.cookie, Off: off, Len: n}
}

// AppendChunk appends a structured chunk header; c.Len must fit 32 bits.
func AppendChunk(b []byte, c Chunk) []byte {
	return be.AppendUint32(appendHead(b, MagicChunk, c.head()), uint32(c.Len))
}

// AppendExtChunk appends an extended chunk header.
func AppendExtChunk(b []byte, c Chunk) []byte {
	b = be.AppendUint64(appendHead(b, MagicExtResponse, c.head()), c.Off)
	return be.AppendUint64(b, c.Len)
}

// DecodeSimpleReply reads a simple reply header.
func DecodeSimpleReply(b []byte) (e Errno, cookie uint64, err error) {
	if len(b) < SimpleReplySize {
		return 0, 0, ErrShort
	}
	if be.Uint32(b) != MagicReply {
		return 0, 0, ErrMagic
	}
	return Errno(be.Uint32(b[4:])), be.Uint64(b[8:]), nil
}

// DecodeChunk reads a structured chunk header.
func DecodeChunk(b []byte) (Chunk, error) {
	h, b, err := cutHead(b, ChunkSize, MagicChunk)
	if err != nil {
		return Chunk{}, err
	}
	return chunk(h, 0, uint64(be.Uint32(b))), nil
}

// DecodeExtChunk reads an extended chunk header.
func DecodeExtChunk(b []byte) (Chunk, error) {
	h, b, err := cutHead(b, ExtChunkSize, MagicExtResponse)
	if err != nil {
		return Chunk{}, err
	}
	return chunk(h, be.Uint64(b), be.Uint64(b[8:])), nil
}

// AppendHole appends the payload of a ChunkHole.
func AppendHole(b []byte, off uint64, n uint32) []byte {
	return be.AppendUint32(be.AppendUint64(b, off), n)
}

// AppendError appends the payload of a ChunkError.
func AppendError(b []byte, e Errno, text string) []byte {
	b = be.AppendUint32(b, uint32(e))
	b = be.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

// AppendErrorOffset appends the payload of a ChunkErrorOffset: the offset
// comes after the text.
func AppendErrorOffset(b []byte, e Errno, text string, off uint64) []byte {
	return be.AppendUint64(AppendError(b, e, text), off)
}

// DecodeError reads the payload of either error chunk; off is 0 for a
// ChunkError. The text aliases p.
func DecodeError(t ChunkType, p []byte) (e Errno, text []byte, off uint64, err error) {
	if len(p) < 6 {
		return 0, nil, 0, ErrShort
	}
	e = Errno(be.Uint32(p))
	n := int(be.Uint16(p[4:]))
	rest := p[6:]
	if n > len(rest) {
		return 0, nil, 0, ErrShort
	}
	text, rest = rest[:n], rest[n:]
	if t == ChunkErrorOffset {
		if len(rest) < 8 {
			return 0, nil, 0, ErrShort
		}
		off = be.Uint64(rest)
	}
	return e, text, off, nil
}

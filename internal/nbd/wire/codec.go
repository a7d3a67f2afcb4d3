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

// DecodeRequest reads a compact request from the first RequestSize bytes.
func DecodeRequest(b []byte) (Request, error) {
	if len(b) < RequestSize {
		return Request{}, ErrShort
	}
	if be.Uint32(b) != MagicRequest {
		return Request{}, ErrMagic
	}
	return Request{
		Flags:  CmdFlags(be.Uint16(b[4:])),
		Cmd:    Cmd(be.Uint16(b[6:])),
		Cookie: be.Uint64(b[8:]),
		Off:    be.Uint64(b[16:]),
		Len:    uint64(be.Uint32(b[24:])),
	}, nil
}

// DecodeExtRequest reads an extended request from the first ExtRequestSize
// bytes.
func DecodeExtRequest(b []byte) (Request, error) {
	if len(b) < ExtRequestSize {
		return Request{}, ErrShort
	}
	if be.Uint32(b) != MagicExtRequest {
		return Request{}, ErrMagic
	}
	return Request{
		Flags:  CmdFlags(be.Uint16(b[4:])),
		Cmd:    Cmd(be.Uint16(b[6:])),
		Cookie: be.Uint64(b[8:]),
		Off:    be.Uint64(b[16:]),
		Len:    be.Uint64(b[24:]),
	}, nil
}

// AppendRequest appends r in compact form; r.Len must fit 32 bits.
func AppendRequest(b []byte, r Request) []byte {
	b = be.AppendUint32(b, MagicRequest)
	b = be.AppendUint16(b, uint16(r.Flags))
	b = be.AppendUint16(b, uint16(r.Cmd))
	b = be.AppendUint64(b, r.Cookie)
	b = be.AppendUint64(b, r.Off)
	return be.AppendUint32(b, uint32(r.Len))
}

// AppendExtRequest appends r in extended form.
func AppendExtRequest(b []byte, r Request) []byte {
	b = be.AppendUint32(b, MagicExtRequest)
	b = be.AppendUint16(b, uint16(r.Flags))
	b = be.AppendUint16(b, uint16(r.Cmd))
	b = be.AppendUint64(b, r.Cookie)
	b = be.AppendUint64(b, r.Off)
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

// AppendChunk appends a structured chunk header; c.Len must fit 32 bits.
func AppendChunk(b []byte, c Chunk) []byte {
	b = be.AppendUint32(b, MagicChunk)
	b = be.AppendUint16(b, uint16(c.Flags))
	b = be.AppendUint16(b, uint16(c.Type))
	b = be.AppendUint64(b, c.Cookie)
	return be.AppendUint32(b, uint32(c.Len))
}

// AppendExtChunk appends an extended chunk header.
func AppendExtChunk(b []byte, c Chunk) []byte {
	b = be.AppendUint32(b, MagicExtResponse)
	b = be.AppendUint16(b, uint16(c.Flags))
	b = be.AppendUint16(b, uint16(c.Type))
	b = be.AppendUint64(b, c.Cookie)
	b = be.AppendUint64(b, c.Off)
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
	if len(b) < ChunkSize {
		return Chunk{}, ErrShort
	}
	if be.Uint32(b) != MagicChunk {
		return Chunk{}, ErrMagic
	}
	return Chunk{
		Flags:  ChunkFlags(be.Uint16(b[4:])),
		Type:   ChunkType(be.Uint16(b[6:])),
		Cookie: be.Uint64(b[8:]),
		Len:    uint64(be.Uint32(b[16:])),
	}, nil
}

// DecodeExtChunk reads an extended chunk header.
func DecodeExtChunk(b []byte) (Chunk, error) {
	if len(b) < ExtChunkSize {
		return Chunk{}, ErrShort
	}
	if be.Uint32(b) != MagicExtResponse {
		return Chunk{}, ErrMagic
	}
	return Chunk{
		Flags:  ChunkFlags(be.Uint16(b[4:])),
		Type:   ChunkType(be.Uint16(b[6:])),
		Cookie: be.Uint64(b[8:]),
		Off:    be.Uint64(b[16:]),
		Len:    be.Uint64(b[24:]),
	}, nil
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

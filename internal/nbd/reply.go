package nbd

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// maxHead bounds the header of a reply that carries no text: an extended
// chunk header and the offset of its data.
const maxHead = wire.ExtChunkSize + 8

// appendChunk appends a chunk header in the form of the session. An extended
// one repeats the request's offset.
func (s *session) appendChunk(b []byte, req *wire.Request, f wire.ChunkFlags, t wire.ChunkType, n int) []byte {
	c := wire.Chunk{Flags: f, Type: t, Cookie: req.Cookie, Off: req.Off, Len: uint64(n)}
	if s.extended {
		return wire.AppendExtChunk(b, c)
	}
	return wire.AppendChunk(b, c)
}

// appendDone appends success without payload. Behind structured replies only
// READ must use chunks; behind extended headers everything (proto.md,
// "Structured reply chunk message").
func (s *session) appendDone(b []byte, req *wire.Request) []byte {
	if s.extended {
		return s.appendChunk(b, req, wire.ChunkDone, wire.ChunkNone, 0)
	}
	return wire.AppendSimpleReply(b, wire.OK, req.Cookie)
}

// appendReadHead appends what stands before the data of a successful read.
func (s *session) appendReadHead(b []byte, req *wire.Request) []byte {
	if !s.structured {
		return wire.AppendSimpleReply(b, wire.OK, req.Cookie)
	}
	b = s.appendChunk(b, req, wire.ChunkDone, wire.ChunkData, 8+int(req.Len))
	return binary.BigEndian.AppendUint64(b, req.Off)
}

// appendReadHole appends the whole answer to a read of a hole.
func (s *session) appendReadHole(b []byte, req *wire.Request) []byte {
	b = s.appendChunk(b, req, wire.ChunkDone, wire.ChunkHole, 12)
	return wire.AppendHole(b, req.Off, uint32(req.Len))
}

// appendError appends an error reply. at is the offset in the disk that could
// not be read, or -1.
func (s *session) appendError(b []byte, req *wire.Request, e wire.Errno, text string, at int64) []byte {
	if !s.structured {
		return wire.AppendSimpleReply(b, e, req.Cookie)
	}
	if at >= 0 {
		b = s.appendChunk(b, req, wire.ChunkDone, wire.ChunkErrorOffset, 6+len(text)+8)
		return wire.AppendErrorOffset(b, e, text, uint64(at))
	}
	b = s.appendChunk(b, req, wire.ChunkDone, wire.ChunkError, 6+len(text))
	return wire.AppendError(b, e, text)
}

// appendFailure appends the error reply to a request that ended with err, and
// logs it: what the storage did at warning level, what the client did at
// debug level. A request that was given up has failed for neither reason.
func (s *session) appendFailure(b []byte, req *wire.Request, err error, at int64) []byte {
	e := errnoOf(err, req)
	if s.ctx.Err() != nil && errors.Is(err, context.Canceled) {
		e = wire.ESHUTDOWN
	}
	if e == wire.EIO || e == wire.ENOSPC && backing.KindOf(err) == backing.ErrNoSpace {
		s.reportFailed(req, e, err)
	} else if s.chatty {
		s.opt.Log.Debug("request refused", "peer", s.conn.Peer(), "command", req.Cmd.String(),
			"offset", req.Off, "length", req.Len, "flags", req.Flags, "error", err)
	}
	if req.Cmd != wire.CmdRead || e != wire.EIO {
		at = -1
	}
	return s.appendError(b, req, e, errorText(err, e), at)
}

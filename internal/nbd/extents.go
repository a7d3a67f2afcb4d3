package nbd

import (
	"encoding/binary"
	"math"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// extents starts a BLOCK_STATUS. Its payload form, behind extended headers,
// selects some of the negotiated contexts and has the length inside.
func (s *session) extents(req *wire.Request) error {
	if req.Flags&wire.FlagPayloadLen != 0 {
		return s.extentsPayload(req)
	}
	if len(s.contexts) == 0 {
		return s.replyError(req, errNoContext)
	}
	return s.startExtents(req, s.contexts)
}

func (s *session) startExtents(req *wire.Request, ids []contextID) error {
	r := s.newRequest(req, len(ids)*limits.MaxExtents*extentSize, false)
	r.contexts = ids
	r.start()
	return nil
}

// extentSize is what one descriptor takes in the extended form.
const extentSize = 16

// extentsPayload reads the payload: a 64-bit effect length, then 32-bit
// context IDs, each negotiated and named once (extension-ext-header branch,
// "NBD_CMD_BLOCK_STATUS").
func (s *session) extentsPayload(req *wire.Request) error {
	if req.Len < 8 || req.Len > 8+4*limits.MaxContexts || req.Len%4 != 0 {
		return s.refuse(req, errBadPayload, req.Len)
	}
	b, err := s.in.body(int(req.Len))
	if err != nil {
		return err
	}
	n := binary.BigEndian.Uint64(b)
	ids, ok := s.pickContexts(b[8:])
	s.in.skip(len(b))
	if !ok {
		return s.replyError(req, errBadPayload)
	}
	sub := *req
	sub.Len = n
	return s.startExtents(&sub, ids)
}

func (s *session) pickContexts(b []byte) ([]contextID, bool) {
	var ids []contextID
	for ; len(b) >= 4; b = b[4:] {
		id := contextID(binary.BigEndian.Uint32(b))
		if !containsID(s.contexts, id) || containsID(ids, id) {
			return nil, false
		}
		ids = append(ids, id)
	}
	return ids, true
}

func containsID(ids []contextID, id contextID) bool {
	for _, i := range ids {
		if i == id {
			return true
		}
	}
	return false
}

// collectExtents makes the whole reply: one chunk per context. A reply may
// describe less than was asked for, never nothing.
func (s *session) collectExtents(req *wire.Request, ids []contextID) ([]byte, error) {
	if len(ids) == 0 {
		return s.appendDone(nil, req), nil
	}
	off, n := device(req)
	e := extentList{wide: s.extended, one: req.Flags&wire.FlagReqOne != 0}
	// FUA is accepted on every command and means nothing here.
	err := s.dev.Extents(s.ctx, off, n, deviceFlags(req.Flags&wire.FlagReqOne), e.add)
	if err != nil {
		return nil, err
	}
	var b []byte
	for i, id := range ids {
		var f wire.ChunkFlags
		if i == len(ids)-1 {
			f = wire.ChunkDone
		}
		b = s.appendExtents(b, req, f, id, &e)
	}
	return b, nil
}

func (s *session) appendExtents(b []byte, req *wire.Request, f wire.ChunkFlags, id contextID, e *extentList) []byte {
	if s.extended {
		b = s.appendChunk(b, req, f, wire.ChunkExtentsExt, 8+16*len(e.list))
		b = binary.BigEndian.AppendUint32(b, uint32(id))
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.list)))
		for _, x := range e.list {
			b = binary.BigEndian.AppendUint64(b, uint64(x.Len))
			b = binary.BigEndian.AppendUint64(b, uint64(state(x)))
		}
		return b
	}
	b = s.appendChunk(b, req, f, wire.ChunkExtents, 4+8*len(e.list))
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	for _, x := range e.list {
		b = binary.BigEndian.AppendUint32(b, uint32(x.Len))
		b = binary.BigEndian.AppendUint32(b, state(x))
	}
	return b
}

// state is an extent in base:allocation's flags.
func state(x backing.Extent) (f uint32) {
	if x.Hole {
		f |= wire.StateHole
	}
	if x.Zero {
		f |= wire.StateZero
	}
	return f
}

// extentList merges equal neighbours and keeps compact lengths below 2^32
// (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS").
type extentList struct {
	list []backing.Extent
	wide bool // lengths have 64 bits
	one  bool // REQ_ONE: there is one extent, cut where it has to be
}

// maxCompactExtent is the longest extent of a compact reply, a multiple of
// every block size.
const maxCompactExtent = math.MaxUint32 &^ (64<<10 - 1)

func (e *extentList) add(x backing.Extent) bool {
	if k := len(e.list) - 1; k >= 0 && e.list[k].Hole == x.Hole && e.list[k].Zero == x.Zero {
		x.Len += e.list[k].Len
		e.list = e.list[:k]
	}
	for !e.wide && x.Len > maxCompactExtent {
		if len(e.list) == limits.MaxExtents {
			return false
		}
		part := x
		part.Len = maxCompactExtent
		e.list = append(e.list, part)
		if e.one {
			return false
		}
		x.Len -= maxCompactExtent
	}
	if len(e.list) == limits.MaxExtents {
		return false
	}
	e.list = append(e.list, x)
	return true
}

package nbd

import (
	"encoding/binary"
	"math"
	"slices"

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

func (s *session) startExtents(req *wire.Request, contexts []metaContext) error {
	r, err := s.newBuffered(req, len(contexts)*chunkRoom(req))
	if err != nil {
		return err
	}
	r.contexts = contexts
	r.start()
	return nil
}

// chunkRoom is what the chunk of one context takes at most, in the extended form.
// What a buffer is larger stands for the list that the chunk is made of, whose
// descriptors are of the same size.
func chunkRoom(req *wire.Request) int {
	most := limits.MaxExtents
	if req.Flags&wire.FlagReqOne != 0 {
		most = 1
	}
	return maxHead + most*extentSize
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
	s.begin() // receiving may have ended the turn
	n := binary.BigEndian.Uint64(b)
	contexts, ok := s.pickContexts(b[8:])
	s.in.skip(len(b))
	if !ok {
		return s.replyError(req, errBadPayload)
	}
	sub := *req
	sub.Len = n
	return s.startExtents(&sub, contexts)
}

func (s *session) pickContexts(b []byte) (picked []metaContext, ok bool) {
	for ; len(b) >= 4; b = b[4:] {
		id := contextID(binary.BigEndian.Uint32(b))
		at := indexOf(s.contexts, id)
		if at < 0 || indexOf(picked, id) >= 0 {
			return nil, false
		}
		picked = append(picked, s.contexts[at])
	}
	return picked, true
}

func indexOf(contexts []metaContext, id contextID) int {
	return slices.IndexFunc(contexts, func(c metaContext) bool { return c.id == id })
}

// collectExtents appends the whole reply to b, which has room for it: one chunk per
// context. A reply may describe less than was asked for, never nothing.
func (s *session) collectExtents(b []byte, req *wire.Request, contexts []metaContext) ([]byte, error) {
	if len(contexts) == 0 {
		return s.appendDone(b, req), nil
	}
	var list []backing.Status
	for i, c := range contexts {
		e := statusList{list: list[:0], wide: s.extended, one: req.Flags&wire.FlagReqOne != 0}
		if err := s.describe(req, c, &e); err != nil {
			return nil, err
		}
		var f wire.ChunkFlags
		if i == len(contexts)-1 {
			f = wire.ChunkDone
		}
		b = s.appendExtents(b, req, f, c.id, &e)
		list = e.list
	}
	return b, nil
}

// describe fills e with what context c says of the range, or of its beginning:
// a client asks again for the rest (proto.md, "NBD_CMD_BLOCK_STATUS"). FUA is
// accepted on every command and means nothing here.
func (s *session) describe(req *wire.Request, c metaContext, e *statusList) error {
	off, n := device(req)
	f := deviceFlags(req.Flags&wire.FlagReqOne) | backing.Partial
	if c.name != wire.ContextAllocation {
		return s.dev.Describe(s.ctx, c.name, off, n, f, e.add)
	}
	return s.dev.Extents(s.ctx, off, n, f, func(x backing.Extent) bool {
		return e.add(backing.Status{Len: x.Len, Value: state(x)})
	})
}

func (s *session) appendExtents(b []byte, req *wire.Request, f wire.ChunkFlags, id contextID, e *statusList) []byte {
	if s.extended {
		b = s.appendChunk(b, req, f, wire.ChunkExtentsExt, 8+16*len(e.list))
		b = binary.BigEndian.AppendUint32(b, uint32(id))
		b = binary.BigEndian.AppendUint32(b, uint32(len(e.list)))
		for _, x := range e.list {
			b = binary.BigEndian.AppendUint64(b, uint64(x.Len))
			b = binary.BigEndian.AppendUint64(b, uint64(x.Value))
		}
		return b
	}
	b = s.appendChunk(b, req, f, wire.ChunkExtents, 4+8*len(e.list))
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	for _, x := range e.list {
		b = binary.BigEndian.AppendUint32(b, uint32(x.Len))
		b = binary.BigEndian.AppendUint32(b, x.Value)
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

// statusList merges equal neighbours and keeps compact lengths below 2^32
// (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS").
type statusList struct {
	list   []backing.Status
	looked int  // at so many extents
	wide   bool // lengths have 64 bits
	one    bool // REQ_ONE: there is one extent, cut where it has to be
}

// maxCompactExtent is the longest extent of a compact reply, a multiple of
// every block size.
const maxCompactExtent = math.MaxUint32 &^ (64<<10 - 1)

// add takes the next extent and reports whether more is wanted.
func (e *statusList) add(x backing.Status) bool {
	e.looked++
	if k := len(e.list) - 1; k >= 0 && e.list[k].Value == x.Value {
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
	return e.looked < limits.ExtentsLooked
}

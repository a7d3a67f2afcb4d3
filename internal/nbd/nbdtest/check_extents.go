package nbdtest

import (
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// extentChecks are about BLOCK_STATUS. The rules that hold for every reply are
// enforced where it is read.
func extentChecks(s *Server) []check {
	if !s.Features.Contexts {
		return nil
	}
	var l []check
	for _, f := range s.forms() {
		if f == simple {
			continue
		}
		l = append(l,
			check{id: "TX-21/lengths@" + string(f), claim: "extents start at the offset and stay inside the export, for every length", run: func(c *script) {
				p := c.openContexts(f)
				walkLengths(p, uint64(s.Size))
				p.works()
			}},
			check{id: "WR-46/req-one@" + string(f), claim: "REQ_ONE gives one extent, no longer than asked", run: func(c *script) {
				p := c.openContexts(f)
				for _, n := range []uint64{512, 4096, 1 << 20, p.most(uint64(s.Size))} {
					p.extentsOf(0, n, wire.FlagReqOne)
					p.extentsOf(uint64(s.Size)-n, n, wire.FlagReqOne)
				}
				p.works()
			}},
			check{id: "WR-46/walk@" + string(f), claim: "the whole export can be walked", run: func(c *script) {
				p := c.openContexts(f)
				for _, flags := range []wire.CmdFlags{0, wire.FlagReqOne} {
					if _, steps := p.walk(uint64(s.Size), flags); steps > 100000 {
						c.failf("%d requests to walk %d bytes", steps, s.Size)
					}
				}
				p.works()
			}},
		)
		if !s.ReadOnly {
			l = append(l, check{id: "WR-48@" + string(f), claim: "a range called zero reads as zeroes, a written one is not called zero", run: func(c *script) { truthful(c, f) }})
		}
	}
	if s.Features.Extended {
		l = append(l, extendedExtentChecks(s)...)
	}
	return l
}

// extentsOf asks for the only selected context's extents.
func (p *peer) extentsOf(off, n uint64, flags wire.CmdFlags) []extent {
	r := p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Flags: flags, Off: off, Len: n}, nil, wire.OK)
	for _, l := range r.extents {
		return l
	}
	return nil
}

// walk asks for the whole export, piece by piece.
func (p *peer) walk(size uint64, flags wire.CmdFlags) (l []extent, steps int) {
	for off := uint64(0); off < size; steps++ {
		n := p.most(size - off)
		for _, e := range p.extentsOf(off, n, flags) {
			l = append(l, e)
			off += e.length
		}
	}
	return l, steps
}

// walkLengths asks for awkward lengths at awkward offsets.
func walkLengths(p *peer, size uint64) {
	for _, off := range []uint64{0, 512, 4096, size / 2, size - 4096} {
		for _, n := range []uint64{1, 511, 512, 4096, 65536, 1<<31 - 512, 1 << 31, 1<<32 - 512, 1<<32 - 1, 1 << 32, 1<<32 + 512, size - off} {
			n = roundUp(min(n, size-off), p.c.s)
			if p.form == extended || n < 1<<32 {
				p.extentsOf(off, n, 0)
			}
		}
	}
}

// truthful makes data and zeroes, then compares what is said with what is read.
func truthful(c *script, f form) {
	p := c.openContexts(f)
	const area = 4 << 20
	model := pattern(48, area)
	p.put(0, model, 0)
	if c.s.has(wire.SendZero) {
		p.wantErrno(wire.Request{Cmd: wire.CmdZero, Off: 1 << 20, Len: 1 << 20}, nil, wire.OK)
		clear(model[1<<20 : 2<<20])
	}
	for off := uint64(0); off < area; {
		for _, e := range p.extentsOf(off, area-off, 0) {
			end := min(off+e.length, area)
			if e.flags&^(wire.StateHole|wire.StateZero) != 0 {
				c.failf("extent at %d: flags %#x are not of base:allocation", off, e.flags)
			}
			if e.flags&wire.StateZero != 0 {
				p.wantData(off, make([]byte, end-off))
				for i, b := range model[off:end] {
					if b != 0 {
						c.failf("byte %d was written and is called zero", off+uint64(i))
					}
				}
			}
			off = end
		}
	}
	p.works()
}

// extendedExtentChecks are about the form with a payload that names contexts.
func extendedExtentChecks(s *Server) []check {
	ask := func(p *peer, off, n uint64, ids ...uint32) *request {
		b := be.AppendUint64(nil, n)
		for _, id := range ids {
			b = be.AppendUint32(b, id)
		}
		return p.do(wire.Request{Cmd: wire.CmdExtents, Flags: wire.FlagPayloadLen, Off: off, Len: uint64(len(b))}, b)
	}
	id := func(p *peer) uint32 {
		for id := range p.contexts {
			return id
		}
		return 0
	}
	open := func(c *script) *peer {
		p := c.openContexts(extended)
		if p.export.flags&wire.SendBlockStatusPayload == 0 {
			c.failf("transmission flags %#x, want BLOCK_STATUS_PAYLOAD", uint16(p.export.flags))
		}
		return p
	}
	l := []check{
		{id: "WR-61", claim: "the payload form names contexts and an effect length", run: func(c *script) {
			p := open(c)
			for _, n := range []uint64{512, 1 << 20, uint64(s.Size)} {
				if r := ask(p, 0, n, id(p)); r.errno != wire.OK {
					c.failf("BLOCK_STATUS with payload: got %v %q", r.errno, r.text)
				}
			}
			p.works()
		}},
		{id: "WR-61/bounds", claim: "the payload form beyond the end is EINVAL", negative: true, run: func(c *script) {
			p := open(c)
			for _, n := range []uint64{uint64(s.Size) + 512, 1 << 63, 1<<64 - 512} {
				if r := ask(p, 512, n, id(p)); r.errno != wire.EINVAL {
					c.failf("BLOCK_STATUS of %d bytes with payload: got %v", n, r.errno)
				}
			}
			p.works()
		}},
	}
	for _, row := range []struct {
		name string
		ids  func(p *peer) []uint32
	}{
		{"duplicate", func(p *peer) []uint32 { return []uint32{id(p), id(p)} }},
		{"unknown", func(p *peer) []uint32 { return []uint32{id(p) + 1} }},
		{"mixed", func(p *peer) []uint32 { return []uint32{id(p), id(p) + 77} }},
		{"many", func(p *peer) []uint32 { return make([]uint32, 1000) }},
	} {
		l = append(l, check{id: "WR-61/" + row.name, claim: "context ids that are " + row.name + " are EINVAL, payload consumed", negative: true, run: func(c *script) {
			p := open(c)
			if r := ask(p, 0, 4096, row.ids(p)...); r.errno != wire.EINVAL {
				c.failf("BLOCK_STATUS with payload: got %v", r.errno)
			}
			p.works()
		}})
	}
	for _, n := range []int{0, 1, 7, 9, 11} {
		l = append(l, check{id: fmt.Sprintf("WR-61/length-%d", n), claim: "a payload of a wrong length is EINVAL, payload consumed", negative: true, run: func(c *script) {
			p := open(c)
			p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Flags: wire.FlagPayloadLen, Len: uint64(n)}, make([]byte, n), wire.EINVAL)
			p.works()
		}})
	}
	return append(l, check{id: "WR-61/unoffered", claim: "the payload form without a context is EINVAL, payload consumed", negative: true, run: func(c *script) {
		p := c.open(extended)
		if r := ask(p, 0, 4096, 0); r.errno != wire.EINVAL {
			c.failf("BLOCK_STATUS with payload: got %v", r.errno)
		}
		p.works()
	}})
}

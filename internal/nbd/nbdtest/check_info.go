package nbdtest

import (
	"fmt"
	"maps"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// infoChecks are about what INFO and GO tell.
func infoChecks(s *Server) []check {
	l := []check{
		{id: "HS-18/info-go", claim: "INFO and then GO tell the same", run: func(c *script) {
			all := []wire.Info{wire.InfoBlockSize, wire.InfoDescription, wire.InfoName, wire.InfoExport}
			p := c.haggle()
			a := p.info(wire.OptInfo, s.Export, all...)
			b := p.info(wire.OptGo, s.Export, all...)
			if !maps.Equal(a.raw, b.raw) {
				c.failf("INFO tells %+v, GO tells %+v", a.raw, b.raw)
			}
			p.works()
		}},
		{id: "HS-18/size", claim: "the export has its size and transmission flags", run: func(c *script) {
			p := c.haggle()
			if s.Features.Structured {
				p.negotiate(structured)
			}
			p.wantExport(p.info(wire.OptGo, s.Export), s.Features.Flags)
		}},
		{id: "WR-33/flag", claim: "SEND_DF is offered with structured replies only", run: func(c *script) {
			p := c.haggle()
			p.wantExport(p.info(wire.OptGo, s.Export), s.Features.Flags&^wire.SendDF)
		}},
		{id: "WR-09/unknown", claim: "unknown information requests are ignored", run: func(c *script) {
			p := c.haggle()
			p.info(wire.OptInfo, s.Export, 4, 99, 0x8000, 0xffff)
			p.info(wire.OptGo, s.Export, 4, 99, wire.InfoName, 0xffff)
			p.works()
		}},
		{id: "WR-08", claim: "GO never sends the 124 zeroes", run: func(c *script) {
			p := c.haggleWith(wire.FlagFixedNewstyle)
			p.usable()
		}},
		{id: "WR-09/repeated", claim: "the same request twice gives one answer", run: func(c *script) {
			p := c.haggle()
			i := wire.InfoBlockSize
			p.info(wire.OptGo, s.Export, i, i, i, wire.InfoExport, wire.InfoExport)
			p.works()
		}},
	}
	for set := range 16 {
		l = append(l, infoSetCheck(s, set))
	}
	if s.Features.BlockSizes {
		l = append(l, check{id: "WR-11/told", claim: "block sizes are told when asked for", run: func(c *script) {
			p := c.haggle()
			if e := p.info(wire.OptGo, s.Export, wire.InfoBlockSize); e.blocks == nil {
				c.failf("GO does not answer INFO_BLOCK_SIZE")
			}
		}})
	}
	return l
}

// wantExport compares what was told with what is expected.
func (p *peer) wantExport(e exportInfo, flags wire.ExportFlags) {
	if e.size != uint64(p.c.s.Size) {
		p.c.failf("size %d, want %d", e.size, p.c.s.Size)
	}
	if e.flags != flags {
		p.c.failf("transmission flags %#x, want %#x", uint16(e.flags), uint16(flags))
	}
	if e.flags&wire.HasFlags == 0 {
		p.c.failf("transmission flags %#x without HAS_FLAGS", uint16(e.flags))
	}
	if e.flags&wire.SendFastZero != 0 && e.flags&wire.SendZero == 0 {
		p.c.failf("transmission flags %#x: FAST_ZERO without WRITE_ZEROES", uint16(e.flags))
	}
}

// infoSetCheck asks for one subset of the four kinds of information.
func infoSetCheck(s *Server, set int) check {
	var infos []wire.Info
	for i := range 4 {
		if set&(1<<(3-i)) != 0 { // the export last, to have another order than the number's
			infos = append(infos, wire.Info(3-i))
		}
	}
	return check{id: fmt.Sprintf("WR-09/set-%d", set), claim: fmt.Sprintf("information requests %v, INFO_EXPORT before ACK", infos), run: func(c *script) {
		p := c.haggle()
		for _, o := range []wire.Opt{wire.OptInfo, wire.OptGo} {
			e := p.info(o, s.Export, infos...)
			if e.size != uint64(s.Size) {
				c.failf("%v: size %d, want %d", o, e.size, s.Size)
			}
			p.checkInfo(e)
		}
		p.works()
	}}
}

// checkInfo holds the optional information to the specification.
func (p *peer) checkInfo(e exportInfo) {
	for _, text := range []*string{e.name, e.description} {
		if text != nil && len(*text) > limits.MaxString {
			p.c.failf("name or description of %d bytes", len(*text))
		}
	}
	if e.blocks != nil {
		if text := badBlockSizes(*e.blocks, e.size); text != "" {
			p.c.failf("block sizes %+v: %s", *e.blocks, text)
		}
	}
}

// badBlockSizes says what is wrong with size constraints ("Size constraints").
func badBlockSizes(b wire.BlockSizes, size uint64) string {
	power := func(n uint32) bool { return n != 0 && n&(n-1) == 0 }
	switch {
	case !power(b.Min) || b.Min > 1<<16:
		return "minimum is not a power of two up to 64 KiB"
	case !power(b.Preferred) || b.Preferred < max(b.Min, 512):
		return "preferred is not a power of two from max(minimum, 512) on"
	case b.Max < b.Preferred && uint64(b.Max) != size:
		return "maximum is below preferred"
	case b.Max != 1<<32-1 && b.Max%b.Min != 0:
		return "maximum is not a multiple of minimum"
	case b.Max < 1<<20 && uint64(b.Max) < size:
		return "maximum is below 1 MiB"
	case size%uint64(b.Min) != 0:
		return "size is not a multiple of minimum"
	}
	return ""
}

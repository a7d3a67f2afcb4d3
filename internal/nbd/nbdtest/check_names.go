package nbdtest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// named returns the payload of an option that names an export.
func named(o wire.Opt, name string) []byte {
	if o == wire.OptInfo || o == wire.OptGo {
		return wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name, Infos: []wire.Info{wire.InfoBlockSize}})
	}
	return wire.AppendMetaRequest(nil, wire.MetaRequest{Name: name, Queries: []string{wire.ContextAllocation}})
}

// namedOptions are the options of s that name an export.
func namedOptions(s *Server) []wire.Opt {
	l := []wire.Opt{wire.OptInfo, wire.OptGo}
	if s.Features.Contexts {
		l = append(l, wire.OptListMeta, wire.OptSetMeta)
	}
	return l
}

// haggleNamed connects so far that every named option is answered.
func (c *script) haggleNamed() *peer {
	p := c.haggle()
	if c.s.Features.Contexts {
		p.negotiate(structured)
	}
	return p
}

// nameChecks are about export names and the bounds of the options that carry
// them.
func nameChecks(s *Server) []check {
	var l []check
	for _, o := range namedOptions(s) {
		id := "/" + optName(o)
		l = append(l,
			check{id: "HS-09" + id, claim: "a name longer than its option is ERR_INVALID", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				for _, n := range []uint32{1<<32 - 1, 1 << 31, 1 << 20, uint32(len(named(o, s.Export)))} {
					b := named(o, s.Export)
					be.PutUint32(b, n)
					p.wantOnly(o, b, wire.RepErrInvalid)
				}
				p.usable()
			}},
			check{id: "HS-14" + id, claim: "a body cut short anywhere is ERR_INVALID, connection usable", negative: true, run: func(c *script) {
				whole := named(o, s.Export)
				for part := range slices.Chunk(slices.Collect(seq(len(whole))), 20) {
					p := c.haggleNamed()
					for _, n := range part {
						p.wantOnly(o, whole[:n], wire.RepErrInvalid)
					}
					p.usable()
				}
			}},
			check{id: "HS-14/long" + id, claim: "a body with bytes behind its end is ERR_INVALID, connection usable", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				for _, n := range []int{1, 2, 100} {
					p.wantOnly(o, append(named(o, s.Export), make([]byte, n)...), wire.RepErrInvalid)
				}
				p.usable()
			}},
		)
		l = append(l, lengthChecks(s, o)...)
	}
	return append(l, unknownNameChecks(s)...)
}

// seq yields 0..n-1.
func seq(n int) func(func(int) bool) {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

func lengthChecks(s *Server, o wire.Opt) []check {
	var l []check
	for _, n := range []int{255, 256, 257, 4095, 4096} {
		l = append(l, check{id: fmt.Sprintf("HS-10/%s/%d", optName(o), n), claim: "a legal name that does not exist is ERR_UNKNOWN, not echoed", negative: true, run: func(c *script) {
			p := c.haggleNamed()
			p.wantUnknown(o, strings.Repeat("n", n))
			p.usable()
		}})
	}
	for _, n := range []int{4097, 5000, limits.MaxOption - 100} {
		l = append(l, check{id: fmt.Sprintf("HS-10/%s/%d", optName(o), n), claim: "an oversize name is ERR_TOO_BIG or ERR_INVALID, connection usable", negative: true, run: func(c *script) {
			p := c.haggleNamed()
			p.wantOnly(o, named(o, strings.Repeat("n", n)), wire.RepErrTooBig, wire.RepErrInvalid)
			p.usable()
		}})
	}
	return l
}

// wantUnknown asks for an export that does not exist.
func (p *peer) wantUnknown(o wire.Opt, name string) {
	r := p.wantOnly(o, named(o, name), wire.RepErrUnknown)
	if len(r.data) >= limits.MaxErrorText || len(name) > 16 && strings.Contains(string(r.data), name) {
		p.c.failf("%v of an unknown export: text of %d bytes %.80q", o, len(r.data), r.data)
	}
}

func unknownNameChecks(s *Server) []check {
	strange := []string{
		"nul\x00byte", "new\nline", "\x1b[31mred\x1b[0m", "\xff\xfe\x80", "../../../../etc/passwd", "/etc/passwd",
		"%s%n%d", "$(id)", "a'b\"c", s.Export + "\x00", s.Export + " ", strings.Repeat("é", 100),
	}
	l := []check{
		{id: "HS-11", claim: "an unknown name, then the known one on the same connection", negative: true, run: func(c *script) {
			p := c.haggle()
			p.wantUnknown(wire.OptInfo, unknownExport)
			p.wantUnknown(wire.OptGo, unknownExport)
			p.usable()
		}},
		{id: "HS-12", claim: "names with control characters, bad UTF-8, paths and formats are ERR_UNKNOWN", negative: true, run: func(c *script) {
			p := c.haggle()
			for _, name := range strange {
				r := p.wantOnly(wire.OptGo, named(wire.OptGo, name), wire.RepErrUnknown, wire.RepErrInvalid)
				if strings.ContainsAny(string(r.data), "\x00\x1b\n\xff") {
					c.failf("GO %q: text %q is not fit to print", name, r.data)
				}
			}
			p.usable()
		}},
		{id: "HS-15/short", claim: "a request count beyond the data is ERR_INVALID", negative: true, run: func(c *script) {
			p := c.haggle()
			for _, o := range []wire.Opt{wire.OptInfo, wire.OptGo} {
				b := append(wire.AppendString(nil, s.Export), 0xff, 0xff, 0, 3)
				p.wantOnly(o, b, wire.RepErrInvalid)
			}
			p.usable()
		}},
		{id: "HS-15/real", claim: "65535 real information requests end the connection", negative: true, run: func(c *script) {
			p := c.haggle()
			r := wire.InfoRequest{Name: s.Export, Infos: make([]wire.Info, 65535)}
			p.trySend(wire.AppendOption(nil, wire.OptInfo, wire.AppendInfoRequest(nil, r)))
			p.wantClosed("INFO of 128 KiB")
		}},
	}
	return l
}

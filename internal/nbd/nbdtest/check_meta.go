package nbdtest

import (
	"fmt"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// metaChecks are about metadata contexts during negotiation.
func metaChecks(s *Server) []check {
	if !s.Features.Contexts {
		return nil
	}
	l := append(metaQueryChecks(s), metaForgetChecks(s)...)
	for _, o := range []wire.Opt{wire.OptListMeta, wire.OptSetMeta} {
		id := "/" + optName(o)
		l = append(l,
			check{id: "HS-17/early" + id, claim: "contexts before structured replies are ERR_INVALID", negative: true, run: func(c *script) {
				p := c.haggle()
				p.wantOnly(o, named(o, s.Export), wire.RepErrInvalid)
				p.usable()
			}},
			check{id: "HS-19/count" + id, claim: "a query count beyond the data is ERR_INVALID", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				for _, n := range []uint32{2, 256, 257, 1 << 30, 1<<32 - 1} {
					b := wire.AppendString(nil, s.Export)
					b = wire.AppendString(be.AppendUint32(b, n), wire.ContextAllocation)
					p.wantOnly(o, b, wire.RepErrInvalid, wire.RepErrTooBig)
				}
				p.usable()
			}},
			check{id: "HS-19/duplicates" + id, claim: "256 equal queries get at most one reply", negative: true, run: func(c *script) {
				q := make([]string, 256)
				for i := range q {
					q[i] = wire.ContextAllocation
				}
				if got := c.haggleNamed().meta(o, s.Export, q...); len(got) != 1 {
					c.failf("%v: got %d contexts, want 1", o, len(got))
				}
			}},
			check{id: "HS-19/1000" + id, claim: "1000 equal queries get an error or at most one reply", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				r := wire.MetaRequest{Name: s.Export, Queries: make([]string, 1000)}
				for i := range r.Queries {
					r.Queries[i] = wire.ContextAllocation
				}
				if got := p.option(o, wire.AppendMetaRequest(nil, r)); len(got) > 2 {
					c.failf("%v: got %d replies, want at most 2", o, len(got))
				}
				p.usable()
			}},
			check{id: "HS-19/no-colon" + id, claim: "a query without a colon is an error or ignored", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				for _, q := range []string{"", "base", "nothing"} {
					r := wire.MetaRequest{Name: s.Export, Queries: []string{q}}
					p.wantOnly(o, wire.AppendMetaRequest(nil, r), wire.RepErrInvalid, wire.RepAck)
				}
				p.usable()
			}},
			check{id: "HS-19/oversize" + id, claim: "a query of 4097 bytes is an error or ignored", negative: true, run: func(c *script) {
				p := c.haggleNamed()
				r := wire.MetaRequest{Name: s.Export, Queries: []string{strings.Repeat("q", 4097)}}
				p.wantOnly(o, wire.AppendMetaRequest(nil, r), wire.RepErrInvalid, wire.RepErrTooBig, wire.RepAck)
				p.usable()
			}},
		)
	}
	return l
}

// metaQueryChecks are about which contexts a query names.
func metaQueryChecks(s *Server) []check {
	both, list, set := []wire.Opt{wire.OptListMeta, wire.OptSetMeta}, []wire.Opt{wire.OptListMeta}, []wire.Opt{wire.OptSetMeta}
	var l []check
	for _, row := range []struct {
		id, claim string
		opts      []wire.Opt
		queries   []string
		want      bool // base:allocation is among the replies
		none      bool // no reply at all
	}{
		{"WR-27/name", "base:allocation names itself", both, []string{wire.ContextAllocation}, true, false},
		{"WR-27/list-all", "LIST without a query lists all", list, nil, true, false},
		{"WR-27/list-wildcard", "base: is a wildcard in LIST", list, []string{"base:"}, true, false},
		{"WR-27/set-wildcard", "base: selects nothing in SET", set, []string{"base:"}, false, true},
		{"WR-27/set-none", "SET without a query selects nothing", set, nil, false, true},
		{"WR-27/leaf", "unknown leaves of base: are ignored", both, []string{"base:nothing", "base:allocation2", "base:alloc"}, false, true},
		{"WR-27/namespace", "unknown namespaces are ignored", both, []string{"x-nothing:here", "x-nothing:"}, false, true},
		{"WR-27/bitmap", "a dirty bitmap that does not exist is ignored", both, []string{"qemu:dirty-bitmap:no-such-bitmap"}, false, true},
		{"HS-19/case", "names of contexts are compared byte by byte", both, []string{"BASE:ALLOCATION", " base:allocation"}, false, true},
		{"WR-27/mixed", "known queries among unknown ones count", both, []string{"x:y", wire.ContextAllocation, "base:z"}, true, false},
	} {
		for _, o := range row.opts {
			l = append(l, check{id: row.id + "/" + optName(o), claim: row.claim, run: func(c *script) {
				p := c.haggleNamed()
				got := p.meta(o, s.Export, row.queries...)
				found := false
				for _, name := range got {
					found = found || name == wire.ContextAllocation
				}
				if found != row.want || row.none && len(got) != 0 {
					c.failf("%v %q: got %v", o, row.queries, got)
				}
				p.usable()
			}})
		}
	}
	return l
}

// metaForgetChecks are about when a selection ends.
func metaForgetChecks(s *Server) []check {
	malformed := []byte{0, 0, 0, 9, 'x'}
	rows := []struct {
		id, claim string
		next      func(p *peer)
		want      wire.Errno
	}{
		{"WR-25/kept", "a selection for the opened export counts", func(*peer) {}, wire.OK},
		{"WR-28", "LIST does not change the selection", func(p *peer) {
			p.meta(wire.OptListMeta, s.Export)
			p.meta(wire.OptListMeta, s.Export, "x:y")
		}, wire.OK},
		{"WR-25/info", "INFO does not change the selection", func(p *peer) { p.info(wire.OptInfo, s.Export) }, wire.OK},
		{"WR-24/zero", "SET without queries clears the former selection", func(p *peer) { p.meta(wire.OptSetMeta, s.Export) }, wire.EINVAL},
		{"TX-23/nothing", "SET that finds nothing clears the former selection", func(p *peer) { p.meta(wire.OptSetMeta, s.Export, "x:y") }, wire.EINVAL},
		{"WR-24/malformed", "a malformed SET clears the former selection", func(p *peer) { p.wantOnly(wire.OptSetMeta, malformed, wire.RepErrInvalid) }, wire.EINVAL},
		{"WR-24/unknown", "SET for an unknown export clears the former selection", func(p *peer) {
			p.wantUnknown(wire.OptSetMeta, unknownExport)
		}, wire.EINVAL},
	}
	var l []check
	for _, row := range rows {
		l = append(l, check{id: row.id, claim: row.claim, run: func(c *script) {
			p := c.haggle()
			p.negotiate(structured)
			p.selectContexts(wire.ContextAllocation)
			row.next(p)
			p.enter()
			p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Len: 1 << 20}, nil, row.want)
			p.works()
		}})
	}
	if s.Other != "" {
		l = append(l, check{id: "HS-17/other", claim: "a selection for one export does not count on another", negative: true, run: func(c *script) {
			p := c.haggle()
			p.negotiate(structured)
			p.meta(wire.OptSetMeta, s.Other, wire.ContextAllocation)
			p.enter()
			p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Len: 4096}, nil, wire.EINVAL)
			p.works()
		}})
	}
	if s.Features.Structured {
		l = append(l, check{id: "HS-20/structured", claim: "STRUCTURED_REPLY twice is ERR_INVALID", negative: true, run: func(c *script) {
			p := c.haggle()
			p.negotiate(structured)
			p.wantOnly(wire.OptStructuredReply, nil, wire.RepErrInvalid)
			p.usable()
		}})
	}
	return l
}

// extendedChecks are about the negotiation of extended headers.
func extendedChecks(s *Server) []check {
	if !s.Features.Extended {
		return []check{{id: "HS-20/extended", claim: "EXTENDED_HEADERS is ERR_UNSUP", negative: true, run: func(c *script) {
			p := c.haggle()
			p.wantOnly(wire.OptExtendedHeaders, nil, wire.RepErrUnsup)
			p.usable()
		}}}
	}
	return []check{
		{id: "HS-20/extended", claim: "EXTENDED_HEADERS twice is ERR_INVALID", negative: true, run: func(c *script) {
			p := c.haggle()
			p.negotiate(extended)
			p.wantOnly(wire.OptExtendedHeaders, nil, wire.RepErrInvalid)
			p.usable()
		}},
		{id: "WR-59/structured", claim: "STRUCTURED_REPLY after extended headers is ERR_EXT_HEADER_REQD", negative: true, run: func(c *script) {
			p := c.haggle()
			p.negotiate(extended)
			p.wantOnly(wire.OptStructuredReply, nil, wire.RepErrExtHeaderReqd)
			p.usable()
		}},
		{id: "WR-59/upgrade", claim: "extended headers after structured replies replace them", run: func(c *script) {
			p := c.haggle()
			p.negotiate(structured)
			p.negotiate(extended)
			p.usable()
		}},
		{id: "WR-59/export-name", claim: "EXPORT_NAME after extended headers ends the connection", negative: true, run: func(c *script) {
			p := c.haggle()
			p.negotiate(extended)
			p.trySend(wire.AppendOption(nil, wire.OptExportName, []byte(s.Export)))
			p.wantClosed("EXPORT_NAME")
		}},
		{id: "WR-57/flag", claim: "BLOCK_STATUS_PAYLOAD is offered with contexts only", run: func(c *script) {
			p := c.haggle()
			p.negotiate(extended)
			p.enter()
			if p.export.flags&wire.SendBlockStatusPayload != 0 {
				c.failf("transmission flags %#x without a context", uint16(p.export.flags))
			}
			p.works()
		}},
		{id: "WR-57/compact", claim: "a compact request on an extended connection ends it", negative: true, run: func(c *script) {
			p := c.open(extended)
			p.trySend(wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Len: 512}))
			if b := p.wantEnd("a compact request"); len(b) != 0 {
				c.failf("compact request: got %s", fmt.Sprintf("% x", b[:min(len(b), 32)]))
			}
		}},
	}
}

package nbdtest

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// unknownExport is a name that no server under test has.
const unknownExport = "no such export"

// Opts that no server knows.
const (
	optUnknown wire.Opt = 0x7a7a
	optPeek             = wire.OptPeekExport
)

// greetingChecks are about everything before the first option.
func greetingChecks(s *Server) []check {
	l := []check{
		{id: "HS-01", claim: "random bytes in place of client flags end the connection", negative: true, run: func(c *script) {
			for seed := range uint64(8) {
				p := c.connect()
				b := pattern(seed, 64)
				b[0] |= 0x80
				p.trySend(b)
				p.wantClosed("random bytes")
			}
		}},
		{id: "HS-03", claim: "1000 connections that close at once hurt nobody", negative: true, run: func(c *script) {
			for range 1000 {
				_ = c.dial().raw.Close()
			}
			c.admitted().haggle(clientFlags).usable()
		}},
		{id: "HS-06", claim: "without fixed newstyle an option but EXPORT_NAME ends the connection", negative: true, run: func(c *script) {
			for _, o := range []wire.Opt{wire.OptList, wire.OptGo, wire.OptStructuredReply, optUnknown} {
				p := c.connect()
				p.flags(0)
				p.trySend(wire.AppendOption(nil, o, nil))
				p.wantClosed(o.String())
			}
		}},
		{id: "HS-07", claim: "a wrong option magic ends the connection", negative: true, run: func(c *script) {
			for _, magic := range []uint64{0, wire.MagicInit, wire.MagicOption + 1, wire.MagicOptReply} {
				p := c.haggle()
				b := wire.AppendOption(nil, wire.OptList, nil)
				be.PutUint64(b, magic)
				p.trySend(b)
				p.wantClosed(fmt.Sprintf("option magic %#x", magic))
			}
		}},
	}
	for bit := 2; bit < 32; bit++ {
		l = append(l, check{id: fmt.Sprintf("HS-05/%d", bit), claim: "an unknown client flag ends the connection", negative: true, run: func(c *script) {
			p := c.connect()
			p.trySend(wire.AppendOption(be.AppendUint32(nil, clientFlags|1<<bit), wire.OptList, nil))
			p.wantClosed("client flags")
		}})
	}
	return append(l, exportNameChecks(s)...)
}

// exportNameChecks are about the oldest way in. A server that requires TLS
// refuses it in plain, which TL-01 covers; inside TLS it works.
func exportNameChecks(s *Server) []check {
	var l []check
	for _, row := range []struct {
		id, claim string
		flags     uint32
		zeroes    int
	}{
		{"HS-23/zeroes", "EXPORT_NAME sends 10 bytes and 124 zeroes", wire.FlagFixedNewstyle, wire.ExportNameZeroes},
		{"HS-23/no-zeroes", "EXPORT_NAME sends 10 bytes with NO_ZEROES", clientFlags, 0},
		{"HS-23/plain", "plain newstyle EXPORT_NAME sends 10 bytes and 124 zeroes", 0, wire.ExportNameZeroes},
		{"HS-23/plain-no-zeroes", "plain newstyle EXPORT_NAME with NO_ZEROES sends 10 bytes", wire.FlagNoZeroes, 0},
	} {
		if s.TLS.Mode == TLSRequire && row.flags&wire.FlagFixedNewstyle == 0 {
			continue // cannot upgrade
		}
		l = append(l, check{id: row.id, claim: row.claim, run: func(c *script) {
			p := c.haggleWith(row.flags)
			p.send(wire.AppendOption(nil, wire.OptExportName, []byte(s.Export)))
			p.readExportName(row.zeroes)
			p.works()
		}})
	}
	if s.Features.Structured {
		l = append(l, check{id: "HS-23/structured", claim: "EXPORT_NAME after STRUCTURED_REPLY gives structured replies", run: func(c *script) {
			p := c.haggle()
			p.negotiate(structured)
			p.send(wire.AppendOption(nil, wire.OptExportName, []byte(s.Export)))
			p.readExportName(0)
			p.works()
		}})
	}
	return append(l,
		check{id: "HS-10/export-name", claim: "EXPORT_NAME with an unknown or oversize name ends the connection without a reply", negative: true, run: func(c *script) {
			for _, name := range []string{unknownExport, strings.Repeat("x", 4096), strings.Repeat("x", 4097), strings.Repeat("x", 5000)} {
				p := c.haggle()
				p.trySend(wire.AppendOption(nil, wire.OptExportName, []byte(name)))
				p.wantClosed(fmt.Sprintf("EXPORT_NAME of %d bytes", len(name)))
			}
		}},
		check{id: "HS-09/export-name", claim: "EXPORT_NAME announcing 4 GiB - 1 ends the connection", negative: true, run: func(c *script) {
			p := c.haggle()
			p.trySend(optionHeader(wire.OptExportName, 1<<32-1))
			p.wantClosed("EXPORT_NAME")
		}},
	)
}

// readExportName reads a successful answer to EXPORT_NAME.
func (p *peer) readExportName(zeroes int) {
	b := p.recv(10, "answer to EXPORT_NAME")
	p.export = exportInfo{size: be.Uint64(b), flags: wire.ExportFlags(be.Uint16(b[8:]))}
	if p.export.size != uint64(p.c.s.Size) {
		p.c.failf("EXPORT_NAME: size %d, want %d", p.export.size, p.c.s.Size)
	}
	if b := p.recv(zeroes, "zeroes after EXPORT_NAME"); !bytes.Equal(b, make([]byte, zeroes)) {
		p.c.failf("EXPORT_NAME: padding % x, want zeroes", b)
	}
}

// optionHeader is an option header without the payload that it announces.
func optionHeader(o wire.Opt, n uint32) []byte {
	b := wire.AppendOption(nil, o, nil)
	be.PutUint32(b[12:], n)
	return b
}

// optionChecks are about options as such.
func optionChecks(s *Server) []check {
	l := []check{
		{id: "HS-08/unknown", claim: "unknown options of up to 64 KiB are skipped by length", run: func(c *script) {
			p := c.haggle()
			for _, n := range []int{0, 1, 10, 4096, limits.MaxOption} {
				p.wantOnly(optUnknown, make([]byte, n), wire.RepErrUnsup)
			}
			p.wantOnly(optPeek, nil, wire.RepErrUnsup)
			p.wantOnly(1<<32-1, nil, wire.RepErrUnsup)
			p.usable()
		}},
		{id: "HS-16", claim: "64 options are answered, some more end the connection", negative: true, run: manyOptions},
		{id: "HS-18/second-go", claim: "an option after GO is a request with a wrong magic", negative: true, run: func(c *script) {
			p := c.open(simple)
			p.trySend(wire.AppendOption(nil, wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: s.Export, Infos: make([]wire.Info, 8)})))
			if b := p.wantEnd("second GO"); bytes.Contains(b, be.AppendUint64(nil, wire.MagicOptReply)) {
				c.failf("second GO was answered as an option")
			}
		}},
		{id: "HS-18/early-request", claim: "a request before GO is an option with a wrong magic", negative: true, run: func(c *script) {
			p := c.haggle()
			p.trySend(wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Len: 512}))
			p.wantClosed("a request before GO")
		}},
		{id: "HS-21", claim: "ABORT is acknowledged, then the connection ends", run: func(c *script) {
			p := c.haggle()
			p.wantOnly(wire.OptAbort, nil, wire.RepAck)
			p.wantEOF("ABORT")
		}},
		{id: "HS-21/data", claim: "ABORT with data is acknowledged all the same", negative: true, run: func(c *script) {
			p := c.haggle()
			p.wantOnly(wire.OptAbort, make([]byte, 100), wire.RepAck)
			p.wantClosed("ABORT")
		}},
		{id: "HS-21/gone", claim: "a client that aborts and does not wait hurts nobody", negative: true, run: func(c *script) {
			for range 20 {
				p := c.haggle()
				p.trySend(wire.AppendOption(nil, wire.OptAbort, nil))
				p.reset()
			}
		}},
	}
	for _, n := range []uint32{limits.MaxOption + 1, 1 << 20, 64 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		l = append(l, check{id: fmt.Sprintf("HS-08/%d", n), claim: "an option beyond 64 KiB ends the connection unread", negative: true, run: func(c *script) {
			p := c.haggle()
			p.trySend(optionHeader(optUnknown, n))
			p.wantClosed("an option header")
		}})
	}
	l = append(l, payloadChecks(s)...)
	l = append(l, segmentChecks(s)...)
	return append(l, listChecks(s)...)
}

// manyOptions allows for the STARTTLS that may or may not count.
func manyOptions(c *script) {
	p := c.haggle()
	for range limits.MaxOptions - 2 {
		p.wantOnly(optUnknown, nil, wire.RepErrUnsup)
	}
	for range 4 {
		p.trySend(wire.AppendOption(nil, optUnknown, nil))
	}
	b := p.wantEnd("options beyond the limit")
	if n := bytes.Count(b, be.AppendUint64(nil, wire.MagicOptReply)); n > 3 {
		c.failf("%d options answered, want %d", limits.MaxOptions-2+n, limits.MaxOptions)
	}
}

// payloadChecks are about data where none belongs.
func payloadChecks(s *Server) []check {
	rows := []struct {
		o    wire.Opt
		want []wire.Rep
	}{
		{wire.OptList, []wire.Rep{wire.RepErrInvalid}},
		{wire.OptStartTLS, []wire.Rep{wire.RepErrInvalid, wire.RepErrUnsup, wire.RepErrPolicy}},
	}
	if s.canTLS() {
		rows[1].want = rows[1].want[:1]
	}
	if s.Features.Structured {
		rows = append(rows, rows[0])
		rows[2].o = wire.OptStructuredReply
	}
	if s.Features.Extended {
		rows = append(rows, rows[0])
		rows[len(rows)-1].o = wire.OptExtendedHeaders
	}
	var l []check
	for _, row := range rows {
		l = append(l, check{id: "HS-13/" + optName(row.o), claim: "data where the option has none is ERR_INVALID, connection usable", negative: true, run: func(c *script) {
			p := c.haggle()
			for _, n := range []int{1, 4, 100} {
				p.wantOnly(row.o, make([]byte, n), row.want...)
			}
			p.usable()
		}})
	}
	return l
}

// optName is the name of an option for an ID: lower case, no prefix.
func optName(o wire.Opt) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(o.String(), "NBD_OPT_")), "_", "-")
}

// conversation is everything from client flags to the first request.
func conversation(p *peer) []byte {
	var b []byte
	if p.conn == p.raw {
		b = be.AppendUint32(b, clientFlags)
	}
	b = wire.AppendOption(b, optUnknown, []byte("data"))
	b = wire.AppendOption(b, wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: p.c.s.Export}))
	return append(b, p.encode(wire.Request{Cmd: wire.CmdRead, Len: 4096}, nil)...)
}

func segmentChecks(s *Server) []check {
	start := func(c *script) *peer {
		if s.TLS.Mode == TLSRequire {
			return c.haggle()
		}
		return c.connect()
	}
	finish := func(p *peer) {
		if got := last(p.replies(optUnknown)).rep; got != wire.RepErrUnsup {
			p.c.failf("unknown option: got %v", got)
		}
		p.readInfo(wire.OptGo)
		if got := p.next(); got.errno != wire.OK {
			p.c.failf("READ: got %v", got.errno)
		}
		p.alive()
	}
	return []check{
		{id: "HS-24/one", claim: "the handshake and a request in one segment work", run: func(c *script) {
			p := start(c)
			p.send(conversation(p))
			finish(p)
		}},
		{id: "HS-24/bytes", claim: "the handshake and a request in segments of one byte work", run: func(c *script) {
			p := start(c)
			wait := p.sendAside(conversation(p), single)
			finish(p)
			p.sent(wait)
		}},
		{id: "HS-25/go", claim: "half-close after GO: reply, then the end", run: func(c *script) {
			p := c.haggle()
			p.send(wire.AppendOption(nil, wire.OptGo, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: s.Export})))
			if p.closeWrite() {
				p.readInfo(wire.OptGo)
				p.wantClosed("half-close")
			}
		}},
		{id: "HS-25/option", claim: "half-close after an option: reply, then the end", run: func(c *script) {
			p := c.haggle()
			p.send(wire.AppendOption(nil, optUnknown, nil))
			if p.closeWrite() {
				p.replies(optUnknown)
				p.wantClosed("half-close")
			}
		}},
		{id: "HS-25/partial", claim: "half-close in the middle of an option ends the connection", negative: true, run: func(c *script) {
			whole := wire.AppendOption(nil, wire.OptList, make([]byte, 20))
			for n := range whole {
				p := c.haggle()
				p.send(whole[:n])
				if p.closeWrite() {
					p.wantEnd(fmt.Sprintf("%d bytes of an option", n))
				}
			}
		}},
	}
}

func listChecks(s *Server) []check {
	return []check{
		{id: "HS-22", claim: "LIST gives one reply per export, then ACK, every time", run: func(c *script) {
			p := c.haggle()
			for range 3 {
				found := false
				l := p.wantReply(wire.OptList, nil, wire.RepAck)
				for _, r := range l[:len(l)-1] {
					name, rest, ok := wire.CutString(r.data)
					if r.rep != wire.RepServer || !ok || len(name) > limits.MaxString || len(rest) > limits.MaxString {
						c.failf("LIST: got %v %q", r.rep, r.data)
					}
					found = found || string(name) == s.Export
				}
				if !found {
					c.failf("LIST: %q is not among %d exports", s.Export, len(l)-1)
				}
			}
			p.usable()
		}},
	}
}

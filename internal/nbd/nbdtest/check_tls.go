package nbdtest

import (
	"bytes"
	"crypto/tls"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// tlsChecks are about STARTTLS and what holds before and after it.
func tlsChecks(s *Server) []check {
	if !s.canTLS() {
		return tlsOffChecks()
	}
	l := append(tlsUpgradeChecks(s), tlsGarbageChecks(s)...)
	if s.TLS.Mode == TLSRequire {
		return append(l, tlsRequireChecks(s)...)
	}
	return append(l, tlsResetChecks(s)...)
}

func tlsOffChecks() []check {
	return []check{{id: "TL-02", claim: "STARTTLS without TLS is ERR_UNSUP or ERR_POLICY, connection usable", negative: true, run: func(c *script) {
		p := c.haggle()
		for range 2 {
			p.wantOnly(wire.OptStartTLS, nil, wire.RepErrUnsup, wire.RepErrPolicy, wire.RepErrPlatform)
		}
		p.usable()
	}}}
}

// upgraded is a connection inside TLS, whatever the mode.
func (c *script) upgraded(cfg *tls.Config) *peer {
	p := c.plain()
	p.startTLS(cfg)
	return p
}

// withVersions is the client's configuration limited to some versions.
func withVersions(cfg *tls.Config, lo, hi uint16) *tls.Config {
	cfg = cfg.Clone()
	cfg.MinVersion, cfg.MaxVersion = lo, hi
	return cfg
}

func tlsUpgradeChecks(s *Server) []check {
	cfg := s.TLS.Config
	l := []check{
		{id: "TL-03", claim: "STARTTLS inside TLS is ERR_INVALID, connection usable", negative: true, run: func(c *script) {
			p := c.upgraded(cfg)
			p.wantOnly(wire.OptStartTLS, nil, wire.RepErrInvalid)
			p.usable()
		}},
		{id: "WR-21", claim: "a connection ends with close_notify after DISC and after ABORT", run: func(c *script) {
			c.upgraded(cfg).usable()
			p := c.upgraded(cfg)
			p.wantOnly(wire.OptAbort, nil, wire.RepAck)
			p.wantEOF("ABORT")
		}},
		{id: "TL-16/ticket", claim: "a session of an earlier connection is not resumed", negative: true, run: func(c *script) {
			again := cfg.Clone()
			again.ClientSessionCache = tls.NewLRUClientSessionCache(4)
			for range 2 {
				p := c.upgraded(again)
				p.usable()
				if p.conn.(*tls.Conn).ConnectionState().DidResume {
					c.failf("the session was resumed")
				}
			}
		}},
		{id: "TL-15", claim: "a connection cut inside TLS with 16 large reads in flight hurts nobody", negative: true, run: func(c *script) {
			p := c.upgraded(cfg)
			p.enter()
			for i := range uint64(16) {
				p.send(p.encode(wire.Request{Cmd: wire.CmdRead, Off: i << 20, Len: 4 << 20}, nil))
			}
			p.recv(16, "first reply")
			p.reset()
		}},
	}
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		l = append(l, check{id: "TL-13/" + versionID(v), claim: tls.VersionName(v) + " alone works", run: func(c *script) {
			c.upgraded(withVersions(cfg, v, v)).usable()
		}})
	}
	for _, v := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		l = append(l, check{id: "TL-13/" + versionID(v), claim: tls.VersionName(v) + " is refused", negative: true, run: func(c *script) {
			p := c.plain()
			p.wantReply(wire.OptStartTLS, nil, wire.RepAck)
			if err := p.handshakeTLS(withVersions(cfg, v, v)); err == nil {
				c.failf("handshake with %s succeeds", tls.VersionName(v))
			}
			p.wantEnd("a refused handshake")
		}})
	}
	return l
}

// versionID is a version for an ID: 1.2.
func versionID(v uint16) string { return fmt.Sprintf("1.%d", v&0xff-1) }

// tlsGarbageChecks send something else than a ClientHello.
func tlsGarbageChecks(s *Server) []check {
	injected := wire.AppendOption(nil, wire.OptStartTLS, nil)
	injected = wire.AppendOption(injected, wire.OptList, nil)
	l := []check{{id: "TL-05", claim: "plain bytes in one segment with STARTTLS are never interpreted", negative: true, run: func(c *script) {
		p := c.plain()
		p.trySend(injected)
		b := p.wantEnd("an option behind STARTTLS")
		if len(b) >= wire.OptReplyHeaderSize {
			b = b[wire.OptReplyHeaderSize:] // the ACK is allowed
		}
		if bytes.Contains(b, be.AppendUint64(nil, wire.MagicOptReply)) {
			c.failf("the option behind STARTTLS was answered: % x", b)
		}
	}}, {id: "TL-05/handshake", claim: "a TLS handshake behind such bytes does not save the connection", negative: true, run: func(c *script) {
		p := c.plain()
		p.trySend(injected)
		p.tryRecv(wire.OptReplyHeaderSize) // the ACK is allowed
		if err := p.handshakeTLS(s.TLS.Config); err == nil {
			c.failf("the handshake succeeds, as if nothing had come before it")
		}
		p.wantEnd("a handshake behind injected bytes")
	}}}
	for _, row := range []struct{ id, what, bytes string }{
		{"TL-06/random", "random bytes", string(pattern(6, 512))},
		{"TL-06/sslv2", "an SSLv2 hello", "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x07\x00\xc0\x03\x00\x80\x01\x00\x80\x06\x00\x40\x04\x00\x80\x02\x00\x80" + string(pattern(7, 16))},
		{"TL-06/http", "an HTTP request", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
		{"TL-06/nbd", "an option in plain", string(wire.AppendOption(nil, wire.OptList, nil))},
	} {
		l = append(l, check{id: row.id, claim: row.what + " in place of a ClientHello ends the connection", negative: true, run: func(c *script) {
			p := c.plain()
			p.wantReply(wire.OptStartTLS, nil, wire.RepAck)
			p.trySend([]byte(row.bytes))
			if b := p.wantEnd(row.what); bytes.Contains(b, be.AppendUint64(nil, wire.MagicOptReply)) {
				c.failf("%s: answered in plain: % x", row.what, b)
			}
		}})
	}
	return append(l, check{id: "TL-06/cut", claim: "half-close in place of a ClientHello ends the connection", negative: true, run: func(c *script) {
		p := c.plain()
		p.wantReply(wire.OptStartTLS, nil, wire.RepAck)
		if p.closeWrite() {
			p.wantEnd("half-close")
		}
	}})
}

// tlsRequireChecks are about a server that speaks TLS only ("FORCEDTLS mode").
func tlsRequireChecks(s *Server) []check {
	var l []check
	for _, row := range []struct {
		o       wire.Opt
		payload []byte
	}{
		{wire.OptList, nil},
		{wire.OptInfo, named(wire.OptInfo, s.Export)},
		{wire.OptGo, named(wire.OptGo, s.Export)},
		{wire.OptStructuredReply, nil},
		{wire.OptListMeta, named(wire.OptListMeta, s.Export)},
		{wire.OptSetMeta, named(wire.OptSetMeta, s.Export)},
		{wire.OptExtendedHeaders, nil},
		{optUnknown, nil},
	} {
		l = append(l, check{id: "TL-01/" + optName(row.o), claim: "in plain, every option but STARTTLS and ABORT is ERR_TLS_REQD", negative: true, run: func(c *script) {
			p := c.plain()
			p.wantOnly(row.o, row.payload, wire.RepErrTLSReqd)
			p.startTLS(s.TLS.Config)
			p.usable()
		}})
	}
	return append(l,
		check{id: "TL-01/export-name", claim: "EXPORT_NAME in plain ends the connection without a word", negative: true, run: func(c *script) {
			p := c.plain()
			p.trySend(wire.AppendOption(nil, wire.OptExportName, []byte(s.Export)))
			p.wantClosed("EXPORT_NAME")
		}},
		check{id: "TL-01/abort", claim: "ABORT in plain is acknowledged", run: func(c *script) {
			p := c.plain()
			p.wantOnly(wire.OptAbort, nil, wire.RepAck)
			p.wantEOF("ABORT")
		}},
	)
}

// tlsResetChecks are about what STARTTLS forgets. They need a server that
// negotiates in plain, too.
func tlsResetChecks(s *Server) []check {
	cfg := s.TLS.Config
	l := []check{{id: "TL-04/plain", claim: "the export is served in plain, too", run: func(c *script) { c.plain().usable() }}}
	if s.Features.Structured {
		l = append(l, check{id: "TL-04/structured", claim: "STARTTLS forgets structured replies", negative: true, run: func(c *script) {
			p := c.plain()
			p.negotiate(structured)
			p.startTLS(cfg)
			p.form = simple
			p.usable()
		}})
	}
	if s.Features.Contexts {
		l = append(l,
			check{id: "TL-04/early", claim: "after STARTTLS contexts need structured replies anew", negative: true, run: func(c *script) {
				p := c.plain()
				p.negotiate(structured)
				p.startTLS(cfg)
				p.wantOnly(wire.OptSetMeta, named(wire.OptSetMeta, s.Export), wire.RepErrInvalid)
			}},
			check{id: "TL-04/contexts", claim: "STARTTLS forgets selected contexts", negative: true, run: func(c *script) {
				p := c.plain()
				p.negotiate(structured)
				p.selectContexts(wire.ContextAllocation)
				p.startTLS(cfg)
				p.negotiate(structured)
				p.enter()
				p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Len: 4096}, nil, wire.EINVAL)
				p.works()
			}})
	}
	if s.Features.Extended {
		l = append(l, check{id: "TL-04/extended", claim: "STARTTLS forgets extended headers", negative: true, run: func(c *script) {
			p := c.plain()
			p.negotiate(extended)
			p.startTLS(cfg)
			p.form = simple
			p.usable()
		}})
	}
	return l
}

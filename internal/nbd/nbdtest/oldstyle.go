package nbdtest

import (
	"bytes"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Oldstyle checks a server of the oldstyle handshake, which names no export
// and negotiates nothing: size and flags come first, then requests. Features
// beyond the transmission flags are ignored.
func Oldstyle(t *testing.T, s Server) {
	t.Helper()
	for _, ck := range oldstyleChecks(&s) {
		t.Run(ck.id+" "+ck.claim, func(t *testing.T) {
			reason, deviates := s.deviation(ck.id)
			c := &script{s: &s, ctx: t.Context(), patience: patience}
			if deviates {
				c.patience = deviantPatience
			}
			if text := verdict(c.attempt(ck.run), deviates, reason); text != "" {
				t.Error(text)
			}
			if s.Invariants != nil {
				s.Invariants(t)
			}
		})
	}
}

func oldstyleChecks(s *Server) []check {
	return []check{
		{id: "OS-01", claim: "the greeting has magics, size, flags and 124 zeroes", run: func(c *script) { c.oldstyle() }},
		{id: "OS-02", claim: "requests work right behind the greeting", run: func(c *script) {
			p := c.oldstyle()
			if !s.ReadOnly {
				b := pattern(2, 64<<10)
				p.put(4096, b, 0)
				p.wantData(4096, b)
			}
			p.works()
		}},
		{id: "OS-03", claim: "a request sent before the greeting is read is answered", run: func(c *script) {
			p := c.dial()
			p.send(p.encode(wire.Request{Cmd: wire.CmdRead, Len: 4096}, nil))
			p.oldGreeting()
			if r := p.next(); r.errno != wire.OK {
				c.failf("READ: got %v", r.errno)
			}
			p.works()
		}},
		{id: "OS-04", claim: "out of range is an error, connection usable", negative: true, run: func(c *script) {
			p := c.oldstyle()
			p.wantErrno(wire.Request{Cmd: wire.CmdRead, Off: uint64(s.Size), Len: 512}, nil, wire.EINVAL)
			p.wantErrno(wire.Request{Cmd: wire.CmdExtents, Len: 512}, nil, wire.EINVAL)
			p.works()
		}},
		{id: "OS-05", claim: "an option is a request with a wrong magic", negative: true, run: func(c *script) {
			p := c.oldstyle()
			p.trySend(wire.AppendOption(be.AppendUint32(nil, clientFlags), wire.OptList, make([]byte, 32)))
			if b := p.wantEnd("an option"); bytes.Contains(b, be.AppendUint64(nil, wire.MagicOptReply)) {
				c.failf("option answered on an oldstyle connection")
			}
		}},
	}
}

// oldstyle connects and reads the greeting.
func (c *script) oldstyle() *peer {
	p := c.dial()
	p.oldGreeting()
	return p
}

func (p *peer) oldGreeting() {
	b := p.recv(152, "oldstyle greeting")
	if got := be.Uint64(b); got != wire.MagicInit {
		p.c.failf("greeting starts with %#x, want %#x", got, uint64(wire.MagicInit))
	}
	if got := be.Uint64(b[8:]); got != wire.MagicOldstyle {
		p.c.failf("greeting: %#x, want oldstyle %#x", got, uint64(wire.MagicOldstyle))
	}
	p.export.size = be.Uint64(b[16:])
	flags := be.Uint32(b[24:])
	p.export.flags = wire.ExportFlags(flags)
	want := uint32(p.c.s.Features.Flags &^ wire.SendDF)
	if p.export.size != uint64(p.c.s.Size) || flags != want {
		p.c.failf("greeting: size %d, flags %#x, want %d, %#x", p.export.size, flags, p.c.s.Size, want)
	}
	if !bytes.Equal(b[28:], make([]byte, 124)) {
		p.c.failf("greeting: padding is not zeroes")
	}
}

package nbdtest

import (
	"encoding/binary"
	"io"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var be = binary.BigEndian

// clientFlags are what a modern client sends.
const clientFlags = wire.FlagFixedNewstyle | wire.FlagNoZeroes

// maxReply bounds what the suite takes as one option reply, in bytes.
const maxReply = 64 << 10

// connect dials and reads the greeting.
func (c *script) connect() *peer {
	p := c.dial()
	p.greeted(p.recv(greetingSize, "greeting"))
	return p
}

// greetingSize is how many bytes a server sends before the client flags.
const greetingSize = 18

// greeted expects that b is the greeting of a newstyle server.
func (p *peer) greeted(b []byte) {
	if got := be.Uint64(b); got != wire.MagicInit {
		p.c.failf("greeting starts with %#x, want %#x", got, uint64(wire.MagicInit))
	}
	if got := be.Uint64(b[8:]); got != wire.MagicOption {
		p.c.failf("greeting: %#x, want newstyle %#x", got, uint64(wire.MagicOption))
	}
	p.serverFlags = be.Uint16(b[16:])
	if p.serverFlags&wire.FlagFixedNewstyle == 0 {
		p.c.failf("handshake flags %#x, want fixed newstyle", p.serverFlags)
	}
}

// admitted connects until it is greeted: a server that bounds connections may turn
// one away before it has noticed that others have gone.
func (c *script) admitted() *peer {
	for end := time.Now().Add(c.patience); ; time.Sleep(10 * time.Millisecond) {
		p, b := c.dial(), make([]byte, greetingSize)
		_ = p.conn.SetReadDeadline(end)
		_, err := io.ReadFull(p.conn, b)
		if err == nil {
			p.greeted(b)
			return p
		}
		_ = p.conn.Close()
		if time.Now().After(end) {
			c.failf("no connection is greeted: %v", err)
		}
	}
}

// flags sends client flags.
func (p *peer) flags(f uint32) { p.send(be.AppendUint32(nil, f)) }

// plain connects and sends the usual client flags, no TLS.
func (c *script) plain() *peer {
	p := c.connect()
	p.flags(clientFlags)
	return p
}

// haggle connects up to the point where options about exports are answered.
func (c *script) haggle() *peer { return c.haggleWith(clientFlags) }

func (c *script) haggleWith(flags uint32) *peer { return c.connect().haggle(flags) }

// haggle goes on from the greeting to that point.
func (p *peer) haggle(flags uint32) *peer {
	p.flags(flags)
	if p.c.s.TLS.Mode == TLSRequire {
		p.startTLS(p.c.s.TLS.Config)
	}
	return p
}

// optReply is one reply to an option.
type optReply struct {
	rep  wire.Rep
	data []byte
}

// option sends an option and reads its replies; the last one is ACK or an
// error.
func (p *peer) option(o wire.Opt, payload []byte) []optReply {
	p.send(wire.AppendOption(nil, o, payload))
	return p.replies(o)
}

// replies reads all replies to o.
func (p *peer) replies(o wire.Opt) []optReply {
	var l []optReply
	for {
		h, err := wire.DecodeOptReply(p.recv(wire.OptReplyHeaderSize, "reply to "+o.String()))
		switch {
		case err != nil:
			p.c.failf("reply to %v: %v", o, err)
		case h.Opt != o:
			p.c.failf("reply to %v: is for %v", o, h.Opt)
		case h.Len > maxReply:
			p.c.failf("reply to %v: %v of %d bytes", o, h.Rep, h.Len)
		case h.Rep == wire.RepAck && h.Len != 0:
			p.c.failf("reply to %v: ACK with %d bytes of data", o, h.Len)
		}
		l = append(l, optReply{h.Rep, p.recv(int(h.Len), "payload of "+h.Rep.String())})
		if h.Rep == wire.RepAck || h.Rep.IsError() {
			return l
		}
	}
}

// last returns the reply that ends l.
func last(l []optReply) optReply { return l[len(l)-1] }

// wantReply sends an option and expects that its last reply is one of want.
func (p *peer) wantReply(o wire.Opt, payload []byte, want ...wire.Rep) []optReply {
	l := p.option(o, payload)
	if got := last(l).rep; !slices.Contains(want, got) {
		p.c.failf("%v with %d bytes: got %v %q, want %v", o, len(payload), got, last(l).data, want)
	}
	return l
}

// wantOnly is wantReply for options that have no other reply.
func (p *peer) wantOnly(o wire.Opt, payload []byte, want ...wire.Rep) optReply {
	l := p.wantReply(o, payload, want...)
	if len(l) != 1 {
		p.c.failf("%v with %d bytes: %d replies, want one", o, len(payload), len(l))
	}
	return l[0]
}

// exportInfo is what INFO, GO or EXPORT_NAME told.
type exportInfo struct {
	size  uint64
	flags wire.ExportFlags
	// blocks is nil unless it was told.
	blocks            *wire.BlockSizes
	name, description *string
	raw               map[wire.Info]string
}

// info sends INFO or GO and reads a successful answer.
func (p *peer) info(o wire.Opt, name string, infos ...wire.Info) exportInfo {
	p.send(wire.AppendOption(nil, o, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name, Infos: infos})))
	return p.readInfo(o)
}

// readInfo reads a successful answer to INFO or GO.
func (p *peer) readInfo(o wire.Opt) exportInfo {
	l := p.replies(o)
	if got := last(l); got.rep != wire.RepAck {
		p.c.failf("%v: got %v %q, want success", o, got.rep, got.data)
	}
	e := exportInfo{raw: map[wire.Info]string{}}
	for _, r := range l[:len(l)-1] {
		if r.rep != wire.RepInfo || len(r.data) < 2 {
			p.c.failf("%v: got %v with %d bytes before ACK", o, r.rep, len(r.data))
		}
		i := wire.Info(be.Uint16(r.data))
		if _, twice := e.raw[i]; twice {
			p.c.failf("%v: info %d twice", o, i)
		}
		e.raw[i] = string(r.data)
		p.parseInfo(&e, i, r.data[2:])
	}
	if _, ok := e.raw[wire.InfoExport]; !ok {
		p.c.failf("%v: ACK without INFO_EXPORT before it", o)
	}
	if o == wire.OptGo {
		p.export = e
	}
	return e
}

func (p *peer) parseInfo(e *exportInfo, i wire.Info, d []byte) {
	size := map[wire.Info]int{wire.InfoExport: 10, wire.InfoBlockSize: 12}
	if want, fixed := size[i]; fixed && len(d) != want {
		p.c.failf("info %d has %d bytes, want %d", i, len(d), want)
	}
	text := string(d)
	switch i {
	case wire.InfoExport:
		e.size, e.flags = be.Uint64(d), wire.ExportFlags(be.Uint16(d[8:]))
	case wire.InfoName:
		e.name = &text
	case wire.InfoDescription:
		e.description = &text
	case wire.InfoBlockSize:
		e.blocks = &wire.BlockSizes{Min: be.Uint32(d), Preferred: be.Uint32(d[4:]), Max: be.Uint32(d[8:])}
	}
}

// meta sends LIST_META_CONTEXT or SET_META_CONTEXT and returns the contexts of
// a successful answer by ID; for LIST, whose IDs mean nothing, by position.
func (p *peer) meta(o wire.Opt, name string, queries ...string) map[uint32]string {
	l := p.wantReply(o, wire.AppendMetaRequest(nil, wire.MetaRequest{Name: name, Queries: queries}), wire.RepAck)
	ids := map[uint32]string{}
	names := map[string]bool{}
	for _, r := range l[:len(l)-1] {
		if r.rep != wire.RepMetaContext || len(r.data) < 4 {
			p.c.failf("%v: got %v with %d bytes before ACK", o, r.rep, len(r.data))
		}
		id, ctx := be.Uint32(r.data), string(r.data[4:])
		if names[ctx] {
			p.c.failf("%v: context %q twice", o, ctx)
		}
		names[ctx] = true
		if _, twice := ids[id]; twice && o == wire.OptSetMeta {
			p.c.failf("%v: id %d twice", o, id)
		}
		if o == wire.OptListMeta {
			id = uint32(len(ids)) // all are zero, or meaningless
		}
		ids[id] = ctx
	}
	return ids
}

// negotiate agrees on a form of replies.
func (p *peer) negotiate(f form) {
	switch f {
	case structured:
		p.wantOnly(wire.OptStructuredReply, nil, wire.RepAck)
	case extended:
		p.wantOnly(wire.OptExtendedHeaders, nil, wire.RepAck)
	}
	p.form = f
}

// selectContexts agrees on metadata contexts for the export under test.
func (p *peer) selectContexts(queries ...string) {
	p.contexts = p.meta(wire.OptSetMeta, p.c.s.Export, queries...)
}

// enter goes to transmission on the export under test.
func (p *peer) enter() { p.info(wire.OptGo, p.c.s.Export) }

// open connects and enters transmission in one of the forms.
func (c *script) open(f form) *peer {
	p := c.haggle()
	p.negotiate(f)
	p.enter()
	return p
}

// openContexts is open with base:allocation selected.
func (c *script) openContexts(f form) *peer {
	p := c.haggle()
	p.negotiate(f)
	p.selectContexts(wire.ContextAllocation)
	if len(p.contexts) != 1 {
		c.failf("SET_META_CONTEXT %q: got %d contexts, want 1", wire.ContextAllocation, len(p.contexts))
	}
	p.enter()
	return p
}

// usable expects that an export can still be opened and read.
func (p *peer) usable() {
	p.enter()
	p.works()
}

// works expects that a connection in transmission answers a read and ends
// cleanly.
func (p *peer) works() {
	p.alive()
	p.disconnect()
	p.wantEOF("DISC")
}

// alive expects that a connection in transmission answers a read.
func (p *peer) alive() { p.wantErrno(wire.Request{Cmd: wire.CmdRead, Len: 4096}, nil, wire.OK) }

// disconnect sends DISC.
func (p *peer) disconnect() { p.send(p.encode(wire.Request{Cmd: wire.CmdDisc}, nil)) }

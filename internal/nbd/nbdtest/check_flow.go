package nbdtest

import (
	"bytes"
	"net"
	"os"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

const (
	slotSize = 4096
	slots    = limits.RequestsPerConn
)

// batch is as many requests as a connection may have in flight: writes to the
// first slots, reads of the others, which hold what fill wrote, and errors
// among them.
type batch struct {
	bytes []byte
	n     int
	reads map[uint64][]byte // by cookie
	fails map[uint64]bool
}

// fill writes the slots that a batch reads.
func fill(p *peer) []byte {
	b := pattern(24, slots*slotSize)
	if p.c.s.ReadOnly {
		return p.get(0, uint64(len(b)))
	}
	p.put(0, b, 0)
	return b
}

func newBatch(p *peer, content []byte) *batch {
	b := &batch{reads: map[uint64][]byte{}, fails: map[uint64]bool{}}
	for i := range uint64(slots) {
		r := wire.Request{Cmd: wire.CmdRead, Off: i * slotSize, Len: slotSize}
		var payload []byte
		switch {
		case i%16 == 15:
			r.Off = uint64(p.c.s.Size)
		case i < slots/2 && !p.c.s.ReadOnly:
			r.Cmd, payload = wire.CmdWrite, pattern(i, slotSize)
		}
		b.bytes = append(b.bytes, p.encode(r, payload)...)
		cookie := uint64(0x5eed)<<32 | p.cookie
		switch {
		case i%16 == 15:
			b.fails[cookie] = true
		case r.Cmd == wire.CmdRead:
			b.reads[cookie] = content[r.Off:][:slotSize]
		}
		b.n++
	}
	return b
}

// check reads the replies of the batch.
func (b *batch) check(p *peer) {
	for cookie, r := range p.collect(b.n) {
		want := wire.OK
		if b.fails[cookie] {
			want = wire.EINVAL
		}
		if r.errno != want {
			p.c.failf("%v at %d: got %v, want %v", r.Cmd, r.Off, r.errno, want)
		}
		if data, ok := b.reads[cookie]; ok && !bytes.Equal(r.data, data) {
			p.c.failf("read of slot %d returns other data than it holds", r.Off/slotSize)
		}
	}
	if len(p.pending) != 0 {
		p.c.failf("%d requests without an answer", len(p.pending))
	}
}

// flowChecks are about many requests at once.
func flowChecks(s *Server) []check {
	l := perForm(s, check{id: "WR-52/one", claim: "128 requests in one segment are each answered"}, func(c *script, f form) {
		p := c.open(f)
		b := newBatch(p, fill(p))
		wait := p.sendAside(b.bytes, whole)
		b.check(p)
		p.sent(wait)
		p.works()
	})
	l = append(l, perForm(s, check{id: "WR-52/bytes", claim: "requests in segments of one byte are each answered"}, func(c *script, f form) {
		p := c.open(f)
		var b []byte
		for i := range uint64(slots) {
			b = append(b, p.encode(wire.Request{Cmd: wire.CmdRead, Off: i * slotSize, Len: 512}, nil)...)
		}
		wait := p.sendAside(b, single)
		p.collect(slots)
		p.sent(wait)
		if !s.ReadOnly {
			data := pattern(52, 2048)
			wait := p.sendAside(p.encode(wire.Request{Cmd: wire.CmdWrite, Off: 8192, Len: 2048}, data), single)
			p.next()
			p.sent(wait)
			p.wantData(8192, data)
		}
		p.works()
	})...)
	l = append(l, perForm(s, check{id: "WR-52/odd", claim: "requests in segments that end anywhere are each answered"}, func(c *script, f form) {
		p := c.open(f)
		b := newBatch(p, fill(p))
		wait := p.sendAside(b.bytes, odd)
		b.check(p)
		p.sent(wait)
		p.works()
	})...)
	l = append(l, perForm(s, check{id: "TX-24", claim: "equal, zero and all-ones cookies come back as sent"}, func(c *script, f form) {
		p := c.open(f)
		var b []byte
		for _, cookie := range []uint64{7, 7, 0, 1<<64 - 1, 0} {
			b = append(b, p.encodeAs(cookie, wire.Request{Cmd: wire.CmdRead, Len: 512}, nil)...)
		}
		p.send(b)
		p.collect(5)
		if len(p.pending) != 0 {
			c.failf("%d cookies without an answer", len(p.pending))
		}
		p.works()
	})...)
	l = append(l, perForm(s, check{id: "TX-25/pressure", claim: "10,000 requests before the first reply is read are each answered"}, pressure)...)
	return append(l, descriptorChecks()...)
}

// pressure keeps the replies unread until the socket takes no more requests,
// or all are sent.
func pressure(c *script, f form) {
	const n = 10000
	p := c.open(f)
	var b []byte
	for i := range uint64(n) {
		b = append(b, p.encode(wire.Request{Cmd: wire.CmdRead, Off: i % 1024 * slotSize, Len: slotSize}, nil)...)
	}
	wait := p.sendAside(b, whole)
	p.collect(n)
	p.sent(wait)
	p.works()
}

// descriptorChecks are about what a socket carries beside bytes.
func descriptorChecks() []check {
	return []check{
		{id: "TX-33/fds", claim: "253 file descriptors attached to a request are ignored", negative: true, run: func(c *script) {
			p := c.open(simple)
			conn, ok := p.raw.(*net.UnixConn)
			if !ok || p.conn != p.raw {
				return
			}
			null, err := os.Open(os.DevNull)
			if err != nil {
				c.failf("open: %v", err)
			}
			defer func() { _ = null.Close() }()
			fds := make([]int, 253)
			for i := range fds {
				fds[i] = int(null.Fd())
			}
			for range 4 {
				b := p.encode(wire.Request{Cmd: wire.CmdRead, Len: 4096}, nil)
				if _, _, err := conn.WriteMsgUnix(b, syscall.UnixRights(fds...), nil); err != nil {
					c.failf("send descriptors: %v", err)
				}
				if r := p.next(); r.errno != wire.OK {
					c.failf("READ with descriptors: got %v", r.errno)
				}
			}
			p.works()
		}},
		{id: "TX-33/urgent", claim: "urgent data between requests is ignored", negative: true, run: func(c *script) {
			p := c.open(simple)
			conn, ok := p.raw.(*net.TCPConn)
			if !ok || p.conn != p.raw {
				return
			}
			raw, err := conn.SyscallConn()
			if err != nil {
				c.failf("raw connection: %v", err)
			}
			var sendErr error
			err = raw.Write(func(fd uintptr) bool {
				_, sendErr = syscall.SendmsgN(int(fd), []byte{0x25}, nil, nil, syscall.MSG_OOB)
				return sendErr != syscall.EAGAIN
			})
			if err != nil || sendErr != nil {
				c.failf("send urgent data: %v, %v", err, sendErr)
			}
			p.works()
		}},
	}
}

// closeChecks are about the end of a connection.
func closeChecks(s *Server) []check {
	l := perForm(s, check{id: "TX-27", claim: "DISC with requests in flight: all answered, then a clean end"}, func(c *script, f form) {
		p := c.open(f)
		b := newBatch(p, fill(p))
		wait := p.sendAside(append(b.bytes, p.encode(wire.Request{Cmd: wire.CmdDisc}, nil)...), whole)
		b.check(p)
		p.sent(wait)
		p.wantEOF("DISC")
	})
	l = append(l, perForm(s, check{id: "TX-27/late", claim: "DISC, the server's end, then more from the client: no reset"}, func(c *script, f form) {
		p := c.open(f)
		p.send(p.encode(wire.Request{Cmd: wire.CmdDisc}, nil))
		p.wantEOF("DISC")
		p.trySend([]byte{0}) // over a Unix socket the server may refuse it
		if w, ok := p.conn.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		}
		p.wantEOF("DISC and the client's end")
	})...)
	l = append(l, perForm(s, check{id: "TX-28", claim: "half-close with requests in flight: all answered, then the end"}, func(c *script, f form) {
		p := c.open(f)
		b := newBatch(p, fill(p))
		wait := p.sendAside(b.bytes, whole)
		if _, ok := p.conn.(interface{ CloseWrite() error }); !ok {
			return
		}
		closed := make(chan error, 1)
		go func() {
			err := wait()
			_ = p.conn.(interface{ CloseWrite() error }).CloseWrite()
			closed <- err
		}()
		b.check(p)
		if err := <-closed; err != nil {
			c.failf("send: %v", err)
		}
		p.wantClosed("half-close")
	})...)
	l = append(l, perForm(s, check{id: "TX-28/partial", claim: "half-close in the middle of a request: earlier ones answered, then the end", negative: true}, func(c *script, f form) {
		p := c.open(f)
		b := p.encode(wire.Request{Cmd: wire.CmdRead, Len: 4096}, nil)
		p.send(append(b, b[:20]...))
		if p.closeWrite() {
			p.next()
			p.wantClosed("half-close")
		}
	})...)
	l = append(l, perForm(s, check{id: "TX-29", claim: "a reset with 128 requests in flight hurts nobody", negative: true}, func(c *script, f form) {
		for range 8 {
			p := c.open(f)
			var b []byte
			for i := range uint64(slots) {
				r, payload := of(wire.CmdRead, i*slotSize, 64<<10)
				if i%4 == 0 && !s.ReadOnly {
					r, payload = of(wire.CmdWrite, i*slotSize, 16<<10)
				}
				b = append(b, p.encode(r, payload)...)
			}
			wait := p.sendAside(b, whole)
			p.recv(16, "first reply")
			p.reset()
			_ = wait()
		}
		c.open(f).works()
	})...)
	return append(l, perForm(s, check{id: "TX-30", claim: "a client gone while 32 MiB are on their way hurts nobody", negative: true}, func(c *script, f form) {
		for range 4 {
			p := c.open(f)
			p.send(p.encode(wire.Request{Cmd: wire.CmdRead, Len: 32 << 20}, nil))
			p.recv(wire.SimpleReplySize, "start of the reply")
			p.reset()
		}
		c.open(f).works()
	})...)
}

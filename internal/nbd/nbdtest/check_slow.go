package nbdtest

import (
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// slowChecks wait for the server's time limits. How long it takes is measured
// from below only: a limit that strikes early is wrong, a busy machine is not.
func slowChecks(s *Server) []check {
	l := []check{
		{id: "HS-02", claim: "a silent client is closed at the handshake limit", negative: true, slow: true, run: func(c *script) {
			p := c.dial()
			p.closedAfter(s.Handshake, func(<-chan struct{}) {})
		}},
		{id: "HS-04", claim: "a client that sends a byte now and then is closed at the handshake limit", negative: true, slow: true, run: func(c *script) {
			p := c.connect()
			drip := append(be.AppendUint32(nil, clientFlags), optionHeader(optUnknown, limits.MaxOption)...)
			drip = append(drip, make([]byte, limits.MaxOption)...)
			p.closedAfter(s.Handshake, func(done <-chan struct{}) { p.drip(drip, s.Handshake/20, done) })
		}},
		{id: "HS-04/haggling", claim: "a client that haggles for ever is closed at the handshake limit", negative: true, slow: true, run: func(c *script) {
			p := c.haggle()
			p.wantOnly(optUnknown, nil, wire.RepErrUnsup)
			p.closedAfter(s.Handshake, func(<-chan struct{}) {})
		}},
	}
	if s.canTLS() {
		l = append(l, check{id: "TL-07", claim: "a client that stalls in the TLS handshake is closed at the handshake limit", negative: true, slow: true, run: func(c *script) {
			p := c.plain()
			p.wantReply(wire.OptStartTLS, nil, wire.RepAck)
			p.send([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}) // the start of a ClientHello
			p.closedAfter(s.Handshake, func(<-chan struct{}) {})
		}})
	}
	l = append(l,
		check{id: "TX-25/stall", claim: "a client that never reads its replies is dropped at the stall limit", negative: true, slow: true, run: stallReader},
		check{id: "TX-26/idle", claim: "a client with nothing to say stays connected past every limit", slow: true, run: func(c *script) {
			p := c.open(s.best())
			p.alive()
			idle := time.NewTimer(2 * max(s.Stall, s.Handshake))
			defer idle.Stop()
			<-idle.C
			p.works()
		}},
	)
	if !s.ReadOnly {
		l = append(l, check{id: "TX-12", claim: "a write that stalls in its payload is dropped at the stall limit, nothing written", negative: true, slow: true, run: func(c *script) {
			const off, n = 8 << 20, 1 << 20
			before := pattern(12, n)
			other := c.open(simple)
			other.put(off, before, 0)
			p := c.open(simple)
			p.send(p.encode(wire.Request{Cmd: wire.CmdWrite, Off: off, Len: n}, make([]byte, n))[:wire.RequestSize+10])
			p.closedAfter(s.Stall, func(<-chan struct{}) {})
			other.wantData(off+512, before[512:])
		}})
	}
	return l
}

// closedAfter expects that the server closes, and not long before the limit.
// meanwhile runs in a goroutine until done is closed.
func (p *peer) closedAfter(limit time.Duration, meanwhile func(done <-chan struct{})) {
	start := time.Now()
	done, ended := make(chan struct{}), make(chan struct{})
	go func() { defer close(ended); meanwhile(done) }()
	_, err := p.rest(limit + p.c.patience)
	close(done)
	<-ended
	if timedOut(err) {
		p.c.failf("connection still open long after the limit of %v", limit)
	}
	// The server's clock starts before ours does: at accept.
	if took := time.Since(start); took < limit/2 {
		p.c.failf("connection closed after %v, the limit is %v", took, limit)
	}
}

// drip sends one byte per interval.
func (p *peer) drip(b []byte, every time.Duration, done <-chan struct{}) {
	tick := time.NewTicker(max(every, time.Millisecond))
	defer tick.Stop()
	for i := range b {
		select {
		case <-tick.C:
			p.trySend(b[i : i+1])
		case <-done:
			return
		}
	}
}

// stallReader asks for more than any buffer holds and reads nothing. That the
// server has dropped the connection shows when sending fails: until then the
// socket is full.
func stallReader(c *script) {
	p := c.open(simple)
	var b []byte
	for range 1 << 16 {
		b = append(b, p.encode(wire.Request{Cmd: wire.CmdRead, Len: 1 << 20}, nil)...)
	}
	start := time.Now()
	_ = p.conn.SetWriteDeadline(start.Add(c.s.Stall + c.patience))
	_, err := p.conn.Write(b)
	switch took := time.Since(start); {
	case err == nil:
		c.failf("the server took %d requests without a reply being read", 1<<16)
	case timedOut(err):
		c.failf("connection still open long after the limit of %v", c.s.Stall)
	case took < c.s.Stall/2:
		c.failf("connection closed after %v, the limit is %v", took, c.s.Stall)
	}
}

package nbdtest

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// peer is the client's end of one connection. It belongs to one goroutine,
// but for the writer that sendAside starts.
type peer struct {
	c    *script
	raw  net.Conn // the socket
	conn net.Conn // raw, or TLS over it

	serverFlags uint16 // of the greeting

	// What was negotiated.
	form     form
	contexts map[uint32]string
	export   exportInfo

	cookie  uint64
	pending map[uint64][]*request
}

// dial makes a connection and reads nothing from it. A server whose backlog
// is full for a moment is tried again.
func (c *script) dial() *peer {
	deadline := time.NewTimer(c.patience)
	defer deadline.Stop()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		conn, err := c.s.Dial(c.ctx)
		if err == nil {
			c.closers = append(c.closers, func() { _ = conn.Close() })
			return &peer{c: c, raw: conn, conn: conn, form: simple, pending: map[uint64][]*request{}}
		}
		select {
		case <-again.C:
		case <-deadline.C:
			c.failf("dial: %v", err)
		}
	}
}

// send writes b in one call.
func (p *peer) send(b []byte) {
	if err := p.write(b); err != nil {
		p.c.failf("send %d bytes: %v", len(b), err)
	}
}

// trySend writes b to a server that may have closed already.
func (p *peer) trySend(b []byte) { _ = p.write(b) }

func (p *peer) write(b []byte) error {
	_ = p.conn.SetWriteDeadline(time.Now().Add(p.c.patience))
	_, err := p.conn.Write(b)
	return err
}

// whole is the size of the segments of sendAside when it does not matter.
func whole(int) int { return 1 << 30 }

// single cuts what is sent into segments of one byte.
func single(int) int { return 1 }

// odd cuts what is sent into segments that end anywhere.
func odd(i int) int { return i*37%8191 + 1 }

// sendAside writes b while the caller reads, in segments of the sizes that
// size gives for 0, 1, 2 and so on. wait returns the error.
func (p *peer) sendAside(b []byte, size func(i int) int) (wait func() error) {
	done := make(chan error, 1)
	go func() {
		for i := 0; len(b) > 0; i++ {
			n := min(len(b), size(i))
			if err := p.write(b[:n]); err != nil {
				done <- err
				return
			}
			b = b[n:]
		}
		done <- nil
	}()
	return func() error { return <-done }
}

// sent expects that sendAside came to its end.
func (p *peer) sent(wait func() error) {
	if err := wait(); err != nil {
		p.c.failf("send: %v", err)
	}
}

// recv reads exactly n bytes.
func (p *peer) recv(n int, what string) []byte {
	b := make([]byte, n)
	p.recvInto(b, what)
	return b
}

func (p *peer) recvInto(b []byte, what string) {
	_ = p.conn.SetReadDeadline(time.Now().Add(p.c.patience))
	if n, err := io.ReadFull(p.conn, b); err != nil {
		p.c.failf("%s: got %d of %d bytes: %v", what, n, len(b), err)
	}
}

// tryRecv reads n bytes of a server that may close instead.
func (p *peer) tryRecv(n int) {
	_ = p.conn.SetReadDeadline(time.Now().Add(p.c.patience))
	_, _ = io.CopyN(io.Discard, p.conn, int64(n))
}

// timedOut reports whether err means that the peer said nothing.
func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// rest reads until the connection ends and returns what came before, and the
// way it ended: nil for a clean end.
func (p *peer) rest(patience time.Duration) ([]byte, error) {
	_ = p.conn.SetReadDeadline(time.Now().Add(patience))
	b, err := io.ReadAll(io.LimitReader(p.conn, 1<<20))
	if err == nil && len(b) == 1<<20 {
		err = errors.New("over 1 MiB of data")
	}
	return b, err
}

// wantClosed expects that the server has nothing more to say and closes,
// cleanly or with a reset.
func (p *peer) wantClosed(after string) {
	b, err := p.rest(p.c.patience)
	if timedOut(err) {
		p.c.failf("after %s: connection still open, want it closed", after)
	}
	if len(b) != 0 {
		p.c.failf("after %s: got % x, want the connection closed without a word", after, b[:min(len(b), 64)])
	}
}

// wantEnd expects that the server closes, whatever it says before.
func (p *peer) wantEnd(after string) []byte {
	b, err := p.rest(p.c.patience)
	if timedOut(err) {
		p.c.failf("after %s: connection still open, want it closed", after)
	}
	return b
}

// wantEOF expects an orderly end: no data, no reset; with TLS, close_notify.
func (p *peer) wantEOF(after string) {
	b, err := p.rest(p.c.patience)
	if err != nil || len(b) != 0 {
		p.c.failf("after %s: got %d bytes and %v, want a clean end", after, len(b), err)
	}
}

// closeWrite half-closes; it reports false when the transport cannot.
func (p *peer) closeWrite() bool {
	w, ok := p.conn.(interface{ CloseWrite() error })
	if !ok {
		return false
	}
	if err := w.CloseWrite(); err != nil {
		p.c.failf("half-close: %v", err)
	}
	return true
}

// reset drops the socket without any goodbye.
func (p *peer) reset() {
	if l, ok := p.raw.(interface{ SetLinger(int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = p.raw.Close()
}

// startTLS upgrades the connection, or fails.
func (p *peer) startTLS(cfg *tls.Config) {
	p.wantReply(wire.OptStartTLS, nil, wire.RepAck)
	if err := p.handshakeTLS(cfg); err != nil {
		p.c.failf("TLS handshake: %v", err)
	}
}

func (p *peer) handshakeTLS(cfg *tls.Config) error {
	conn := tls.Client(p.raw, cfg)
	_ = p.raw.SetDeadline(time.Now().Add(p.c.patience))
	if err := conn.HandshakeContext(p.c.ctx); err != nil {
		return err
	}
	p.conn = conn
	return nil
}

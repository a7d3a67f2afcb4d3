package transport

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ServerTLS shakes hands as the server, under the deadline that c has. On
// success c belongs to the Conn that is returned, whose Peer is that of c with
// the verified certificate, if the client had to show one. On an error c
// stays the caller's, who closes it; the client has been sent an alert.
//
// Nothing may have been read from c beyond the last byte before the
// handshake.
func ServerTLS(c Conn, cfg *tls.Config) (Conn, error) {
	return secured(c, func(b *bounded) *tls.Conn { return tls.Server(b, cfg) })
}

// ClientTLS is ServerTLS for the client's side; the Peer has the server's
// certificate. In TLS 1.3 a server that refuses the client's certificate
// says so only after the handshake, to the first Read.
func ClientTLS(c Conn, cfg *tls.Config) (Conn, error) {
	return secured(c, func(b *bounded) *tls.Conn { return tls.Client(b, cfg) })
}

func secured(c Conn, wrap func(*bounded) *tls.Conn) (Conn, error) {
	under := &bounded{Conn: c}
	t := &tlsConn{Conn: wrap(under), under: under, peer: *c.Peer()}
	if err := t.Handshake(); err != nil {
		return nil, handshakeError(c, err)
	}
	t.learn()
	return t, nil
}

func handshakeError(c Conn, err error) error {
	return fmt.Errorf("tls handshake with %s: %w", c.Peer(), err)
}

// learn adds to the peer what the handshake has verified.
func (t *tlsConn) learn() {
	t.peer.Encrypted = true
	if chains := t.ConnectionState().VerifiedChains; len(chains) > 0 {
		t.peer.Cert = chains[0][0]
	}
}

// tlsConn is a Conn inside TLS.
type tlsConn struct {
	*tls.Conn
	under *bounded
	peer  Peer
}

// Close sends close_notify if the peer takes it in time.
func (t *tlsConn) Close() error {
	t.under.closing.Store(true)
	return t.Conn.Close()
}

// CloseWrite sends close_notify; the peer may go on sending.
func (t *tlsConn) CloseWrite() error {
	t.under.closing.Store(true)
	return t.Conn.CloseWrite()
}

func (t *tlsConn) Peer() *Peer          { return &t.peer }
func (t *tlsConn) Raw() syscall.RawConn { return nil }

// NetConn is the Conn that carries the records, as Conn promises. What crypto/tls
// writes them to may be a wrapping of it that is no Conn.
func (t *tlsConn) NetConn() net.Conn { return t.under }

// bounded shortens the five seconds that crypto/tls grants for close_notify
// to limits.TLSClose.
type bounded struct {
	Conn
	closing atomic.Bool
}

// SetWriteDeadline is also what crypto/tls calls before close_notify.
func (b *bounded) SetWriteDeadline(t time.Time) error {
	if b.closing.Load() {
		if latest := time.Now().Add(limits.TLSClose); t.IsZero() || t.After(latest) {
			t = latest
		}
	}
	return b.Conn.SetWriteDeadline(t)
}

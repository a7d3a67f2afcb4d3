// Package transport turns endpoints into connections with a known peer. An
// endpoint is a Unix socket, a TCP or vsock port, a socket that systemd or a
// parent process opened, or standard input and output. The peer is known
// before the first byte is sent.
package transport

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"syscall"
	"time"
)

// Kind is the kind of an endpoint.
type Kind string

const (
	Unix  Kind = "unix"
	TCP   Kind = "tcp"
	VSock Kind = "vsock"
	Stdio Kind = "stdio"
)

// Peer is who is at the other end, as the kernel says.
type Peer struct {
	Kind Kind
	// Addr is the peer's address in printable form.
	Addr string

	// Via names the listener that it came in by, as the server calls that.
	Via string

	// Scope is which exports that listener shows, nil for all.
	Scope *Scope

	// CID and Port are the context ID and port of a vsock peer; a CID is an
	// address, not an identity.
	CID, Port uint32

	// Loopback says that a vsock peer came in at a listener that is bound to
	// CID 1, where only processes of this host can come in.
	Loopback bool

	// UID, GID and PID are those of a Unix peer when it connected.
	UID, GID uint32
	PID      int32

	// Groups are the supplementary groups of a Unix peer when it connected.
	Groups []uint32

	// Label is the SELinux context of a Unix peer, or "".
	Label string

	// Cert is the verified client certificate, or nil. It is filled in when
	// the TLS handshake has ended.
	Cert *x509.Certificate

	// PSK is the identity whose pre-shared key the client has proved, or "".
	PSK string

	// Encrypted is set by the TLS handshake, whichever way it verified.
	Encrypted bool

	// Proof tells whether the client would be let in now with what it has proved
	// in its TLS handshake. It may read files; nil is that it has proved nothing.
	Proof func() bool
}

// Stands tells whether what the peer has proved would let it in now: its key may have
// been replaced, or its certificate revoked. It may read files.
func (p *Peer) Stands() bool { return p == nil || p.Proof == nil || p.Proof() }

// Key names the peer for budgets: connections with one key share them.
func (p *Peer) Key() string {
	switch p.Kind {
	case VSock:
		return fmt.Sprintf("cid:%d", p.CID)
	case Unix:
		return fmt.Sprintf("uid:%d", p.UID)
	case TCP:
		if host, _, err := net.SplitHostPort(p.Addr); err == nil {
			return "ip:" + host
		}
	}
	return string(p.Kind) + ":" + p.Addr
}

// Guest names, as closely as is known, the machine that the peer works for:
// what has one name shares the storage as one. Many guests may have one Key, as
// QEMUs of one user or of one host do.
func (p *Peer) Guest() string {
	switch {
	case p.PSK != "":
		return "psk:" + p.PSK
	case p.Cert != nil:
		return "cert:" + string(p.Cert.RawSubject)
	case p.Kind == Unix:
		return fmt.Sprintf("%s,pid:%d", p.Key(), p.PID)
	}
	return p.Key()
}

// String is for logs.
func (p *Peer) String() string {
	switch p.Kind {
	case VSock:
		return fmt.Sprintf("vsock:%d:%d", p.CID, p.Port)
	case Unix:
		return fmt.Sprintf("unix:uid=%d,pid=%d", p.UID, p.PID)
	}
	return string(p.Kind) + ":" + p.Addr
}

// Conn is one connection. Read, Write and the deadlines are those of
// net.Conn. A Conn that is one socket has a Raw, by which the data path makes
// its own non-blocking calls on Go's poller.
type Conn interface {
	net.Conn
	CloseWrite() error

	// Peer never changes.
	Peer() *Peer

	// Raw is nil for a pair of pipes, and inside TLS. There the Conn has a method
	// NetConn, as tls.Conn has, and what that returns is the Conn below.
	Raw() syscall.RawConn
}

// Listener accepts connections.
type Listener interface {
	// Accept waits for a connection until ctx ends or the Listener is
	// closed, which it reports as net.ErrClosed. Other errors are
	// temporary: the caller waits a moment and goes on.
	Accept(ctx context.Context) (Conn, error)

	// Close stops accepting and removes what Listen made in the file system.
	Close() error

	// Kind and Addr say where it listens: a path, host:port, or CID:port.
	Kind() Kind
	Addr() string

	// URI is the NBD URI of an export here; tls makes it nbds.
	URI(export string, tls bool) string
}

// KeepAlive are the TCP keep-alive settings; a zero Idle turns it off.
type KeepAlive struct {
	Idle, Interval time.Duration
	Count          int
}

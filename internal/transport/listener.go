package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// listener is the Listener of every kind of socket.
type listener struct {
	sock *socket.Conn
	raw  syscall.RawConn
	kind Kind
	at   unix.Sockaddr
	opt  options

	// path is the file that was made for a Unix socket, or nil.
	path   *socketPath
	close  func() error
	closed atomic.Bool
	forAll atomic.Bool // Close ends the socket for those who have duplicates, too

	// turn holds a value while an Accept waits on the socket: socket.Conn
	// ends a wait by the socket's one deadline, which two waits would set and
	// clear for each other.
	turn chan struct{}
}

// startListening calls listen and wraps the socket, which it closes on an
// error.
func startListening(sock *socket.Conn, kind Kind, opt options) (*listener, error) {
	err := sock.Listen(limits.Backlog)
	if err != nil {
		sock.Close()
		return nil, err
	}
	return newListener(sock, kind, opt)
}

// newListener wraps a listening socket, which it closes on an error.
func newListener(sock *socket.Conn, kind Kind, opt options) (*listener, error) {
	raw, err := sock.SyscallConn()
	if err != nil {
		sock.Close()
		return nil, err
	}
	at, err := sock.Getsockname()
	if err != nil {
		sock.Close()
		return nil, err
	}
	l := &listener{sock: sock, raw: raw, kind: kind, at: at, opt: opt, turn: make(chan struct{}, 1)}
	l.close = sync.OnceValue(l.shut)
	return l, nil
}

// Accept implements Listener. When ctx ends, the error is both net.ErrClosed
// and that of ctx.
func (l *listener) Accept(ctx context.Context) (Conn, error) {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return nil, l.ended(ctx)
	}
	for {
		sock, sa, err := l.sock.Accept(ctx, 0)
		switch {
		case err == nil:
			c, err := newConn(sock, sa, &l.opt)
			if err != nil {
				sock.Close()
				return nil, fmt.Errorf("accept on %s: %w", l.Addr(), err)
			}
			at, ok := l.at.(*unix.SockaddrVM)
			c.peer.Loopback = ok && at.CID == unix.VMADDR_CID_LOCAL
			return c, nil
		case ctx.Err() != nil:
			return nil, l.ended(ctx)
		case l.closed.Load():
			return nil, fmt.Errorf("accept on %s: %w", l.Addr(), net.ErrClosed)
		case ofOneConnection(err):
			continue
		}
		return nil, fmt.Errorf("accept on %s: %w", l.Addr(), err)
	}
}

func (l *listener) ended(ctx context.Context) error {
	return fmt.Errorf("accept on %s: %w: %w", l.Addr(), net.ErrClosed, ctx.Err())
}

// ofOneConnection says that accept spoke of a connection that broke while it
// waited, as Linux does (accept(2), "Error handling"); such an error took
// that connection off the queue.
func ofOneConnection(err error) bool {
	for _, e := range []unix.Errno{
		unix.ECONNABORTED, unix.ECONNRESET, unix.EPROTO, unix.ENOPROTOOPT,
		unix.ENETDOWN, unix.EHOSTDOWN, unix.ENONET, unix.EHOSTUNREACH,
		unix.ENETUNREACH, unix.ETIMEDOUT,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Close implements Listener. Further calls return what the first returned.
func (l *listener) Close() error { return l.close() }

// shut takes the path away first, so that nobody finds a socket that refuses.
func (l *listener) shut() error {
	l.closed.Store(true)
	var err error
	if l.path != nil {
		err = l.path.remove()
	}
	if l.forAll.Load() {
		err = errors.Join(err, l.shutdown())
	}
	return errors.Join(err, l.sock.Close())
}

// shutdown makes the socket listen no more, whoever has it. A vsock that listens
// cannot be shut down (ENOTCONN).
func (l *listener) shutdown() error {
	var bad error
	err := l.raw.Control(func(fd uintptr) { bad = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	if errors.Is(bad, unix.ENOTCONN) {
		return err
	}
	return errors.Join(err, os.NewSyscallError("shutdown", bad))
}

// Kind implements Listener.
func (l *listener) Kind() Kind { return l.kind }

// Addr implements Listener.
func (l *listener) Addr() string {
	switch at := l.at.(type) {
	case *unix.SockaddrUnix:
		return at.Name
	case *unix.SockaddrVM:
		if at.CID == CIDAny {
			return fmt.Sprintf("any:%d", at.Port)
		}
		return vsockAddr(at.CID, at.Port)
	}
	return addrPort(l.at).String()
}

// URI implements Listener. Where the socket listens on all addresses, the URI
// has one that reaches it: "localhost", or this machine's context ID, which
// on a host is the one its guests know.
func (l *listener) URI(export string, tls bool) string {
	u := URI{Export: export, TLS: tls, Target: Target{Kind: l.kind}}
	switch at := l.at.(type) {
	case *unix.SockaddrUnix:
		u.Path = at.Name
		if abs, err := filepath.Abs(at.Name); err == nil && at.Name != "" && at.Name[0] != '@' {
			u.Path = abs
		}
	case *unix.SockaddrVM:
		u.CID, u.Port = at.CID, at.Port
		if u.CID == CIDAny {
			u.CID = ownCID()
		}
	default:
		ap := addrPort(l.at)
		u.Address, u.Port = ap.Addr().String(), uint32(ap.Port())
		if ap.Addr().IsUnspecified() {
			u.Address = "localhost"
		}
	}
	return u.String()
}

// ownCID is this machine's context ID. A host without guests has none yet,
// and will be 2 for them.
func ownCID() uint32 {
	cid, err := vsock.ContextID()
	if err != nil || cid == CIDAny {
		return vsock.Host
	}
	return cid
}

// listenVSock opens a vsock endpoint.
func listenVSock(e Endpoint) (*listener, error) {
	cid, port := e.CID, e.Port
	if cid == 0 {
		cid = CIDAny
	}
	if port == 0 {
		port = unix.VMADDR_PORT_ANY
	}
	opt := optionsOf(e)
	l, err := bindAndListen(VSock, unix.AF_VSOCK, &unix.SockaddrVM{CID: cid, Port: port}, opt)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock %s: %w", vsockAddr(cid, port), err)
	}
	return l, nil
}

// bindAndListen makes a listening vsock or TCP socket.
func bindAndListen(kind Kind, domain int, at unix.Sockaddr, opt options) (*listener, error) {
	sock, err := socket.Socket(domain, unix.SOCK_STREAM, 0, string(kind), nil)
	if err != nil {
		return nil, err
	}
	if kind == TCP {
		err = sock.SetsockoptInt(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && domain == unix.AF_INET6 {
		err = sock.SetsockoptInt(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = opt.buffers(sock, kind)
	}
	if err == nil {
		err = sock.Bind(at)
	}
	if err != nil {
		sock.Close()
		return nil, err
	}
	return startListening(sock, kind, opt)
}

// sockaddr is the kernel's form of ap.
func sockaddr(ap netip.AddrPort) (domain int, sa unix.Sockaddr, err error) {
	a := ap.Addr()
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Addr: a.As4(), Port: int(ap.Port())}, nil
	}
	zone, err := zoneID(a.Zone())
	return unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16(), Port: int(ap.Port()), ZoneId: zone}, err
}

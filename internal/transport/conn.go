package transport

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// conn is a Conn that is one socket.
type conn struct {
	sock          *socket.Conn
	raw           syscall.RawConn
	peer          Peer
	local, remote net.Addr
	closed        atomic.Bool
}

// newConn asks the kernel who is at the other end of a connected socket and
// tunes it. remote is the peer's address. The socket belongs to the conn, and
// stays the caller's on an error.
func newConn(sock *socket.Conn, remote unix.Sockaddr, opt *options) (*conn, error) {
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, err
	}
	local, err := sock.Getsockname()
	if err != nil {
		return nil, err
	}
	c := &conn{sock: sock, raw: raw, local: netAddr(local), remote: netAddr(remote)}
	if c.peer, err = peerOf(sock, raw, remote); err != nil {
		return nil, err
	}
	if err := opt.tune(sock, c.peer.Kind); err != nil {
		return nil, err
	}
	return c, nil
}

// FileConn makes a Conn of a connected stream socket, whoever made it. f is
// duplicated and stays the caller's.
func FileConn(f *os.File) (Conn, error) {
	s, err := sniff(int(f.Fd()))
	if err == nil {
		err = s.wantConnected()
	}
	if err != nil {
		return nil, fmt.Errorf("use %q as a connection: %w", f.Name(), err)
	}
	sock, err := socket.FileConn(f, string(s.kind))
	if err != nil {
		return nil, fmt.Errorf("use %q as a connection: %w", f.Name(), err)
	}
	c, err := connected(sock)
	if err != nil {
		sock.Close()
		return nil, fmt.Errorf("use %q as a connection: %w", f.Name(), err)
	}
	return c, nil
}

// connected is newConn for a socket of which only the descriptor is known.
func connected(sock *socket.Conn) (*conn, error) {
	remote, err := sock.Getpeername()
	if err != nil {
		return nil, err
	}
	return newConn(sock, remote, &options{keepAlive: DefaultKeepAlive()})
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.sock.Read(p)
	if err != nil && err != io.EOF {
		err = c.opError("read", err)
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	n, err := c.sock.Write(p)
	if err != nil {
		err = c.opError("write", err)
	}
	return n, err
}

func (c *conn) Close() error {
	c.closed.Store(true)
	return c.sock.Close()
}

func (c *conn) CloseWrite() error { return c.opError("close write side of", c.sock.CloseWrite()) }

func (c *conn) SetDeadline(t time.Time) error {
	return c.opError("set deadline", c.sock.SetDeadline(t))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	return c.opError("set deadline", c.sock.SetReadDeadline(t))
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	return c.opError("set deadline", c.sock.SetWriteDeadline(t))
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }
func (c *conn) Peer() *Peer          { return &c.peer }
func (c *conn) Raw() syscall.RawConn { return c.raw }

// opError gives errors of the socket's file the shape that users of net.Conn
// test for: net.Error, net.ErrClosed, os.ErrDeadlineExceeded.
func (c *conn) opError(op string, err error) error {
	if err == nil {
		return nil
	}
	if err = bare(err); c.closed.Load() {
		err = net.ErrClosed
	}
	return &net.OpError{
		Op: op, Net: string(c.peer.Kind), Source: c.local, Addr: c.remote, Err: err,
	}
}

// bare takes the wrapping off that os.File and socket.Conn add: a name and
// the system call.
func bare(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	if se, ok := errors.AsType[*os.SyscallError](err); ok {
		return se.Err
	}
	return err
}

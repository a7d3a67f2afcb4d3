package transport

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Standard streams of a process that serves one client on them.
const (
	stdinFD  = 0
	stdoutFD = 1
)

// OpenStdio makes a Conn of standard input and output. If both are one connected
// socket, the Conn is that socket, with the peer that the kernel names;
// otherwise they are two pipes or sockets, the peer's Kind is Stdio, and Raw
// is nil. Afterwards both descriptors are /dev/null, so that nothing else
// that the process prints can get into the stream.
func OpenStdio() (Conn, error) {
	c, err := stdio(stdinFD, stdoutFD)
	if err != nil {
		return nil, fmt.Errorf("serve on standard input and output: %w", err)
	}
	return c, nil
}

// stdio duplicates the two descriptors and puts /dev/null in their place.
func stdio(infd, outfd int) (Conn, error) {
	in, err := dupFile(infd, "stdin")
	if err != nil {
		return nil, err
	}
	out, err := dupFile(outfd, "stdout")
	if err != nil {
		in.Close()
		return nil, err
	}
	c, err := join(in, out)
	if err == nil {
		err = nullOver(infd, outfd)
		if err != nil {
			c.Close()
		}
	}
	if err != nil {
		in.Close()
		out.Close()
		return nil, err
	}
	return c, nil
}

// join makes the Conn. A pair of files belongs to the Conn; of a socket, the
// Conn has its own descriptor and both files are closed.
func join(in, out *os.File) (Conn, error) {
	fi, err := in.Stat()
	if err != nil {
		return nil, err
	}
	fo, err := out.Stat()
	if err != nil {
		return nil, err
	}
	if isSocket(fi) && os.SameFile(fi, fo) {
		c, err := FileConn(in)
		if err != nil {
			return nil, err
		}
		in.Close()
		out.Close()
		return c, nil
	}
	for _, f := range []fs.FileInfo{fi, fo} {
		if !isSocket(f) && f.Mode()&fs.ModeNamedPipe == 0 {
			return nil, fmt.Errorf("%s is neither a pipe nor a socket", f.Name())
		}
	}
	return &pipes{in: in, out: out, peer: Peer{Kind: Stdio, Addr: "stdin,stdout"}}, nil
}

// dupFile duplicates fd into a file that Go's poller waits for.
func dupFile(fd int, name string) (*os.File, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := unix.SetNonblock(n, true); err != nil {
		unix.Close(n)
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}

func nullOver(fds ...int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, fd := range fds {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}

// pipes is a Conn of one file per direction.
type pipes struct {
	in, out *os.File
	peer    Peer
	// closed and half are set by Close and CloseWrite: os.File has no one
	// error that says so.
	closed, half atomic.Bool
}

func (p *pipes) Read(b []byte) (int, error) {
	n, err := p.in.Read(b)
	return n, p.check(err, false)
}

func (p *pipes) Write(b []byte) (int, error) {
	n, err := p.out.Write(b)
	return n, p.check(err, true)
}

// Close closes what CloseWrite has left.
func (p *pipes) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	err := p.in.Close()
	if !p.half.Swap(true) {
		err = errors.Join(err, p.out.Close())
	}
	return err
}

func (p *pipes) CloseWrite() error {
	if p.half.Swap(true) {
		return net.ErrClosed
	}
	return p.out.Close()
}

// SetDeadline leaves out a write side that CloseWrite has closed.
func (p *pipes) SetDeadline(t time.Time) error {
	if err := p.SetReadDeadline(t); err != nil || p.half.Load() {
		return err
	}
	return p.SetWriteDeadline(t)
}

func (p *pipes) SetReadDeadline(t time.Time) error { return p.check(p.in.SetReadDeadline(t), false) }

func (p *pipes) SetWriteDeadline(t time.Time) error {
	return p.check(p.out.SetWriteDeadline(t), true)
}

func (p *pipes) LocalAddr() net.Addr  { return &net.UnixAddr{Net: "unix"} }
func (p *pipes) RemoteAddr() net.Addr { return &net.UnixAddr{Net: "unix"} }
func (p *pipes) Peer() *Peer          { return &p.peer }
func (p *pipes) Raw() syscall.RawConn { return nil }

// check makes net.ErrClosed of the errors after a close.
func (p *pipes) check(err error, writing bool) error {
	if err != nil && (p.closed.Load() || writing && p.half.Load()) {
		return net.ErrClosed
	}
	return err
}

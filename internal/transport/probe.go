package transport

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Probe asks whether a server listens at the path of a Unix socket. It is a
// socket whose other end is gone already: it stays connected for good, so that
// connect(2) looks for the server and then refuses (EISCONN). The server sees
// nothing, and whoever has the descriptor can reach nobody by it. It is for any
// goroutine.
type Probe struct {
	fd int
}

// NewProbe makes one. The caller closes it, or keeps it until the process ends.
func NewProbe() (*Probe, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	p := &Probe{fd: pair[0]}
	if err := unix.Close(pair[1]); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// FD is the number of its descriptor.
func (p *Probe) FD() int { return p.fd }

// Close ends its use.
func (p *Probe) Close() error { return unix.Close(p.fd) }

// ask returns nil if a stream server listens at path, be its queue full,
// ECONNREFUSED if the socket is stale, and what else connect(2) says.
func (p *Probe) ask(path string) error {
	switch err := unix.Connect(p.fd, &unix.SockaddrUnix{Name: path}); {
	case err == nil:
		return fmt.Errorf("a connected socket could be connected to %q", path)
	case errors.Is(err, unix.EISCONN), errors.Is(err, unix.EAGAIN):
		return nil
	default:
		return err
	}
}

// ask asks by p, or by a probe of its own if p is nil.
func ask(p *Probe, path string) error {
	if p == nil {
		own, err := NewProbe()
		if err != nil {
			return err
		}
		defer own.Close()
		p = own
	}
	return p.ask(path)
}

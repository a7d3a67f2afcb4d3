package transport

import (
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ListenUnix opens a Unix endpoint as Listen does, with the same care for its
// path, mode and owner, for a server of another protocol than NBD: what it
// accepts are *net.UnixConn.
func ListenUnix(ctx context.Context, e Endpoint) (net.Listener, error) {
	e.Kind = Unix
	l, err := listenUnix(ctx, e)
	if err != nil {
		return nil, err
	}
	p, err := plainListener(l)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return p, nil
}

// plain is a listener of package net on the socket of another. That one keeps
// the path.
type plain struct {
	net.Listener
	owner *listener
}

func plainListener(l *listener) (net.Listener, error) {
	fd := -1
	var err error
	if cerr := l.raw.Control(func(s uintptr) {
		fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), l.Addr())
	defer f.Close() // FileListener has its own
	n, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return &plain{n, l}, nil
}

// Close stops accepting and removes the path.
func (p *plain) Close() error { return errors.Join(p.Listener.Close(), p.owner.Close()) }

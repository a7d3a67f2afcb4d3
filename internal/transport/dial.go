package transport

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// dialPoll is the pause before a Unix server with a full queue is asked again.
const dialPoll = 10 * time.Millisecond

// Dial connects to a server. ctx bounds the attempt; of a host with several
// addresses each gets its share of the time that ctx leaves.
func Dial(ctx context.Context, t Target) (Conn, error) {
	var c *conn
	var err error
	switch t.Kind {
	case Unix:
		c, err = dialUnix(ctx, t.Path)
	case TCP:
		c, err = dialTCP(ctx, t)
	case VSock:
		c, err = dialSocket(ctx, unix.AF_VSOCK, &unix.SockaddrVM{CID: t.CID, Port: t.Port})
	default:
		err = fmt.Errorf("target of kind %q", t.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t, err)
	}
	return c, nil
}

func dialSocket(ctx context.Context, domain int, sa unix.Sockaddr) (*conn, error) {
	sock, err := socket.Socket(domain, unix.SOCK_STREAM, 0, "dial", nil)
	if err != nil {
		return nil, err
	}
	if _, err := sock.Connect(ctx, sa); err != nil {
		sock.Close()
		return nil, err
	}
	return dialed(sock)
}

func dialed(sock *socket.Conn) (*conn, error) {
	c, err := connected(sock)
	if err != nil {
		sock.Close()
		return nil, err
	}
	return c, nil
}

// dialUnix asks again while the server's queue is full: the kernel answers
// EAGAIN then and tells nobody when there is room.
func dialUnix(ctx context.Context, path string) (*conn, error) {
	if path == "" || len(path) > maxUnixPath {
		return nil, fmt.Errorf("path has %d bytes, allowed are 1 to %d", len(path), maxUnixPath)
	}
	if path[0] == '@' {
		path = "./" + path // x/sys/unix would make it an abstract name
	}
	sock, err := socket.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0, string(Unix), nil)
	if err != nil {
		return nil, err
	}
	if err := connectUnix(ctx, sock, path); err != nil {
		sock.Close()
		return nil, err
	}
	return dialed(sock)
}

func connectUnix(ctx context.Context, sock *socket.Conn, path string) error {
	raw, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	tick := time.NewTicker(dialPoll)
	defer tick.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var connErr error
		err := raw.Control(func(fd uintptr) {
			connErr = unix.Connect(int(fd), &unix.SockaddrUnix{Name: path})
		})
		if err := errors.Join(err, connErr); !errors.Is(err, unix.EAGAIN) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// dialTCP tries the addresses in the resolver's order.
func dialTCP(ctx context.Context, t Target) (*conn, error) {
	if t.Port == 0 || t.Port > math.MaxUint16 {
		return nil, fmt.Errorf("port %d is not between 1 and %d", t.Port, math.MaxUint16)
	}
	addrs, err := resolve(ctx, t.Address, "")
	if err != nil {
		return nil, err
	}
	var errs []error
	for i, a := range addrs {
		c, err := dialIP(ctx, netip.AddrPortFrom(a, uint16(t.Port)), len(addrs)-i)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// dialIP gives the address one share of the remaining time.
func dialIP(ctx context.Context, ap netip.AddrPort, shares int) (*conn, error) {
	if end, ok := ctx.Deadline(); ok && shares > 1 {
		part, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(shares))
		defer cancel()
		ctx = part
	}
	domain, sa, err := sockaddr(ap)
	if err != nil {
		return nil, err
	}
	return dialSocket(ctx, domain, sa)
}

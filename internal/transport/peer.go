package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/mdlayher/socket"
	"github.com/mdlayher/vsock"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// options are what an Endpoint says about each of its connections.
type options struct {
	name       string
	send, recv int
	keepAlive  KeepAlive
}

func optionsOf(e Endpoint) options {
	o := options{name: e.Name, send: e.SendBuffer, recv: e.RecvBuffer, keepAlive: DefaultKeepAlive()}
	if e.KeepAlive != nil {
		o.keepAlive = *e.KeepAlive
	}
	return o
}

// buffers sets the socket buffers. A listening socket needs it before listen,
// because TCP announces its window scale and vsock its credit from then on.
func (o *options) buffers(s *socket.Conn, k Kind) error {
	if k == VSock {
		if o.recv <= 0 {
			return nil
		}
		var b [8]byte
		binary.NativeEndian.PutUint64(b[:], uint64(o.recv))
		err := s.SetsockoptBytes(unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, b[:])
		if err != nil {
			return err
		}
		return s.SetsockoptBytes(unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_SIZE, b[:])
	}
	send := o.send
	if send == 0 && k == Unix {
		send = limits.UnixSendBuffer
	}
	if send > 0 {
		if err := s.SetWriteBuffer(send); err != nil {
			return err
		}
	}
	if o.recv > 0 {
		return s.SetReadBuffer(o.recv)
	}
	return nil
}

// tune prepares a connected socket. Nothing is left to what a listening
// socket may pass on, since an inherited one was made by somebody else.
func (o *options) tune(s *socket.Conn, k Kind) error {
	if err := o.buffers(s, k); err != nil {
		return err
	}
	if k != TCP {
		return nil
	}
	return tuneTCP(s, o.keepAlive)
}

// tuneTCP sends replies at once and gives up on a dead peer: after the
// keep-alive probes when the connection is idle, and after the same time when
// the peer acknowledges nothing. TCP_USER_TIMEOUT bounds both (tcp(7)).
func tuneTCP(s *socket.Conn, ka KeepAlive) error {
	probes, dead := 1, ka
	if ka.Idle <= 0 {
		probes, dead = 0, DefaultKeepAlive()
	}
	timeout := dead.Idle + time.Duration(dead.Count)*dead.Interval
	for _, o := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, probes},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(dead.Idle)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(dead.Interval)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, max(dead.Count, 1)},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds())},
	} {
		if err := s.SetsockoptInt(o.level, o.name, o.value); err != nil {
			return err
		}
	}
	return nil
}

// seconds rounds up, because the kernel refuses 0.
func seconds(d time.Duration) int { return max(int((d+time.Second-1)/time.Second), 1) }

// peerOf asks the kernel who is at the other end. Credentials are those of
// the moment of connect, whoever holds the socket now.
func peerOf(s *socket.Conn, raw syscall.RawConn, sa unix.Sockaddr) (Peer, error) {
	switch sa := sa.(type) {
	case *unix.SockaddrUnix:
		return unixPeer(s, raw, sa)
	case *unix.SockaddrVM:
		return Peer{Kind: VSock, Addr: vsockAddr(sa.CID, sa.Port), CID: sa.CID, Port: sa.Port}, nil
	case *unix.SockaddrInet4, *unix.SockaddrInet6:
		return Peer{Kind: TCP, Addr: addrPort(sa).String()}, nil
	}
	return Peer{}, fmt.Errorf("peer address of type %T", sa)
}

func unixPeer(s *socket.Conn, raw syscall.RawConn, sa *unix.SockaddrUnix) (Peer, error) {
	var cred *unix.Ucred
	var credErr error
	err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return Peer{}, fmt.Errorf("ask for peer credentials: %w", err)
	}
	label, err := peerLabel(s)
	if err != nil {
		return Peer{}, fmt.Errorf("ask for peer label: %w", err)
	}
	groups, err := PeerGroups(s)
	if err != nil {
		return Peer{}, fmt.Errorf("ask for peer groups: %w", err)
	}
	return Peer{
		Kind: Unix, Addr: sa.Name,
		UID: cred.Uid, GID: cred.Gid, PID: cred.Pid, Groups: groups, Label: label,
	}, nil
}

// peerLabel returns the security context of a Unix peer, or "" where no
// security module gives one.
func peerLabel(s *socket.Conn) (string, error) {
	for _, size := range []int{256, limits.SecurityLabel} {
		b := make([]byte, size)
		n, err := s.GetsockoptBytes(unix.SOL_SOCKET, unix.SO_PEERSEC, b)
		switch {
		case err == nil:
			return string(bytes.TrimRight(b[:n], "\x00")), nil
		case errors.Is(err, unix.ENOPROTOOPT):
			return "", nil
		case !errors.Is(err, unix.ERANGE):
			return "", err
		}
	}
	return "", unix.ERANGE
}

// addrPort is the IP address and port of sa. An IPv4 address that came
// through an IPv6 socket is shown as what it is, so that rules need not know
// of two forms. Zones are interface numbers.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		a := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.ZoneId != 0 {
			a = a.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return netip.AddrPortFrom(a, uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func netAddr(sa unix.Sockaddr) net.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrUnix:
		return &net.UnixAddr{Net: "unix", Name: sa.Name}
	case *unix.SockaddrVM:
		return &vsock.Addr{ContextID: sa.CID, Port: sa.Port}
	}
	return net.TCPAddrFromAddrPort(addrPort(sa))
}

func vsockAddr(cid, port uint32) string { return fmt.Sprintf("%d:%d", cid, port) }

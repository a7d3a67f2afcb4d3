package server

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/mdlayher/socket"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

// Access is what a peer may do.
type Access uint8

// From nothing to everything.
const (
	NoAccess Access = iota // it is not even listened to
	Read                   // it may look
	Change                 // it may look and change
)

// Peer is who connected, by the kernel's word and as of that moment, whoever
// holds the socket now.
type Peer struct {
	UID, GID uint32
	PID      int32 // for the log: the process may be another one by now

	// Groups are the supplementary groups (SO_PEERGROUPS).
	Groups []uint32
}

// Authorizer says what a peer may do. It must not wait for anything.
type Authorizer func(Peer) Access

// Rules are an Authorizer's lists of users and groups. A peer has a group if it
// is its primary or one of its supplementary ones.
type Rules struct {
	ReadUsers, ReadGroups     []uint32
	ChangeUsers, ChangeGroups []uint32
}

// Access is what the rules give to p.
func (r *Rules) Access(p Peer) Access {
	switch {
	case has(p, r.ChangeUsers, r.ChangeGroups):
		return Change
	case has(p, r.ReadUsers, r.ReadGroups):
		return Read
	}
	return NoAccess
}

func has(p Peer, users, groups []uint32) bool {
	return slices.Contains(users, p.UID) || transport.IsMember(p.GID, p.Groups, groups)
}

// peerOf asks the kernel, and switches off what an inherited listening socket
// may have passed on: credentials and labels as ancillary data.
func peerOf(c *net.UnixConn) (Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var p Peer
	dup := -1
	var inner error
	err = raw.Control(func(fd uintptr) { p, dup, inner = credentials(int(fd)) })
	if err := errors.Join(err, inner); err != nil {
		return Peer{}, fmt.Errorf("ask for peer credentials: %w", err)
	}
	if p.Groups, err = peerGroups(dup); err != nil {
		return Peer{}, fmt.Errorf("ask for peer groups: %w", err)
	}
	return p, nil
}

// credentials also returns a duplicate of fd, the caller's to close.
func credentials(fd int) (Peer, int, error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 0); err != nil {
		return Peer{}, -1, err
	}
	// A kernel without security modules refuses to hear of it.
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSSEC, 0)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return Peer{}, -1, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, -1, err
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, dup, err
}

// peerGroups closes fd.
func peerGroups(fd int) ([]uint32, error) {
	s, err := socket.New(fd, "control")
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return transport.PeerGroups(s)
}

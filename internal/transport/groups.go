package transport

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// OverflowID stands for every user and group that this user namespace does not
// know (user_namespaces(7)), and thus for nobody in particular.
const OverflowID = 65534

// IsMember tells whether gid, the primary group of a peer, or one of its
// supplementary groups is in list. OverflowID is in none.
func IsMember(gid uint32, groups, list []uint32) bool {
	in := func(g uint32) bool { return g != OverflowID && slices.Contains(list, g) }
	return in(gid) || slices.ContainsFunc(groups, in)
}

// PeerGroups are the supplementary groups of the process at the other end of a
// Unix socket, when it connected (SO_PEERGROUPS, since Linux 4.13).
func PeerGroups(s *socket.Conn) ([]uint32, error) {
	for _, n := range []int{256, limits.PeerGroups} {
		b := make([]byte, 4*n)
		got, err := s.GetsockoptBytes(unix.SOL_SOCKET, unix.SO_PEERGROUPS, b)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return words(b[:got]), nil
	}
	return nil, unix.ERANGE
}

// words reads an array of gid_t.
func words(b []byte) []uint32 {
	out := make([]uint32, 0, len(b)/4)
	for ; len(b) >= 4; b = b[4:] {
		out = append(out, binary.NativeEndian.Uint32(b))
	}
	return out
}

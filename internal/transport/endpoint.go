package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"golang.org/x/sys/unix"
)

// FD is the kind of an Endpoint that is an inherited listening socket. Its
// Listener has the kind of the socket.
const FD Kind = "fd"

// CIDAny is the context ID by which a vsock endpoint listens on all of them.
const CIDAny = unix.VMADDR_CID_ANY

// PrivatePath, as the path of a Unix endpoint, makes a socket in a new
// directory that only its owner may enter, this user if the endpoint names none.
const PrivatePath = "-"

// Owner is the owner of a Unix socket's file; -1 leaves that part as it is.
type Owner struct {
	UID, GID int
}

// has tells whether a file is the owner's already: nothing need be asked of the
// kernel then, which a confined service may not ask it.
func (o *Owner) has(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && (o.UID == -1 || uint32(o.UID) == st.Uid) && (o.GID == -1 || uint32(o.GID) == st.Gid)
}

// ParseOwner resolves USER, USER:GROUP or :GROUP, by name or number; a name
// comes before a number, as chown(1) has it. What is absent stays as it is.
func ParseOwner(s string) (*Owner, error) {
	name, group, _ := strings.Cut(s, ":")
	o := &Owner{UID: -1, GID: -1}
	var err error
	if name != "" {
		if o.UID, err = LookupUser(name); err != nil {
			return nil, err
		}
	}
	if group != "" {
		if o.GID, err = LookupGroup(group); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// LookupUser is the number of a user, by name or number as ParseOwner has it.
func LookupUser(name string) (int, error) {
	id := name
	if u, err := user.Lookup(name); err == nil {
		id = u.Uid
	}
	n, err := parseID(id)
	if err != nil {
		return 0, fmt.Errorf("no user %q", name)
	}
	return n, nil
}

// LookupGroup is the same of a group.
func LookupGroup(name string) (int, error) {
	id := name
	if g, err := user.LookupGroup(name); err == nil {
		id = g.Gid
	}
	n, err := parseID(id)
	if err != nil {
		return 0, fmt.Errorf("no group %q", name)
	}
	return n, nil
}

// parseID refuses the largest number, which the kernel takes for "leave".
func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == math.MaxUint32 {
		err = strconv.ErrRange
	}
	return int(n), err
}

// ParseMode reads the permissions of a socket, in octal.
func ParseMode(s string) (os.FileMode, error) {
	m, err := strconv.ParseUint(s, 8, 32)
	if err != nil || m == 0 || m > uint64(fs.ModePerm) {
		return 0, fmt.Errorf("%q is not an octal mode", s)
	}
	return os.FileMode(m), nil
}

// Endpoint says where to listen. Only the fields of its Kind are used.
type Endpoint struct {
	// Kind is Unix, TCP, VSock or FD.
	Kind Kind

	// Name is what NameOf returns for the listeners; it is for logs and
	// for configurations that speak of a listener.
	Name string

	// Path is the Unix socket's, or PrivatePath. Mode is the mode of the
	// file, 0600 if it is 0; Owner is nil to leave the owner.
	Path  string
	Mode  os.FileMode
	Owner *Owner

	// Probe, if not nil, is what finds out whether a Unix socket that lies
	// under Path is stale, in a process that can make no other.
	Probe *Probe

	// Label and PathLabel are the SELinux contexts of a Unix socket and of
	// its file; "" leaves them to the policy. Where SELinux is off or does
	// not know them Listen returns an error.
	Label, PathLabel string

	// Address is an IP address or a host name, of which all addresses are
	// bound; "" is every address of the machine. Family is "4" or "6" to
	// use one IP family only, or "".
	Address, Family string

	// Port is the port of a TCP or vsock endpoint. The kernel picks one if
	// it is 0.
	Port uint32

	// CID is the context ID that a vsock endpoint listens on; 0 and CIDAny
	// are all.
	CID uint32

	// FD is the number of the inherited socket, which then belongs to the
	// Listener. No number may be given twice.
	FD int

	// SendBuffer and RecvBuffer are the sizes of the socket buffers in
	// bytes; 0 is limits.UnixSendBuffer for what a Unix socket sends and
	// leaves the kernel's otherwise: TCP finds its own. A vsock has only the
	// latter.
	SendBuffer, RecvBuffer int

	// KeepAlive is for TCP; nil is DefaultKeepAlive.
	KeepAlive *KeepAlive
}

// DefaultKeepAlive returns the settings of package limits.
func DefaultKeepAlive() KeepAlive {
	return KeepAlive{
		Idle:     limits.KeepAliveIdle,
		Interval: limits.KeepAliveInterval,
		Count:    limits.KeepAliveCount,
	}
}

// Listen opens the endpoint. It returns more than one Listener where the
// endpoint is more than one socket: a host name with several addresses, or
// both IP families. ctx bounds the look-up of names and the wait for another
// process that makes a socket in the same directory.
//
// The sockets are made on the calling goroutine, so that attributes of its
// locked thread, such as a label for new sockets, apply to them.
func Listen(ctx context.Context, e Endpoint) ([]Listener, error) {
	switch e.Kind {
	case Unix:
		return one(listenUnix(ctx, e))
	case TCP:
		return listenTCP(ctx, e)
	case VSock:
		return one(listenVSock(e))
	case FD:
		return one(listenFD(e))
	}
	return nil, fmt.Errorf("listen: endpoint of kind %q", e.Kind)
}

func one(l *listener, err error) ([]Listener, error) {
	if err != nil {
		return nil, err
	}
	return []Listener{l}, nil
}

// NameOf returns the name that a Listener of this package got from its
// Endpoint or from systemd, or "".
func NameOf(l Listener) string {
	if l, ok := l.(*listener); ok {
		return l.opt.name
	}
	return ""
}

// FileOf returns a duplicate of the listening socket, for the process that
// takes over; the caller closes it. The Listener stays usable.
func FileOf(l Listener) (*os.File, error) {
	own, ok := l.(*listener)
	if !ok {
		return nil, errors.New("listener has no socket of its own")
	}
	fd := -1
	var dupErr error
	err := own.raw.Control(func(s uintptr) {
		fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
	})
	if own.closed.Load() {
		err = net.ErrClosed
	}
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("duplicate listening socket: %w", err)
	}
	return os.NewFile(uintptr(fd), own.Addr()), nil
}

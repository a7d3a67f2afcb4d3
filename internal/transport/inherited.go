package transport

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// sniffed is what the kernel says of a descriptor that somebody else opened.
type sniffed struct {
	kind      Kind
	stream    bool
	listening bool
}

// sniff fails if fd is no socket of a kind that is served.
func sniff(fd int) (s sniffed, err error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if errors.Is(err, unix.ENOTSOCK) {
		return s, errors.New("not a socket")
	}
	if err != nil {
		return s, err
	}
	switch domain {
	case unix.AF_UNIX:
		s.kind = Unix
	case unix.AF_INET, unix.AF_INET6:
		s.kind = TCP
	case unix.AF_VSOCK:
		s.kind = VSock
	default:
		return s, fmt.Errorf("socket of address family %d", domain)
	}
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return s, err
	}
	acc, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	s.stream, s.listening = typ == unix.SOCK_STREAM, acc != 0
	return s, err
}

func (s sniffed) wantListening() error {
	switch {
	case !s.stream:
		return errors.New("not a stream socket")
	case !s.listening:
		return errors.New("not a listening socket")
	}
	return nil
}

func (s sniffed) wantConnected() error {
	switch {
	case !s.stream:
		return errors.New("not a stream socket")
	case s.listening:
		return errors.New("a listening socket, not a connection")
	}
	return nil
}

// listenFD takes over an inherited listening socket. Nothing is closed or
// changed unless it is one.
func listenFD(e Endpoint) (*listener, error) {
	s, err := sniff(e.FD)
	if err == nil {
		err = s.wantListening()
	}
	if err != nil {
		return nil, fmt.Errorf("listen on fd %d: %w", e.FD, err)
	}
	unix.CloseOnExec(e.FD)
	sock, err := socket.New(e.FD, string(s.kind))
	if err != nil {
		return nil, fmt.Errorf("listen on fd %d: %w", e.FD, err)
	}
	return newListener(sock, s.kind, optionsOf(e))
}

// Activated returns the sockets that systemd opened (sd_listen_fds(3)), in
// its order and with its names, and none if there are none. It unsets the
// variables that announce them, so that a second call returns none and no
// child mistakes them for its own. If one of the sockets cannot be served,
// all are closed.
func Activated() ([]Listener, error) {
	var ls []Listener
	var bad error
	for _, f := range activation.Files(true) {
		l, err := activated(f)
		f.Close()
		if err != nil {
			bad = errors.Join(bad, fmt.Errorf("activated socket %q: %w", f.Name(), err))
			continue
		}
		ls = append(ls, l)
	}
	if bad == nil {
		return ls, nil
	}
	for _, l := range ls {
		l.Close()
	}
	return nil, bad
}

func activated(f *os.File) (*listener, error) {
	s, err := sniff(int(f.Fd()))
	if err == nil {
		err = s.wantListening()
	}
	if err != nil {
		return nil, err
	}
	sock, err := socket.FileConn(f, string(s.kind))
	if err != nil {
		return nil, err
	}
	return newListener(sock, s.kind, optionsOf(Endpoint{Name: f.Name()}))
}

// Withdraw takes sockets out of those that systemd passed to this process, and
// out of the variables that announce them: those that drop wants. They are files
// by their names, which the caller closes. The others close up, so that nobody
// may have taken any yet.
func Withdraw(drop func(f *os.File) bool) (files []*os.File, err error) {
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > limits.HandoverSockets {
		return nil, nil // Activated finds none
	}
	names := passedNames(n)
	stay := names[:0:0]
	for i, name := range names {
		from, to := firstPassed+i, firstPassed+len(stay)
		fd, err := unix.FcntlInt(uintptr(from), unix.F_DUPFD_CLOEXEC, firstPassed+n)
		if err != nil {
			return files, fmt.Errorf("passed socket %q: %w", name, err)
		}
		f := os.NewFile(uintptr(fd), name)
		if drop(f) {
			files = append(files, f)
			continue
		}
		f.Close()
		if from != to {
			if err := unix.Dup3(from, to, 0); err != nil {
				return files, fmt.Errorf("passed socket %q: %w", name, err)
			}
		}
		stay = append(stay, name)
	}
	for fd := firstPassed + len(stay); fd < firstPassed+n; fd++ {
		_ = unix.Close(fd) // there is another of it
	}
	return files, errors.Join(os.Setenv("LISTEN_FDS", strconv.Itoa(len(stay))),
		os.Setenv("LISTEN_FDNAMES", strings.Join(stay, ":")))
}

// firstPassed is the number of the first socket that systemd passes
// (SD_LISTEN_FDS_START of sd_listen_fds(3)).
const firstPassed = 3

// passedNames are the names of n passed sockets, as Activated has them.
func passedNames(n int) []string {
	names := make([]string, n)
	copy(names, strings.Split(os.Getenv("LISTEN_FDNAMES"), ":"))
	for i, name := range names {
		if name == "" {
			names[i] = "LISTEN_FD_" + strconv.Itoa(firstPassed+i)
		}
	}
	return names
}

// isSocket says whether fi is a socket's.
func isSocket(fi fs.FileInfo) bool { return fi.Mode()&fs.ModeSocket != 0 }

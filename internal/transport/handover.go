package transport

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// Handed is a listener on its way to the next program of the same process.
type Handed struct {
	Name  string // NameOf
	Kind  Kind
	Sock  int // descriptor of the socket
	Inode int // of the file of a Unix socket that is ours to remove, or 0

	// Path is that file's, Private the folder that was made for it.
	Path    string
	Private string
}

// HandOver describes a listener of this package, or of ListenUnix, and returns
// duplicates of its descriptors, which the caller must keep open until the next
// program runs. The listener itself must not be closed before.
func HandOver(l any) (Handed, []*os.File, error) {
	if p, ok := l.(*plain); ok {
		l = p.owner
	}
	own, ok := l.(*listener)
	if !ok {
		return Handed{}, nil, fmt.Errorf("a %T cannot be passed on", l)
	}
	sock, err := FileOf(own)
	if err != nil {
		return Handed{}, nil, err
	}
	files := []*os.File{sock}
	p := Handed{Name: own.opt.name, Kind: own.kind, Sock: int(sock.Fd())}
	if own.path == nil || own.path.inode == nil {
		return p, files, nil
	}
	fd, err := unix.FcntlInt(own.path.inode.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return p, nil, errors.Join(err, sock.Close())
	}
	p.Inode, p.Private = fd, own.path.private
	if p.Path, err = filepath.Abs(own.path.path); err != nil {
		return p, nil, errors.Join(err, sock.Close(), unix.Close(fd))
	}
	return p, append(files, os.NewFile(uintptr(fd), p.Path)), nil
}

// Adopt takes over what HandOver has described. It fails if the descriptor is no
// listening socket of that kind. The folder of a Unix socket is not open in
// this program: the file is removed by its path.
func Adopt(p Handed) (Listener, error) {
	l, err := adopt(p)
	if err != nil {
		return nil, fmt.Errorf("listener %q that was handed over: %w", p.Name, err)
	}
	return l, nil
}

// AdoptUnix is Adopt for a listener of ListenUnix.
func AdoptUnix(p Handed) (net.Listener, error) {
	if p.Kind != Unix {
		return nil, fmt.Errorf("a listener of kind %s was handed over, not a Unix socket", p.Kind)
	}
	l, err := adopt(p)
	if err != nil {
		return nil, err
	}
	n, err := plainListener(l)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return n, nil
}

func adopt(p Handed) (*listener, error) {
	s, err := sniff(p.Sock)
	if err == nil {
		err = s.wantListening()
	}
	if err == nil && s.kind != p.Kind {
		err = fmt.Errorf("descriptor %d is a socket of kind %s, not %s", p.Sock, s.kind, p.Kind)
	}
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(p.Sock)
	sock, err := socket.New(p.Sock, string(p.Kind))
	if err != nil {
		return nil, err
	}
	l, err := newListener(sock, p.Kind, optionsOf(Endpoint{Name: p.Name}))
	if err != nil || p.Inode == 0 {
		return l, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(p.Inode, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, errors.Join(fmt.Errorf("descriptor %d is not the file of a socket", p.Inode), err, l.Close())
	}
	unix.CloseOnExec(p.Inode)
	l.path = &socketPath{path: p.Path, name: filepath.Base(p.Path), private: p.Private,
		inode: os.NewFile(uintptr(p.Inode), p.Path)}
	return l, nil
}

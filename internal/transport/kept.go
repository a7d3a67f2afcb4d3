package transport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Leave closes l in this process alone: a Unix socket's file stays, and
// whoever has a duplicate of the socket goes on listening. Resume takes it up.
func Leave(l Listener) error {
	if own, ok := l.(*listener); ok && own.path != nil {
		own.path.disown()
	}
	return l.Close()
}

// disown makes the file of the socket nobody's, so that it is not removed.
func (p *socketPath) disown() {
	if p.inode != nil {
		p.inode.Close()
		p.inode = nil
	}
	p.private = ""
}

// FileID names the file of a Unix socket that Listen made for l, as long as the
// socket is open: no other file can get its number before. It has letters, digits
// and hyphens, and is "" for other listeners.
func FileID(l Listener) (string, error) {
	own, ok := l.(*listener)
	if !ok || own.path == nil || own.path.inode == nil {
		return "", nil
	}
	return own.path.id()
}

func (p *socketPath) id() (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(p.inode.Fd()), &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x-%x", st.Dev, st.Ino), nil
}

// Resume takes up a socket that Listen opened for e in a process before this
// one: with the Unix socket's file, whose FileID was id, whose mode and owner
// stay, and which Close removes. It fails if f is no listening socket of that kind
// and address, or if nobody can reach it because its file is gone or another's.
// f stays the caller's.
func Resume(e Endpoint, f *os.File, id string) (Listener, error) {
	l, err := activated(f)
	if err != nil {
		return nil, fmt.Errorf("resume %q: %w", e.Name, err)
	}
	l.opt = optionsOf(e)
	if err := l.fits(e, id); err != nil {
		l.Close()
		return nil, fmt.Errorf("resume %q: %w", e.Name, err)
	}
	return l, nil
}

// End closes l for all who have a duplicate of its socket. The address is free
// then, but for that of a vsock, which lasts as long as a duplicate.
func End(l Listener) error {
	if own, ok := l.(*listener); ok {
		own.forAll.Store(true)
	}
	return l.Close()
}

// Abolish is End for a socket that no Listener is made of, and removes the Unix
// socket's file if the FileID of what is there is id. It returns where the socket
// listened. f stays the caller's.
func Abolish(f *os.File, id string) (addr string, err error) {
	l, err := activated(f)
	if err != nil {
		return "", fmt.Errorf("end a listener: %w", err)
	}
	if l.kind == Unix {
		_ = l.adopt(id) // without its file there is nothing to remove
	}
	return l.Addr(), End(l)
}

// ListensAt tells whether f is a listening socket with the address of e, of a TCP
// endpoint the port.
func ListensAt(f *os.File, e Endpoint) bool {
	l, err := activated(f)
	if err != nil {
		return false
	}
	defer l.Close()
	return l.listensAt(e) == nil
}

// fits compares a resumed listener with what is wanted, and takes over the file
// of a Unix socket.
func (l *listener) fits(e Endpoint, id string) error {
	if err := l.listensAt(e); err != nil || l.kind != Unix {
		return err
	}
	return l.adopt(id)
}

func (l *listener) listensAt(e Endpoint) error {
	if l.kind != e.Kind {
		return fmt.Errorf("it is a socket of kind %s, not %s", l.kind, e.Kind)
	}
	switch at := l.at.(type) {
	case *unix.SockaddrUnix:
		if filepath.Clean(at.Name) != filepath.Clean(e.Path) {
			return fmt.Errorf("it listens at %q, not %q", at.Name, e.Path)
		}
	case *unix.SockaddrVM:
		cid := e.CID
		if cid == 0 {
			cid = CIDAny
		}
		if at.CID != cid || at.Port != e.Port {
			return fmt.Errorf("it listens at %s, not %s", l.Addr(), vsockAddr(cid, e.Port))
		}
	default:
		if port := uint32(addrPort(l.at).Port()); port != e.Port {
			return fmt.Errorf("it listens at port %d, not %d", port, e.Port)
		}
	}
	return nil
}

// adopt makes the file of a resumed Unix socket this listener's, if its FileID is
// id: the kernel says only which path the socket was bound to (unix(7)).
func (l *listener) adopt(id string) error {
	p, err := newSocketPath(l.Addr())
	if err != nil {
		return err
	}
	fd, err := unix.Openat(int(p.dir.Fd()), p.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		p.release()
		return fmt.Errorf("open the file of the socket: %w", err)
	}
	p.inode = os.NewFile(uintptr(fd), p.path)
	is, err := p.id()
	if err == nil && is != id {
		err = errors.New("its path is another file's")
	}
	if err != nil {
		p.release()
		return err
	}
	l.path = p
	return nil
}

// Passed are listening sockets that systemd handed over, by name. Each stays
// open, so that a listener can be closed and opened again. All methods may be
// called by any goroutine, and by a nil Passed, which has none.
type Passed struct {
	mu   sync.Mutex
	list []Listener // guarded by mu
}

// TakePassed is Activated for a server that takes its sockets by name.
func TakePassed() (*Passed, error) {
	ls, err := Activated()
	return &Passed{list: ls}, err
}

// Names are those of the sockets, sorted, each once.
func (p *Passed) Names() []string {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for _, l := range p.list {
		names = append(names, NameOf(l))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Count is how many sockets have a name with that prefix.
func (p *Passed) Count(prefix string) (n int) {
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.list {
		if strings.HasPrefix(NameOf(l), prefix) {
			n++
		}
	}
	return n
}

// Files are duplicates of the sockets of a name, in systemd's order; the caller
// closes them.
func (p *Passed) Files(name string) (files []*os.File, err error) {
	if p == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.list {
		if NameOf(l) != name {
			continue
		}
		f, err := FileOf(l)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// Listen makes listeners of the sockets of a name. It fails if there is none.
func (p *Passed) Listen(name string, e Endpoint) (ls []Listener, err error) {
	files, err := p.Files(name)
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("systemd passed no socket that is called %q, but %q", name, p.Names())
	}
	for _, f := range files {
		l, bad := activated(f)
		f.Close()
		if bad != nil {
			err = errors.Join(err, bad)
			continue
		}
		l.opt = optionsOf(e)
		ls = append(ls, l)
	}
	if err == nil {
		return ls, nil
	}
	for _, l := range ls {
		l.Close()
	}
	return nil, err
}

// Drop closes the sockets of a name.
func (p *Passed) Drop(name string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list = slices.DeleteFunc(p.list, func(l Listener) bool {
		if NameOf(l) != name {
			return false
		}
		l.Close()
		return true
	})
}

// Close closes them all; listeners made of them go on.
func (p *Passed) Close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.list {
		l.Close()
	}
	p.list = nil
}

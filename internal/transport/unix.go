package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// maxUnixPath is the longest path that fits into struct sockaddr_un with its
// terminating zero byte (unix(7)).
const maxUnixPath = 107

// lockPoll is the pause between two attempts to lock a directory.
const lockPoll = 10 * time.Millisecond

// defaultMode is the mode of a socket that nobody else may connect to.
const defaultMode fs.FileMode = 0o600

// listenUnix opens a Unix endpoint. The directory is locked from the look at
// what lies under the path to the call of listen: two processes that start at
// once would otherwise each take the other's fresh socket for a stale one. What
// it made is removed before the lock is let go if it fails.
func listenUnix(ctx context.Context, e Endpoint) (*listener, error) {
	p, err := newSocketPath(e.Path)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", e.Path, err)
	}
	l, err := p.listen(ctx, e)
	if err != nil {
		p.release()
		return nil, fmt.Errorf("listen on %q: %w", p.path, err)
	}
	return l, nil
}

// socketPath is the file of a Unix socket. It holds the directory open, so
// that the file is found again when directories have been renamed, and the
// file itself, so that its inode number cannot pass to another file.
type socketPath struct {
	path, name string
	dir        *os.File // nil if the socket was handed over
	inode      *os.File // nil before bind

	// private is the directory that was made for PrivatePath, or "".
	private string
}

// newSocketPath opens the directory of the socket and refuses one in which
// anybody may replace the socket by another.
func newSocketPath(path string) (_ *socketPath, err error) {
	p := &socketPath{path: path}
	if path == PrivatePath {
		if p.private, err = os.MkdirTemp("", "vmdiskd-"); err != nil {
			return nil, err
		}
		p.path = filepath.Join(p.private, "socket")
	}
	defer func() {
		if err != nil {
			p.release()
		}
	}()
	switch {
	case path == "":
		return nil, errors.New("path is empty")
	case path[0] == '@':
		return nil, errors.New("abstract sockets have neither mode nor label: use a path")
	case len(p.path) > maxUnixPath:
		return nil, fmt.Errorf("path has %d bytes, which is more than %d", len(p.path), maxUnixPath)
	}
	dir, name := filepath.Split(p.path)
	if dir == "" {
		dir = "."
	}
	if p.name = name; name == "" {
		return nil, errors.New("path is a directory")
	}
	if p.dir, err = os.OpenFile(dir, unix.O_DIRECTORY|os.O_RDONLY, 0); err != nil {
		return nil, err
	}
	fi, err := p.dir.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Mode()&0o002 != 0 && fi.Mode()&fs.ModeSticky == 0 {
		return nil, fmt.Errorf("directory %q is writable by everybody and not sticky", dir)
	}
	return p, nil
}

func (p *socketPath) listen(ctx context.Context, e Endpoint) (*listener, error) {
	if err := p.lock(ctx); err != nil {
		return nil, err
	}
	defer p.unlock()
	sock, err := p.bind(e)
	if err != nil {
		return nil, err
	}
	l, err := startListening(sock, Unix, optionsOf(e))
	if err != nil {
		p.unbind()
		return nil, err
	}
	l.path = p
	return l, nil
}

// bind makes the socket's file with its final owner and mode. Nobody can
// connect before listen, and the file never has a wider mode than the one
// asked for: Linux gives it the mode of the socket itself, less the umask. Both
// are born with their labels.
func (p *socketPath) bind(e Endpoint) (_ *socket.Conn, err error) {
	if err := p.clear(e.Probe); err != nil {
		return nil, err
	}
	var sock *socket.Conn
	defer func() {
		if err != nil && sock != nil {
			sock.Close()
		}
	}()
	err = selinux.WithSocketLabel(e.Label, func() (err error) {
		sock, err = socket.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0, string(Unix), nil)
		return withLabel(err, e.Label)
	})
	if err != nil {
		return nil, err
	}
	mode := e.Mode.Perm()
	if mode == 0 {
		mode = defaultMode
	}
	if err := chmodSocket(sock, mode); err != nil {
		return nil, err
	}
	opt := optionsOf(e)
	if err := opt.buffers(sock, Unix); err != nil {
		return nil, err
	}
	err = selinux.WithFileLabel(e.PathLabel, func() error {
		return withLabel(sock.Bind(&unix.SockaddrUnix{Name: p.path}), e.PathLabel)
	})
	if err != nil {
		return nil, err
	}
	if err = p.adopt(mode, e.Owner); err == nil {
		err = p.verifyLabels(sock, e)
	}
	if err != nil {
		p.unbind()
		return nil, err
	}
	return sock, nil
}

// unbind takes away the file that bind made. It asks for no descriptor, which
// there may be none of, and relies on the lock for that nobody else's is there.
func (p *socketPath) unbind() { _ = p.unlink() }

// withLabel adds the label, which the policy may refuse to this process.
func withLabel(err error, label string) error {
	if err == nil || label == "" {
		return err
	}
	return fmt.Errorf("with label %q: %w", label, err)
}

// verifyLabels compares the labels with those that were asked for.
func (p *socketPath) verifyLabels(sock *socket.Conn, e Endpoint) error {
	if e.Label != "" {
		raw, err := sock.SyscallConn()
		if err != nil {
			return err
		}
		var label string
		var labelErr error
		err = raw.Control(func(fd uintptr) { label, labelErr = selinux.SocketLabel(int(fd)) })
		if err := errors.Join(err, labelErr); err != nil {
			return err
		}
		if err := sameLabel("the socket", label, e.Label); err != nil {
			return err
		}
	}
	if e.PathLabel == "" {
		return nil
	}
	label, err := selinux.FileLabel(p.path)
	if err != nil {
		return err
	}
	return sameLabel("its file", label, e.PathLabel)
}

func sameLabel(what, got, want string) error {
	is, err := selinux.Parse(got)
	if err != nil {
		return fmt.Errorf("label %q of %s: %w", got, what, err)
	}
	if wanted, err := selinux.Parse(want); err != nil || is != wanted {
		return fmt.Errorf("%s has label %q, want %q", what, got, want)
	}
	return nil
}

func chmodSocket(sock *socket.Conn, mode fs.FileMode) error {
	raw, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var chmodErr error
	err = raw.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), uint32(mode)) })
	return errors.Join(err, chmodErr)
}

// adopt opens the file that bind made and completes mode and owner. A private
// directory is the owner's too: who may connect has to get there.
func (p *socketPath) adopt(mode fs.FileMode, o *Owner) error {
	fd, err := unix.Openat(int(p.dir.Fd()), p.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the new socket: %w", err)
	}
	p.inode = os.NewFile(uintptr(fd), p.path)
	fi, err := p.inode.Stat()
	if err != nil {
		return err
	}
	if fi.Mode().Perm() != mode {
		// chmod does not take an O_PATH descriptor, but follows its link.
		if err := os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode); err != nil {
			return fmt.Errorf("set mode %#o: %w", mode, bare(err))
		}
	}
	if o == nil || o.has(fi) {
		return nil
	}
	if p.private != "" {
		if err := p.dir.Chown(o.UID, o.GID); err != nil {
			return fmt.Errorf("set owner %d:%d of its directory: %w", o.UID, o.GID, bare(err))
		}
	}
	if err := unix.Fchownat(fd, "", o.UID, o.GID, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("set owner %d:%d: %w", o.UID, o.GID, err)
	}
	return nil
}

// clear removes a stale socket: one of ours that refuses connections.
// Everything else that lies under the path is left alone.
func (p *socketPath) clear(probe *Probe) error {
	st, err := p.stat()
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s is in the way: %w", fileType(st.Mode), unix.EEXIST)
	}
	switch err := ask(probe, p.path); {
	case err == nil:
		return fmt.Errorf("a server answers there: %w", unix.EADDRINUSE)
	case errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("a socket is in the way: connect: %w", err)
	}
	if euid := os.Geteuid(); euid != 0 && st.Uid != uint32(euid) {
		return fmt.Errorf("stale socket of user %d is in the way: %w", st.Uid, unix.EEXIST)
	}
	if err := p.unlink(); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

func fileType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return "a symbolic link"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFREG:
		return "a regular file"
	}
	return "a special file"
}

// remove deletes the file if it is still the one that bind made, and lets go
// of the directory. It wants no lock, which strangers could hold: while the
// socket listens no server takes its file for a stale one (clear).
func (p *socketPath) remove() error {
	defer p.release()
	ours, err := p.ours()
	if err == nil && ours {
		err = p.unlink()
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove socket %q: %w", p.path, err)
	}
	return nil
}

func (p *socketPath) ours() (bool, error) {
	if p.inode == nil {
		return false, nil
	}
	now, err := p.stat()
	if err != nil {
		return false, err
	}
	var made unix.Stat_t
	if err := unix.Fstat(int(p.inode.Fd()), &made); err != nil {
		return false, err
	}
	return now.Dev == made.Dev && now.Ino == made.Ino, nil
}

func (p *socketPath) stat() (st unix.Stat_t, err error) {
	dir, name := p.at()
	err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

func (p *socketPath) unlink() error {
	dir, name := p.at()
	return unix.Unlinkat(dir, name, 0)
}

// at is where the file is, for the system calls that end in at.
func (p *socketPath) at() (dir int, name string) {
	if p.dir == nil {
		return unix.AT_FDCWD, p.path
	}
	return int(p.dir.Fd()), p.name
}

// release closes what socketPath holds.
func (p *socketPath) release() {
	if p.dir != nil {
		p.dir.Close() // ends the lock, too
	}
	if p.inode != nil {
		p.inode.Close()
	}
	if p.private != "" {
		_ = os.Remove(p.private)
	}
}

// lock takes the directory's lock. Any user who may read the directory can hold
// that, but a server never holds it for limits.SocketLock: after that it is no
// server that does, and is not waited for.
func (p *socketPath) lock(ctx context.Context) error {
	over := time.After(limits.SocketLock)
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(p.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-over:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("directory is locked by another process: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func (p *socketPath) unlock() { _ = unix.Flock(int(p.dir.Fd()), unix.LOCK_UN) }

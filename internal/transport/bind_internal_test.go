package transport

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNobodyConnectsBetweenBindAndListen stops a start half way: the file is
// there with its final mode, and refuses.
func TestNobodyConnectsBetweenBindAndListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	defer syscall.Umask(syscall.Umask(0))
	p, err := newSocketPath(path)
	if err != nil {
		t.Fatal(err)
	}
	sock, err := p.bind(Endpoint{Kind: Unix, Path: path, Mode: 0o640})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("mode before listen is %v, %v; want 0640", fi.Mode(), err)
	}
	if err := ask(nil, path); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect before listen: %v, want refused", err)
	}
	l, err := startListening(sock, Unix, options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := ask(nil, path); err != nil {
		t.Errorf("connect after listen: %v", err)
	}
	l.path = p
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestFreshModeComesFromTheSocket shows that bind itself makes the file with
// the mode of the socket, without the help of the umask.
func TestFreshModeComesFromTheSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	defer syscall.Umask(syscall.Umask(0))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Fchmod(fd, 0o600), unix.Bind(fd, &unix.SockaddrUnix{Name: path})); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("bind under umask 0 made mode %v, %v; want 0600", fi.Mode(), err)
	}
}

func TestAFailedStartLeavesNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	e := Endpoint{Kind: Unix, Path: path, Owner: &Owner{UID: 1, GID: 1}, RecvBuffer: 1}
	if os.Getuid() == 0 {
		e.Path = filepath.Join(t.TempDir(), "s")
		// Root may give the file away, so the start is broken off by hand.
		p, err := newSocketPath(path)
		if err != nil {
			t.Fatal(err)
		}
		sock, err := p.bind(e)
		if err != nil {
			t.Fatal(err)
		}
		sock.Close()
		p.unbind()
		p.release()
	} else if _, err := listenUnix(t.Context(), e); err == nil {
		t.Fatal("an ordinary user gave its socket away")
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("file after a failed start: %v, want none", err)
	}
}

func TestMappedAddressesAreShownAsIPv4(t *testing.T) {
	sa := &unix.SockaddrInet6{Port: 5}
	copy(sa.Addr[10:], []byte{0xff, 0xff, 192, 168, 0, 1})
	if got := addrPort(sa).String(); got != "192.168.0.1:5" {
		t.Errorf("mapped address is shown as %q", got)
	}
	sa = &unix.SockaddrInet6{Port: 5, ZoneId: 3, Addr: [16]byte{0xfe, 0x80, 15: 1}}
	if got := addrPort(sa).String(); got != "[fe80::1%3]:5" {
		t.Errorf("link-local address is shown as %q", got)
	}
}

func TestErrorsOfOneConnectionAreKnown(t *testing.T) {
	for err, want := range map[error]bool{
		os.NewSyscallError("accept4", unix.ECONNABORTED): true,
		os.NewSyscallError("accept4", unix.EPROTO):       true,
		os.NewSyscallError("accept4", unix.EMFILE):       false,
		os.NewSyscallError("accept4", unix.ENOBUFS):      false,
		os.NewSyscallError("accept4", unix.EBADF):        false,
		os.ErrClosed: false,
	} {
		if got := ofOneConnection(err); got != want {
			t.Errorf("%v is of one connection: %v, want %v", err, got, want)
		}
	}
}

package transport_test

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
	"golang.org/x/sys/unix"
)

func TestConnErrorsAreThoseOfNetConn(t *testing.T) {
	s, c := transporttest.Pair(t)
	put(t, s.SetReadDeadline(time.Unix(1, 0)))
	_, err := s.Read(make([]byte, 1))
	wantErr(t, "read after the deadline", err, os.ErrDeadlineExceeded)
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Errorf("error %v is no timeout", err)
	}
	put(t, s.SetReadDeadline(time.Time{}))
	put(t, c.Close())
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read after the peer's close: %v, want exactly EOF", err)
	}
	_, err = s.Write([]byte("x"))
	wantErr(t, "write after the peer's close", err, unix.EPIPE)
	put(t, s.Close())
	_, err = s.Read(make([]byte, 1))
	wantErr(t, "read after close", err, net.ErrClosed)
	_, err = s.Write([]byte("x"))
	wantErr(t, "write after close", err, net.ErrClosed)
	wantErr(t, "deadline after close", s.SetDeadline(time.Time{}), net.ErrClosed)
	wantErr(t, "half-close after close", s.CloseWrite(), net.ErrClosed)
}

func TestCloseWakesARead(t *testing.T) {
	s, _ := transporttest.Pair(t)
	done := make(chan error)
	go func() {
		_, err := s.Read(make([]byte, 1))
		done <- err
	}()
	put(t, s.Close())
	wantErr(t, "read during close", <-done, net.ErrClosed)
}

func TestRawWaitsOnThePoller(t *testing.T) {
	s, c := transporttest.Pair(t)
	got := make(chan byte)
	go func() {
		var b [1]byte
		s.Raw().Read(func(fd uintptr) bool {
			_, err := unix.Read(int(fd), b[:])
			return !errors.Is(err, unix.EAGAIN)
		})
		got <- b[0]
	}()
	c.Write([]byte("z"))
	if b := <-got; b != 'z' {
		t.Errorf("raw read got %q", b)
	}
}

func TestFileConnRefusesWhatIsNoConnection(t *testing.T) {
	l, _ := listenUnix(t)
	null, err := os.Open(os.DevNull)
	put(t, err)
	defer null.Close()
	for name, f := range map[string]*os.File{
		"listening socket": inherit(t, l), "file": null,
		"unconnected": os.NewFile(uintptr(sock(t, unix.AF_UNIX, unix.SOCK_STREAM)), "s"),
		"datagram":    os.NewFile(uintptr(sock(t, unix.AF_UNIX, unix.SOCK_DGRAM)), "d"),
	} {
		if c, err := transport.FileConn(f); err == nil {
			c.Close()
			t.Errorf("%s is a connection", name)
		}
		f.Close()
	}
}

func TestDialFailures(t *testing.T) {
	dir := t.TempDir()
	stale(t, filepath.Join(dir, "stale"))
	free := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	port := targetOf(t, free).Port
	free.Close()
	for _, tt := range []struct {
		name string
		to   transport.Target
		want error
	}{
		{"no socket", transport.Target{Kind: transport.Unix, Path: filepath.Join(dir, "none")}, unix.ENOENT},
		{"stale socket", transport.Target{Kind: transport.Unix, Path: filepath.Join(dir, "stale")}, unix.ECONNREFUSED},
		{"closed port", transport.Target{Kind: transport.TCP, Address: "127.0.0.1", Port: port}, unix.ECONNREFUSED},
		{"no path", transport.Target{Kind: transport.Unix}, nil},
		{"abstract name", transport.Target{Kind: transport.Unix, Path: "@none"}, unix.ENOENT},
		{"no port", transport.Target{Kind: transport.TCP, Address: "127.0.0.1"}, nil},
		{"no kind", transport.Target{}, nil},
	} {
		c, err := transport.Dial(t.Context(), tt.to)
		if err == nil {
			c.Close()
			t.Errorf("%s: connected", tt.name)
		} else if tt.want != nil {
			wantErr(t, tt.name, err, tt.want)
		}
	}
}

// TestDialWaitsForRoomInTheQueue fills the queue of a Unix server: the next
// client gets in as soon as one connection is accepted.
func TestDialWaitsForRoomInTheQueue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd := sock(t, unix.AF_UNIX, unix.SOCK_STREAM)
	put(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	put(t, unix.Listen(fd, 0))
	l := listen(t, transport.Endpoint{Kind: transport.FD, FD: fd})[0]
	to := transport.Target{Kind: transport.Unix, Path: path}
	first, err := transport.Dial(t.Context(), to)
	put(t, err)
	defer first.Close()
	second := make(chan error)
	go func() {
		c, err := transport.Dial(t.Context(), to)
		if err == nil {
			c.Close()
		}
		second <- err
	}()
	accept(t, l)
	accept(t, l)
	put(t, <-second)
}

func TestDialByNameTriesEveryAddress(t *testing.T) {
	l := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	c, err := transport.Dial(t.Context(), transport.Target{
		Kind: transport.TCP, Address: "localhost", Port: targetOf(t, l).Port,
	})
	if err != nil {
		t.Fatalf("dial localhost, of which only IPv4 listens: %v", err)
	}
	c.Close()
}

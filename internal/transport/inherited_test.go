package transport_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

// inherit duplicates l's socket as a parent would have left it.
func inherit(t *testing.T, l transport.Listener) *os.File {
	t.Helper()
	f, err := transport.FileOf(l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// dup is a descriptor number that nobody else closes.
func dup(t *testing.T, f *os.File) int {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 3)
	put(t, err)
	return fd
}

func TestInheritedSocketsOfEveryKindAccept(t *testing.T) {
	u, path := listenUnix(t)
	tcp := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	for _, l := range []transport.Listener{u, tcp} {
		t.Run(string(l.Kind()), func(t *testing.T) {
			fd := dup(t, inherit(t, l))
			got := listen(t, transport.Endpoint{Kind: transport.FD, FD: fd, Name: "from parent"})[0]
			if got.Kind() != l.Kind() || got.Addr() != l.Addr() || transport.NameOf(got) != "from parent" {
				t.Errorf("inherited %s %q named %q, want %s %q", got.Kind(), got.Addr(), transport.NameOf(got), l.Kind(), l.Addr())
			}
			s, c := connect(t, got)
			if s.Peer().Kind != l.Kind() {
				t.Errorf("peer is %+v", *s.Peer())
			}
			if l.Kind() == transport.TCP && sockopt(t, s, unix.IPPROTO_TCP, unix.TCP_NODELAY) != 1 {
				t.Error("connection of an inherited socket lacks TCP_NODELAY")
			}
			talk(t, s, c)
			put(t, got.Close())
		})
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("closing an inherited socket removed the path of another: %v", err)
	}
}

// TestDualStackSocketShowsIPv4PeersAsSuch inherits what systemd makes of a
// port number: one IPv6 socket for both families.
func TestDualStackSocketShowsIPv4PeersAsSuch(t *testing.T) {
	if !ipv6Works() {
		t.Skip("no IPv6 loopback")
	}
	fd := sock(t, unix.AF_INET6, unix.SOCK_STREAM)
	put(t, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
	put(t, unix.Bind(fd, &unix.SockaddrInet6{}))
	put(t, unix.Listen(fd, 1))
	l := listen(t, transport.Endpoint{Kind: transport.FD, FD: fd})[0]
	c, err := transport.Dial(t.Context(), transport.Target{
		Kind: transport.TCP, Address: "127.0.0.1", Port: targetOf(t, l).Port,
	})
	put(t, err)
	defer c.Close()
	s := accept(t, l)
	if s.Peer().Key() != "ip:127.0.0.1" || s.RemoteAddr().String() != c.LocalAddr().String() {
		t.Errorf("peer has key %q and address %v, want those of %v", s.Peer().Key(), s.RemoteAddr(), c.LocalAddr())
	}
}

func TestInheritedVSockIsRecognised(t *testing.T) {
	l := listenVSock(t)
	got := listen(t, transport.Endpoint{Kind: transport.FD, FD: dup(t, inherit(t, l))})[0]
	if got.Kind() != transport.VSock || got.Addr() != l.Addr() {
		t.Errorf("inherited %s %q, want vsock %q", got.Kind(), got.Addr(), l.Addr())
	}
}

func TestOnlyListeningStreamSocketsAreInherited(t *testing.T) {
	file, err := os.Open(os.DevNull)
	put(t, err)
	defer file.Close()
	for _, tt := range []struct {
		name string
		fd   func() int
		want string
	}{
		{"file", func() int { return dup(t, file) }, "not a socket"},
		{"closed", func() int { return 1 << 20 }, "bad file descriptor"},
		{"not listening", func() int { return sock(t, unix.AF_UNIX, unix.SOCK_STREAM) }, "not a listening"},
		{"datagram", func() int { return sock(t, unix.AF_INET, unix.SOCK_DGRAM) }, "not a stream"},
		{"packets", func() int { return sock(t, unix.AF_UNIX, unix.SOCK_SEQPACKET) }, "not a stream"},
		{"netlink", func() int { return sock(t, unix.AF_NETLINK, unix.SOCK_RAW) }, "address family"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fd := tt.fd()
			defer unix.Close(fd)
			_, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.FD, FD: fd})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one that says %q", err, tt.want)
			}
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil && tt.name != "closed" {
				t.Errorf("refused descriptor: %v, want it open", err)
			}
		})
	}
}

func sock(t *testing.T, domain, typ int) int {
	t.Helper()
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	put(t, err)
	return fd
}

// childActivated prints what Activated finds, twice, and greets one client of
// each listener.
func childActivated() error {
	// systemd forks, so it knows the pid; os/exec does not.
	if os.Getenv("LISTEN_PID") == "self" {
		os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ls, err := transport.Activated()
	if err != nil {
		return err
	}
	again, err := transport.Activated()
	if len(again) != 0 || err != nil {
		return fmt.Errorf("second call: %d listeners, %v", len(again), err)
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "LISTEN_") {
			return fmt.Errorf("variable %s is still set", v)
		}
	}
	for _, l := range ls {
		fmt.Println(l.Kind(), transport.NameOf(l))
	}
	for _, l := range ls {
		if l.Kind() == transport.VSock {
			continue
		}
		c, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, "hello"); err != nil {
			return err
		}
		c.Close()
	}
	return nil
}

func TestActivatedSocketsKeepOrderAndNames(t *testing.T) {
	t.Run("tcp and unix", func(t *testing.T) { activate(t, false) })
	t.Run("and vsock", func(t *testing.T) { activate(t, true) })
}

// activate hands listening sockets to a child as systemd would.
func activate(t *testing.T, guests bool) {
	u, _ := listenUnix(t)
	tcp := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	files, names, want := []*os.File{inherit(t, tcp), inherit(t, u)}, "net:local", "tcp net\nunix local\n"
	if guests {
		files = append(files, inherit(t, listenVSock(t)))
		names, want = names+":guests", want+"vsock guests\n"
	}
	cmd := child(t, "activated")
	cmd.Env = append(cmd.Env, "LISTEN_PID=self", fmt.Sprint("LISTEN_FDS=", len(files)), "LISTEN_FDNAMES="+names)
	cmd.ExtraFiles = files
	var out strings.Builder
	cmd.Stdout = &out
	put(t, cmd.Start())
	for _, l := range []transport.Listener{tcp, u} {
		c, err := transport.Dial(t.Context(), targetOf(t, l))
		put(t, err)
		put(t, c.SetReadDeadline(time.Now().Add(30*time.Second)))
		got, err := io.ReadAll(c)
		if string(got) != "hello" || err != nil {
			t.Errorf("read from the child over %s: %q, %v", l.Kind(), got, err)
		}
		c.Close()
	}
	if err := cmd.Wait(); err != nil || out.String() != want {
		t.Errorf("child got\n%sand %v, want\n%s", out.String(), err, want)
	}
}

func TestActivationOfAnotherProcessIsIgnored(t *testing.T) {
	for _, env := range [][]string{
		{"LISTEN_PID=1", "LISTEN_FDS=1"},
		{"LISTEN_FDS=1"},
		{"LISTEN_PID=self", "LISTEN_FDS=0"},
		{"LISTEN_PID=self"},
		{"LISTEN_PID=self", "LISTEN_FDS=many"},
	} {
		cmd := child(t, "activated")
		cmd.Env = append(cmd.Env, env...)
		if out, err := cmd.Output(); err != nil || len(out) != 0 {
			t.Errorf("%v: child got %q, %v; want nothing", env, out, err)
		}
	}
}

func TestActivationRefusesOtherDescriptors(t *testing.T) {
	null, err := os.Open(os.DevNull)
	put(t, err)
	defer null.Close()
	u, _ := listenUnix(t)
	cmd := child(t, "activated")
	cmd.Env = append(cmd.Env, "LISTEN_PID=self", "LISTEN_FDS=2", "LISTEN_FDNAMES=good:odd")
	cmd.ExtraFiles = []*os.File{inherit(t, u), null}
	var msg strings.Builder
	cmd.Stderr = &msg
	if err := cmd.Run(); err == nil || !strings.Contains(msg.String(), `"odd": not a socket`) {
		t.Errorf("child ended with %v and %q", err, msg.String())
	}
}

// childStdio echoes its standard input, prints, and says who the peer is.
func childStdio() error {
	c, err := transport.OpenStdio()
	if err != nil {
		return err
	}
	fmt.Println("this must not get into the stream")
	fmt.Fprintf(c, "%s %v\n", c.Peer().Kind, c.Raw() != nil)
	if _, err := io.Copy(c, c); err != nil {
		return err
	}
	return errors.Join(c.CloseWrite(), c.Close())
}

func TestStdioOverPipes(t *testing.T) {
	cmd := child(t, "stdio")
	cmd.Stdin = strings.NewReader("ping")
	out, err := cmd.Output()
	if want := "stdio false\nping"; err != nil || string(out) != want {
		t.Errorf("child answered %q, %v; want %q", out, err, want)
	}
}

func TestStdioOverOneSocket(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	put(t, err)
	theirs, ours := os.NewFile(uintptr(fds[0]), "theirs"), os.NewFile(uintptr(fds[1]), "ours")
	defer ours.Close()
	cmd := child(t, "stdio")
	cmd.Stdin, cmd.Stdout = theirs, theirs
	put(t, cmd.Start())
	theirs.Close()
	conn, err := net.FileConn(ours)
	put(t, err)
	defer conn.Close()
	io.WriteString(conn, "ping")
	conn.(*net.UnixConn).CloseWrite()
	out, err := io.ReadAll(conn)
	if want := "unix true\nping"; err != nil || string(out) != want {
		t.Errorf("child answered %q, %v; want %q", out, err, want)
	}
	put(t, cmd.Wait())
}

func TestStdioRefusesOtherFiles(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	put(t, err)
	defer null.Close()
	l, _ := listenUnix(t)
	for name, in := range map[string]*os.File{"null": null, "listening socket": inherit(t, l)} {
		cmd := child(t, "stdio")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, in, nil
		if err := cmd.Run(); err == nil {
			t.Errorf("child served on %s", name)
		}
	}
}

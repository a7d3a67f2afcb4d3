package transport_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

func TestUnixConnectionKnowsItsPeer(t *testing.T) {
	l, path := listenUnix(t)
	if l.Kind() != transport.Unix || l.Addr() != path {
		t.Errorf("listener is %s at %q, want unix at %q", l.Kind(), l.Addr(), path)
	}
	s, c := connect(t, l)
	p := s.Peer()
	if p.Kind != transport.Unix || p.UID != uint32(os.Getuid()) || p.GID != uint32(os.Getgid()) || p.PID != int32(os.Getpid()) {
		t.Errorf("peer is %+v, want this process", *p)
	}
	if p.Cert != nil {
		t.Error("peer has a certificate without TLS")
	}
	talk(t, s, c)
}

func TestUnixPeerOfAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
	path := filepath.Join(publicDir(t), "s")
	l := listen(t, transport.Endpoint{Kind: transport.Unix, Path: path, Mode: 0o666})[0]
	cmd := child(t, "dial", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65533, Groups: []uint32{7, 65532}}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := accept(t, l)
	s.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("client: %v", err)
	}
	p := s.Peer()
	if p.UID != 65534 || p.GID != 65533 || p.PID != int32(cmd.Process.Pid) {
		t.Errorf("peer is %+v, want uid 65534, gid 65533, pid %d", *p, cmd.Process.Pid)
	}
	if want := []uint32{7, 65532}; !slices.Equal(p.Groups, want) {
		t.Errorf("supplementary groups: got %v, want %v", p.Groups, want)
	}
	if p.Key() != "uid:65534" {
		t.Errorf("key is %q", p.Key())
	}
	if want := fmt.Sprintf("uid:65534,pid:%d", cmd.Process.Pid); p.Guest() != want {
		t.Errorf("guest is %q, want %q", p.Guest(), want)
	}
}

// TestGuestIsNamedByTheBestThatIsKnown: one address, or one user, may be that of
// many.
func TestGuestIsNamedByTheBestThatIsKnown(t *testing.T) {
	key := transport.Peer{Kind: transport.TCP, Addr: "192.0.2.1:7"}
	psk, cert, other := key, key, key
	psk.PSK = "vm1"
	cert.Cert = &x509.Certificate{RawSubject: []byte("vm1")}
	other.Addr = "192.0.2.1:8"
	names := map[string]bool{}
	for _, p := range []transport.Peer{key, psk, cert, {Kind: transport.VSock, CID: 3}, {Kind: transport.VSock, CID: 4}} {
		names[p.Guest()] = true
	}
	if len(names) != 5 || key.Guest() != other.Guest() {
		t.Errorf("five guests have %d names: %v; the other port is %q", len(names), names, other.Guest())
	}
}

func TestUnixModeKeepsOtherUsersOut(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become another user")
	}
	path := filepath.Join(publicDir(t), "s")
	listen(t, transport.Endpoint{Kind: transport.Unix, Path: path})
	cmd := child(t, "dial", path)
	cmd.Stderr = nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := cmd.Run(); err == nil {
		t.Error("another user connected to a socket of mode 0600")
	}
}

func TestUnixModeAndOwnerAreAsAsked(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	owner := &transport.Owner{UID: -1, GID: -1}
	if os.Getuid() == 0 {
		owner = &transport.Owner{UID: 65534, GID: -1}
	}
	path := filepath.Join(t.TempDir(), "s")
	listen(t, transport.Endpoint{Kind: transport.Unix, Path: path, Mode: 0o666, Owner: owner})
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode != unix.S_IFSOCK|0o666 {
		t.Errorf("mode is %#o, want a socket of 0666", st.Mode)
	}
	if owner.UID >= 0 && (st.Uid != 65534 || st.Gid != uint32(os.Getgid())) {
		t.Errorf("owner is %d:%d, want 65534:%d", st.Uid, st.Gid, os.Getgid())
	}
}

// TestStartNeverOpensTheSocketWider starts many servers under umask 0 while
// clients connect and look at the file's mode all the time.
func TestStartNeverOpensTheSocketWider(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	defer syscall.Umask(syscall.Umask(0))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	watch := func(look func() error) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := look(); err != nil {
					t.Error(err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	watch(func() error {
		fi, err := os.Lstat(path)
		if err == nil && fi.Mode().Perm() != 0o600 {
			return fmt.Errorf("mode was %v between bind and listen", fi.Mode())
		}
		return nil
	})
	watch(func() error {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c.Close()
		}
		for _, ok := range []error{unix.ENOENT, unix.ECONNREFUSED, unix.ECONNRESET, unix.EAGAIN} {
			if errors.Is(err, ok) {
				return nil
			}
		}
		return fmt.Errorf("connect while servers start: %w", err)
	})
	for range 1000 {
		ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.Unix, Path: path})
		if err != nil {
			t.Errorf("start: %v", err)
			break
		}
		if err := ls[0].Close(); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
	close(stop)
	wg.Wait()
}

// TestOneOfManyStartersWins has processes' worth of starters find the same
// stale socket: exactly one may replace it.
func TestOneOfManyStartersWins(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 20 {
		stale(t, path)
		const starters = 8
		got := make(chan transport.Listener, starters)
		var wg sync.WaitGroup
		for range starters {
			wg.Go(func() {
				ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.Unix, Path: path})
				if err == nil {
					got <- ls[0]
				} else if !errors.Is(err, unix.EADDRINUSE) {
					t.Errorf("loser got %v, want %v", err, unix.EADDRINUSE)
				}
			})
		}
		wg.Wait()
		close(got)
		n := 0
		for l := range got {
			connect(t, l)
			l.Close()
			n++
		}
		if n != 1 {
			t.Fatalf("%d of %d starters listen, want 1", n, starters)
		}
	}
}

// TestStrangerWithTheLockStopsNobody: whoever may read the directory can hold its
// lock. Sockets are made in spite of it, and removed without waiting for it.
func TestStrangerWithTheLockStopsNobody(t *testing.T) {
	dir := t.TempDir()
	path := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	var ls []transport.Listener
	for i := range 20 {
		ls = append(ls, listen(t, transport.Endpoint{Kind: transport.Unix, Path: path(i)})...)
	}
	stranger, err := os.Open(dir)
	put(t, err)
	defer stranger.Close()
	put(t, unix.Flock(int(stranger.Fd()), unix.LOCK_EX))
	stale(t, path(len(ls)))
	l := listen(t, transport.Endpoint{Kind: transport.Unix, Path: path(len(ls))})[0]
	connect(t, l)
	done := make(chan error, 1)
	go func() {
		var errs []error
		for _, l := range append(ls, l) {
			errs = append(errs, l.Close())
		}
		done <- errors.Join(errs...)
	}()
	select {
	case err := <-done:
		put(t, err)
	case <-time.After(time.Minute):
		t.Fatal("closing waits for the lock")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v; want nothing", left, err)
	}
}

// TestNothingIsLeftWhereDescriptorsRunOut has one descriptor more for each
// attempt, so that each step of the start is the one that fails.
func TestNothingIsLeftWhereDescriptorsRunOut(t *testing.T) {
	if out, err := child(t, "full", filepath.Join(publicDir(t), "s")).Output(); err != nil {
		t.Errorf("child: %v\n%s", err, out)
	}
}

// childFull listens at the path of its argument, with too few descriptors at
// first.
func childFull() error {
	e := transport.Endpoint{Kind: transport.Unix, Path: os.Args[1]}
	warm, err := transport.Listen(context.Background(), e) // what the runtime opens once
	if err != nil {
		return err
	}
	if err := warm[0].Close(); err != nil {
		return err
	}
	first, err := unix.Dup(0)
	if err != nil {
		return err
	}
	unix.Close(first)
	var most syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &most); err != nil {
		return err
	}
	for spare := range 32 {
		few := syscall.Rlimit{Cur: uint64(first + spare), Max: most.Max}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
			return err
		}
		ls, err := transport.Listen(context.Background(), e)
		switch {
		case err == nil && spare == 0:
			return errors.New("listening needs no descriptor")
		case err == nil:
			return ls[0].Close()
		case !errors.Is(err, unix.EMFILE):
			return fmt.Errorf("with %d descriptors: %w", spare, err)
		}
		if _, err := os.Lstat(e.Path); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("after a start with %d descriptors: %v, want no file", spare, err)
		}
	}
	return errors.New("listening needs more than 31 descriptors")
}

// stale leaves a socket under path that nobody listens on.
func stale(t *testing.T, path string) {
	t.Helper()
	bindOnly(t, path, unix.SOCK_STREAM)()
}

// bindOnly binds a socket to path and returns what closes it.
func bindOnly(t *testing.T, path string, typ int) func() {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Close(fd) }
}

func TestWhatLiesUnderThePath(t *testing.T) {
	live := func(t *testing.T, path string) { listen(t, transport.Endpoint{Kind: transport.Unix, Path: path}) }
	full := func(t *testing.T, path string) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	for _, tt := range []struct {
		name string
		put  func(t *testing.T, path string)
		want string // part of the refusal, or "" if the server starts
	}{
		{"nothing", func(*testing.T, string) {}, ""},
		{"stale socket", stale, ""},
		{"live server", live, "a server answers"},
		{"live server with a full queue", full, "a server answers"},
		{"datagram socket", func(t *testing.T, path string) {
			t.Cleanup(bindOnly(t, path, unix.SOCK_DGRAM))
		}, "in the way"},
		{"regular file", func(t *testing.T, path string) { put(t, os.WriteFile(path, []byte("data"), 0o600)) }, "a regular file"},
		{"directory", func(t *testing.T, path string) { put(t, os.Mkdir(path, 0o700)) }, "a directory"},
		{"fifo", func(t *testing.T, path string) { put(t, unix.Mkfifo(path, 0o600)) }, "a special file"},
		{"dangling symlink", func(t *testing.T, path string) { put(t, os.Symlink("nowhere", path)) }, "a symbolic link"},
		{"symlink to a stale socket", func(t *testing.T, path string) {
			stale(t, path+".real")
			put(t, os.Symlink(path+".real", path))
		}, "a symbolic link"},
		{"world-writable directory", func(t *testing.T, path string) {
			put(t, os.Chmod(filepath.Dir(path), 0o777))
		}, "writable by everybody"},
		{"sticky world-writable directory", func(t *testing.T, path string) {
			put(t, os.Chmod(filepath.Dir(path), 0o777|os.ModeSticky))
		}, ""},
		{"no directory", func(t *testing.T, path string) { put(t, os.Remove(filepath.Dir(path))) }, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			tt.put(t, path)
			before, beforeErr := os.Lstat(path)
			ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.Unix, Path: path})
			if tt.want == "" {
				if err != nil {
					t.Fatalf("start: %v", err)
				}
				connect(t, ls[0])
				ls[0].Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("start: got error %v, want one that says %q", err, tt.want)
			}
			after, afterErr := os.Lstat(path)
			if beforeErr == nil && (afterErr != nil || !os.SameFile(before, after)) {
				t.Errorf("what lay there was touched: %v", afterErr)
			}
			if beforeErr != nil && afterErr == nil {
				t.Error("a refused start left a file")
			}
		})
	}
}

func put(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestUnixPathsThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{
		"", "@abstract", dir + "/", filepath.Join(dir, strings.Repeat("x", 120)),
	} {
		if ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.Unix, Path: path}); err == nil {
			ls[0].Close()
			t.Errorf("listening on %q is possible", path)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("files were left: %v", entries)
	}
}

func TestRelativeUnixPathHasAbsoluteURI(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	l := listen(t, transport.Endpoint{Kind: transport.Unix, Path: "s"})[0]
	if got := targetOf(t, l).Path; got != filepath.Join(dir, "s") {
		t.Errorf("URI has path %q, want it below %q", got, dir)
	}
	t.Chdir("/")
	l.Close()
	if _, err := os.Lstat(filepath.Join(dir, "s")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close in another directory: %v, want no file", err)
	}
}

func TestPrivatePathIsRemovedWithItsDirectory(t *testing.T) {
	l := listen(t, transport.Endpoint{Kind: transport.Unix, Path: transport.PrivatePath})[0]
	fi, err := os.Stat(filepath.Dir(l.Addr()))
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %v, %v; want 0700", fi.Mode(), err)
	}
	connect(t, l)
	put(t, l.Close())
	if _, err := os.Stat(filepath.Dir(l.Addr())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory after Close: %v, want none", err)
	}
}

func TestCloseRemovesOnlyItsOwnSocket(t *testing.T) {
	l, path := listenUnix(t)
	put(t, os.Remove(path))
	put(t, os.WriteFile(path, []byte("other"), 0o600))
	put(t, l.Close())
	if got, err := os.ReadFile(path); string(got) != "other" {
		t.Errorf("another's file after Close: %q, %v", got, err)
	}
	l, path = listenUnix(t)
	put(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("own socket after Close: %v, want none", err)
	}
	put(t, l.Close())
}

func TestCloseFindsARenamedDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a")
	put(t, os.Mkdir(dir, 0o700))
	l := listen(t, transport.Endpoint{Kind: transport.Unix, Path: filepath.Join(dir, "s")})[0]
	put(t, os.Rename(dir, dir+"2"))
	put(t, l.Close())
	if _, err := os.Lstat(filepath.Join(dir+"2", "s")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket in the renamed directory: %v, want none", err)
	}
}

func TestLockedDirectoryIsWaitedForUntilTheContextEnds(t *testing.T) {
	dir := t.TempDir()
	d, err := os.Open(dir)
	put(t, err)
	defer d.Close()
	put(t, unix.Flock(int(d.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = transport.Listen(ctx, transport.Endpoint{Kind: transport.Unix, Path: filepath.Join(dir, "s")})
	wantErr(t, "start in a locked directory", err, context.Canceled)
}

func TestAcceptEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(l transport.Listener, cancel func())
		want []error
	}{
		{"by Close", func(l transport.Listener, _ func()) { l.Close() }, []error{net.ErrClosed}},
		{"by its context", func(_ transport.Listener, cancel func()) { cancel() }, []error{net.ErrClosed, context.Canceled}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, _ := listenUnix(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error)
			go func() {
				_, err := l.Accept(ctx)
				done <- err
			}()
			tt.end(l, cancel)
			err := <-done
			for _, want := range tt.want {
				wantErr(t, "accept", err, want)
			}
		})
	}
}

// TestAcceptsDoNotDisturbEachOther cancels one of two waiting Accepts: the
// other goes on and gets the connection.
func TestAcceptsDoNotDisturbEachOther(t *testing.T) {
	l, _ := listenUnix(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := l.Accept(ctx)
		ended <- err
	}()
	type result struct {
		c   transport.Conn
		err error
	}
	got := make(chan result)
	go func() {
		c, err := l.Accept(t.Context())
		got <- result{c, err}
	}()
	cancel()
	wantErr(t, "cancelled accept", <-ended, context.Canceled)
	c, err := transport.Dial(t.Context(), targetOf(t, l))
	put(t, err)
	defer c.Close()
	r := <-got
	if r.err != nil {
		t.Fatalf("other accept: %v", r.err)
	}
	r.c.Close()
}

// TestAcceptWithoutDescriptorsIsTemporary uses up the process's descriptors.
func TestAcceptWithoutDescriptorsIsTemporary(t *testing.T) {
	l, _ := listenUnix(t)
	c, err := transport.Dial(t.Context(), targetOf(t, l))
	put(t, err)
	defer c.Close()
	var old unix.Rlimit
	put(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	put(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}))
	_, err = l.Accept(t.Context())
	put(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old))
	wantErr(t, "accept without descriptors", err, unix.EMFILE)
	if errors.Is(err, net.ErrClosed) {
		t.Error("a lack of descriptors looks like the end")
	}
	accept(t, l)
}

func TestTCPConnectionIsTuned(t *testing.T) {
	l := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	s, c := connect(t, l)
	for _, o := range []struct {
		name             string
		level, opt, want int
	}{
		{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(limits.KeepAliveIdle / time.Second)},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(limits.KeepAliveInterval / time.Second)},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, limits.KeepAliveCount},
		{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 90000},
	} {
		for side, conn := range map[string]transport.Conn{"server": s, "client": c} {
			if got := sockopt(t, conn, o.level, o.opt); got != o.want {
				t.Errorf("%s of the %s is %d, want %d", o.name, side, got, o.want)
			}
		}
	}
	talk(t, s, c)
}

func TestKeepAliveIsConfigurable(t *testing.T) {
	for _, tt := range []struct {
		name              string
		ka                transport.KeepAlive
		on, idle, timeout int
	}{
		{"off", transport.KeepAlive{}, 0, 60, 90000},
		{"quick", transport.KeepAlive{Idle: 5 * time.Second, Interval: time.Millisecond, Count: 2}, 1, 5, 5002},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1", KeepAlive: &tt.ka})[0]
			s, _ := connect(t, l)
			got := [3]int{
				sockopt(t, s, unix.SOL_SOCKET, unix.SO_KEEPALIVE),
				sockopt(t, s, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE),
				sockopt(t, s, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT),
			}
			if got != [3]int{tt.on, tt.idle, tt.timeout} {
				t.Errorf("on, idle, timeout are %v, want %v", got, []int{tt.on, tt.idle, tt.timeout})
			}
		})
	}
}

func TestSocketBuffersAreSet(t *testing.T) {
	for _, e := range []transport.Endpoint{
		{Kind: transport.TCP, Address: "127.0.0.1"},
		{Kind: transport.Unix, Path: filepath.Join(t.TempDir(), "s")},
	} {
		e.SendBuffer, e.RecvBuffer = 50000, 60000
		s, _ := connect(t, listen(t, e)[0])
		// The kernel doubles the number for its own needs (socket(7)).
		if got := sockopt(t, s, unix.SOL_SOCKET, unix.SO_SNDBUF); got != 100000 {
			t.Errorf("%s send buffer is %d, want 100000", e.Kind, got)
		}
		if got := sockopt(t, s, unix.SOL_SOCKET, unix.SO_RCVBUF); got != 120000 {
			t.Errorf("%s receive buffer is %d, want 120000", e.Kind, got)
		}
	}
}

func TestTCPAddresses(t *testing.T) {
	v6 := ipv6Works()
	for _, tt := range []struct {
		name, address, family string
		want                  []string // hosts of the listeners
	}{
		{"v4", "127.0.0.1", "", []string{"127.0.0.1"}},
		{"mapped v4", "::ffff:127.0.0.1", "", []string{"127.0.0.1"}},
		{"v6", "::1", "", []string{"::1"}},
		{"v6 in brackets", "[::1]", "6", []string{"::1"}},
		{"all", "", "", []string{"::", "0.0.0.0"}},
		{"all v4", "", "4", []string{"0.0.0.0"}},
		{"all v6", "", "6", []string{"::"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !v6 && strings.Contains(strings.Join(tt.want, ""), ":") {
				t.Skip("no IPv6 loopback")
			}
			ls := listen(t, transport.Endpoint{Kind: transport.TCP, Address: tt.address, Family: tt.family})
			var hosts, ports []string
			for _, l := range ls {
				host, port, err := net.SplitHostPort(l.Addr())
				put(t, err)
				hosts, ports = append(hosts, host), append(ports, port)
			}
			if fmt.Sprint(hosts) != fmt.Sprint(tt.want) {
				t.Errorf("listens on %v, want %v", hosts, tt.want)
			}
			if len(ports) == 2 && ports[0] != ports[1] || ports[0] == "0" {
				t.Errorf("ports are %v, want one real port", ports)
			}
		})
	}
}

func ipv6Works() bool {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err == nil {
		l.Close()
	}
	return err == nil
}

func TestBothFamiliesAreReachedUnderOnePort(t *testing.T) {
	if !ipv6Works() {
		t.Skip("no IPv6 loopback")
	}
	ls := listen(t, transport.Endpoint{Kind: transport.TCP})
	port := targetOf(t, ls[0]).Port
	for i, address := range []string{"::1", "127.0.0.1"} {
		c, err := transport.Dial(t.Context(), transport.Target{Kind: transport.TCP, Address: address, Port: port})
		if err != nil {
			t.Fatalf("dial %s: %v", address, err)
		}
		defer c.Close()
		p := accept(t, ls[i]).Peer()
		if p.Key() != "ip:"+address {
			t.Errorf("peer that dialled %s has key %q", address, p.Key())
		}
	}
}

func TestTCPEndpointsThatCannotBe(t *testing.T) {
	taken := listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})[0]
	for name, e := range map[string]transport.Endpoint{
		"port too large":     {Port: 65536},
		"family 5":           {Family: "5"},
		"host of family 5":   {Address: "127.0.0.1", Family: "5"},
		"v6 address, -4":     {Address: "::1", Family: "4"},
		"v4 address, -6":     {Address: "127.0.0.1", Family: "6"},
		"address not here":   {Address: "192.0.2.1"},
		"port in use":        {Address: "127.0.0.1", Port: targetOf(t, taken).Port},
		"unknown zone":       {Address: "fe80::1%nosuch0"},
		"name without a dot": {Address: "no such host"},
	} {
		e.Kind = transport.TCP
		if ls, err := transport.Listen(t.Context(), e); err == nil {
			ls[0].Close()
			t.Errorf("%s: listening is possible", name)
		}
	}
	if _, err := transport.Listen(t.Context(), transport.Endpoint{Kind: "pigeon"}); err == nil {
		t.Error("a pigeon listens")
	}
}

func TestVSockListenerReportsItsPort(t *testing.T) {
	l := listenVSock(t)
	tgt := targetOf(t, l)
	if tgt.Port == 0 || tgt.Port == unix.VMADDR_PORT_ANY || tgt.CID == transport.CIDAny {
		t.Errorf("URI %q has no usable address", l.URI("", false))
	}
	if want := fmt.Sprintf("any:%d", tgt.Port); l.Addr() != want || l.Kind() != transport.VSock {
		t.Errorf("listens on %s %q, want vsock %q", l.Kind(), l.Addr(), want)
	}
}

func listenVSock(t *testing.T) transport.Listener {
	t.Helper()
	ls, err := transport.Listen(t.Context(), transport.Endpoint{Kind: transport.VSock, RecvBuffer: 1 << 20})
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Skipf("vsock: %v", err)
	}
	put(t, err)
	t.Cleanup(func() { ls[0].Close() })
	return ls[0]
}

func TestVSockConnectionKnowsItsPeer(t *testing.T) {
	l := listenVSock(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := transport.Dial(ctx, transport.Target{Kind: transport.VSock, CID: 1, Port: targetOf(t, l).Port})
	if err != nil {
		t.Skipf("vsock loopback: %v", err)
	}
	defer c.Close()
	s := accept(t, l)
	if p := s.Peer(); p.Kind != transport.VSock || p.CID != 1 || p.Key() != "cid:1" {
		t.Errorf("peer is %+v, want CID 1", *p)
	}
	talk(t, s, c)
}

package transport_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"go.uber.org/goleak"
)

// childEnv names what the re-executed test binary is to do.
const childEnv = "TRANSPORT_TEST_CHILD"

// children are the programs that tests run in a process of their own.
var children = map[string]func() error{
	"activated": childActivated,
	"passed":    childPassed,
	"dial":      childDial,
	"full":      childFull,
	"stdio":     childStdio,
}

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		if err := children[name](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	before := openFDs()
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left over:", err)
			code = 1
		}
		if after := openFDs(); after > before+1 { // the poller's own
			fmt.Fprintf(os.Stderr, "descriptors left open: %d before, %d after\n", before, after)
			code = 1
		}
	}
	os.Exit(code)
}

// openFDs counts sockets, directories and files, but not the poller's
// anonymous inodes.
func openFDs() int {
	n := 0
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && filepath.Base(to) != "fd" && to[0] != 'a' {
			n++
		}
	}
	return n
}

// child prepares the named program; its end is the test's to wait for.
func child(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(copyOfTest(t), args...)
	cmd.Env = append(os.Environ(), childEnv+"="+name, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

// copyOfTest puts the test binary where other users can run it.
func copyOfTest(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 {
		return exe
	}
	to := filepath.Join(publicDir(t), "child")
	src, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	return to
}

// publicDir is a directory that other users may pass through.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "transport")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// listen opens e and closes it when the test ends.
func listen(t *testing.T, e transport.Endpoint) []transport.Listener {
	t.Helper()
	ls, err := transport.Listen(t.Context(), e)
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	for _, l := range ls {
		t.Cleanup(func() { l.Close() })
	}
	return ls
}

// listenUnix opens a Unix socket in a directory of its own.
func listenUnix(t *testing.T) (transport.Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	return listen(t, transport.Endpoint{Kind: transport.Unix, Path: path})[0], path
}

// targetOf is where l can be reached.
func targetOf(t *testing.T, l transport.Listener) transport.Target {
	t.Helper()
	u, err := transport.ParseURI(l.URI("", false))
	if err != nil {
		t.Fatal(err)
	}
	return u.Target
}

// connect dials l and accepts, and closes both ends when the test ends.
func connect(t *testing.T, l transport.Listener) (server, client transport.Conn) {
	t.Helper()
	client, err := transport.Dial(t.Context(), targetOf(t, l))
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { client.Close() })
	return accept(t, l), client
}

func accept(t *testing.T, l transport.Listener) transport.Conn {
	t.Helper()
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatalf("accept: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// talk sends a line each way, half-closes each way, and fails unless all of
// it arrives.
func talk(t *testing.T, a, b transport.Conn) {
	t.Helper()
	for _, dir := range []struct {
		name     string
		from, to transport.Conn
	}{{"to the client", a, b}, {"to the server", b, a}} {
		sent := "hello " + dir.name
		done := make(chan error, 1)
		go func() {
			_, err := io.WriteString(dir.from, sent)
			done <- errors.Join(err, dir.from.CloseWrite())
		}()
		got, err := io.ReadAll(dir.to)
		if err != nil || string(got) != sent {
			t.Errorf("read %s: %q, %v; want %q and the end", dir.name, got, err, sent)
		}
		if err := <-done; err != nil {
			t.Errorf("write %s: %v", dir.name, err)
		}
	}
}

// wantErr fails unless err is target.
func wantErr(t *testing.T, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: got error %v, want %v", what, err, target)
	}
}

// sockopt reads an integer option of c.
func sockopt(t *testing.T, c transport.Conn, level, name int) int {
	t.Helper()
	var v int
	var err error
	cerr := c.Raw().Control(func(fd uintptr) { v, err = syscall.GetsockoptInt(int(fd), level, name) })
	if err := errors.Join(cerr, err); err != nil {
		t.Fatal(err)
	}
	return v
}

// childDial connects to the path in its argument and copies what the server
// sends to standard output.
func childDial() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := transport.Dial(ctx, transport.Target{Kind: transport.Unix, Path: os.Args[1]})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
}

var _ net.Conn = transport.Conn(nil)

package transporttest

import (
	"os"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

// Pair returns the two ends of a Unix socket pair: what Accept and Dial would
// return, without a listener. Both are closed when the test ends.
func Pair(t testing.TB) (server, client transport.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("make socket pair: %v", err)
	}
	return fileConn(t, fds[0]), fileConn(t, fds[1])
}

func fileConn(t testing.TB, fd int) transport.Conn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "pair")
	defer f.Close()
	c, err := transport.FileConn(f)
	if err != nil {
		t.Fatalf("make connection: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

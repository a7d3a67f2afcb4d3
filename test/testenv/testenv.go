// Package testenv starts the programs that the end-to-end tests and the
// benchmark compare: vmdiskd itself and the reference servers, tools named by
// the Debian package that has them, images with known contents, certificates,
// and a cache for what has to be fetched. Nothing here is used by the product.
package testenv

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

	"golang.org/x/sys/unix"
)

// Patience bounds every wait of the end-to-end tests. It is generous, because
// it only ever ends a test that has already failed.
const Patience = 2 * time.Minute

// pollEvery is the interval of Await, which watches facts that nobody
// announces: a socket that answers, a process state.
const pollEvery = 5 * time.Millisecond

// packages names the Debian package of each tool that the tests run.
var packages = map[string]string{
	"/dev/fuse":               "kernel module fuse",
	"/usr/bin/python3":        "python3",
	"apparmor_parser":         "apparmor",
	"apt-cache":               "apt",
	"apt-get":                 "apt",
	"busybox":                 "busybox-static",
	"cc":                      "gcc",
	"debugfs":                 "e2fsprogs",
	"depmod":                  "kmod",
	"dpkg":                    "dpkg",
	"e2fsck":                  "e2fsprogs",
	"fio":                     "fio",
	"fusermount3":             "fuse3",
	"ldd":                     "libc-bin",
	"libvirtd":                "libvirt-daemon",
	"mke2fs":                  "e2fsprogs",
	"mmdebstrap":              "mmdebstrap",
	"nbd-client":              "nbd-client",
	"nbdcopy":                 "libnbd-bin",
	"nbdfuse":                 "libnbd-bin",
	"nbdinfo":                 "libnbd-bin",
	"nbdkit":                  "nbdkit",
	"qemu-ga":                 "qemu-guest-agent",
	"qemu-img":                "qemu-utils",
	"qemu-io":                 "qemu-utils",
	"qemu-nbd":                "qemu-utils",
	"qemu-system-x86_64":      "qemu-system-x86",
	"setpriv":                 "util-linux",
	"sesearch":                "setools",
	"systemd-socket-activate": "systemd",
	"tar":                     "tar",
	"taskset":                 "util-linux",
	"unshare":                 "util-linux",
	"virsh":                   "libvirt-clients",
}

// sbin is searched after PATH: e2fsprogs and nbd-client live there, and an
// ordinary user's PATH lacks it.
var sbin = []string{"/usr/sbin", "/sbin"}

// Tool returns the path of a program, or an error that names the package
// which has it. A name with a slash is a file that has to exist.
func Tool(name string) (string, error) {
	if filepath.IsAbs(name) {
		if _, err := os.Stat(name); err == nil {
			return name, nil
		}
		return "", missing(name)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range sbin {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", missing(name)
}

func missing(name string) error {
	pkg := packages[name]
	if pkg == "" {
		pkg = "unknown"
	}
	return fmt.Errorf("needs %s (package %s)", name, pkg)
}

// Require skips the test, naming the first tool that is absent.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	for _, name := range tools {
		if _, err := Tool(name); err != nil {
			t.Skip(err)
		}
	}
}

// Path is Tool for a tool that the test requires.
func Path(t testing.TB, name string) string {
	t.Helper()
	path, err := Tool(name)
	if err != nil {
		t.Skip(err)
	}
	return path
}

// Context returns a context that ends with the test or after Patience.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	t.Cleanup(cancel)
	return ctx
}

// Await polls until ready holds, and returns the context's error otherwise.
func Await(ctx context.Context, ready func() bool) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// Listens says whether a server listens on the Unix socket at path. That the file is
// there says less: it is made by bind(2), and until listen(2) refuses who connects.
func Listens(path string) bool {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// Close ends what c listens for and locks, and closes it. A program that another test
// starts has a duplicate of each descriptor until it executes, by which a socket that
// is only closed goes on listening, and a file stays locked.
func Close(c io.Closer) error {
	if sc, ok := c.(syscall.Conn); ok {
		raw, err := sc.SyscallConn()
		if err != nil {
			return err
		}
		err = raw.Control(func(fd uintptr) { // of the two, one fits
			_ = unix.Shutdown(int(fd), unix.SHUT_RDWR)
			_ = unix.FcntlFlock(fd, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
		})
		if err != nil {
			return err
		}
	}
	return c.Close()
}

// Run runs a program to its end and returns its standard output. A failure of
// the program fails the test with everything that it printed.
func Run(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := Try(t, argv...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Try is Run for a program that may fail: the error holds its standard error.
func Try(t testing.TB, argv ...string) (string, error) {
	t.Helper()
	return output(Context(t), exec.CommandContext, Path(t, argv[0]), argv[1:])
}

func output(ctx context.Context, command func(context.Context, string, ...string) *exec.Cmd, path string, args []string) (string, error) {
	cmd := command(ctx, path, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err == nil {
		return string(out), nil
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(out), fmt.Errorf("%s %q: %w\n%s%s", path, args, err, out, exit.Stderr)
	}
	return string(out), fmt.Errorf("%s %q: %w", path, args, err)
}

// root is found before a test changes the folder.
var root = findRoot()

func findRoot() string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	return ""
}

// Root returns the folder of go.mod: the tests of this module run from source, in
// the folder of their package. It panics elsewhere.
func Root() string {
	if root == "" {
		panic("testenv: there is no go.mod here or above")
	}
	return root
}

// TempDir returns a short-named folder under the system's temporary one,
// removed after the test: a socket path has at most 107 bytes, and t.TempDir
// spends most of them on the test's name.
func TempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

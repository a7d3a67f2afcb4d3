package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestClosedListenerShowsNothing: also not to those who came in by it before
// and have opened no export yet.
func TestClosedListenerShowsNothing(t *testing.T) {
	t.Parallel()
	const shared = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/some\"\nexports = [\"a\"]\n"
	s := newService(t, exportA+shared)
	own := filepath.Join(s.dir, "own")
	x := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img"), Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + own}}}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
		t.Fatal(err)
	}
	at := map[*client]string{greet(t, s.dialAt("own")): "b", greet(t, s.dialAt("some")): "a"}
	for c, want := range at {
		if got := c.list(); len(got) != 1 || got[0] != want {
			t.Errorf("before: got %q, want %s", got, want)
		}
	}
	if err := s.ctl.Remove(t.Context(), "b", true, time.Minute); err != nil {
		t.Fatal(err)
	}
	s.configure(exportA)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	for c, name := range at {
		if got := c.list(); got != nil {
			t.Errorf("who came in to see %s sees %q", name, got)
		}
	}
	s.stop()
}

// TestListenersOfOneURIAreTwo: the kernel gives each its own port.
func TestListenersOfOneURIAreTwo(t *testing.T) {
	t.Parallel()
	const own = "[[export.listener]]\nuri = \"nbd://127.0.0.1:0\"\n"
	s := newService(t, exportA+own+"[[export]]\nname = \"b\"\nimage = \"8M\"\nformat = \"mem\"\n"+own)
	for name, want := range map[string]string{"a": "1048576", "b": "8388608"} {
		x, err := s.ctl.Export(t.Context(), name)
		if err != nil || len(x.URIs) != 1 {
			t.Fatalf("export %s: %q, %v; want one URI", name, x.URIs, err)
		}
		if got := s.size(strings.TrimSuffix(x.URIs[0], name)); got != want {
			t.Errorf("the default at %s: got %q, want %q", x.URIs[0], got, want)
		}
	}
	s.stop()
}

// TestOneOfTwoListenersOfAURIChanges: the other stays as it is, with its port.
func TestOneOfTwoListenersOfAURIChanges(t *testing.T) {
	t.Parallel()
	const b = "[[export]]\nname = \"b\"\nimage = \"8M\"\nformat = \"mem\"\n"
	const one, plain, ofB = "[[listener]]\nuri = \"nbd://127.0.0.1:0\"\n", "insecure-plaintext = true\n", "exports = [\"b\"]\n"
	const sizeA, sizeB = "1048576", "8388608"
	s := newService(t, exportA+b+one+one)
	was := s.tcpListeners()
	for _, tt := range []struct {
		what, conf string
		stays      []int    // of those before, by their order
		sizes      []string // of the default at those that stay, and at the others
	}{
		{"the second shows another export", one + one + ofB, []int{0, 1}, []string{sizeA, sizeB}},
		{"the second is opened again", one + one + ofB + plain, []int{0}, []string{sizeA, sizeB}},
		{"the first is opened again", one + plain + one + ofB + plain, []int{1}, []string{sizeB, sizeA}},
		{"the second goes", one + plain, []int{1}, []string{sizeA}},
		{"another comes", one + plain + one, []int{0}, []string{sizeA, sizeA}},
	} {
		if err := s.reload(exportA + b + tt.conf); err != nil {
			t.Fatalf("%s: %v", tt.what, err)
		}
		now := s.tcpListeners()
		if len(now) != len(tt.sizes) {
			t.Fatalf("%s: got %q, want %d listeners", tt.what, now, len(tt.sizes))
		}
		for i, n := range tt.stays {
			if now[i] != was[n] {
				t.Errorf("%s: got %q after %q, want number %d to stay", tt.what, now, was, n)
			}
		}
		for i, uri := range now {
			if got := s.size(uri); got != tt.sizes[i] {
				t.Errorf("%s: size at %s: got %q, want %s", tt.what, uri, got, tt.sizes[i])
			}
		}
		was = now
	}
	s.stop()
}

// tcpListeners are the addresses of the service that have a port, those first that
// have been there longer.
func (s *testService) tcpListeners() (list []string) {
	s.Helper()
	x, err := s.ctl.Status(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, uri := range x.Listeners {
		if strings.HasPrefix(uri, "nbd://") {
			list = append(list, uri)
		}
	}
	return list
}

// TestToolsListManyExports: they ask about each of them on one connection.
func TestToolsListManyExports(t *testing.T) {
	t.Parallel()
	var exports strings.Builder
	const many = 100
	for i := range many {
		fmt.Fprintf(&exports, "[[export]]\nname = \"e%d\"\nimage = \"1M\"\nformat = \"mem\"\n", i)
	}
	s := newService(t, exports.String())
	for _, argv := range [][]string{
		{"nbdinfo", "--list", s.uri("")},
		{"qemu-nbd", "-L", "-k", filepath.Join(s.dir, "nbd")},
	} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if n := strings.Count(string(out), "1048576"); err != nil || n < many {
			t.Errorf("%s: %v, %d exports, want %d\n%s", argv[0], err, n, many, out)
		}
	}
	s.stop()
}

// TestSocketsInTheWayOfAServiceThatRuns: its worker, which can connect to
// nobody, knows a stale one from a server's, again and again, and the server
// sees nothing of it.
func TestSocketsInTheWayOfAServiceThatRuns(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	own := filepath.Join(s.dir, "own")
	x := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img"), Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + own}}}
	for range 2 {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: own, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		_, err = s.ctl.Add(t.Context(), api.AddExport{Export: x})
		if err == nil || !strings.Contains(err.Error(), "a server answers there") {
			t.Errorf("beside a server: %v, want that one answers", err)
		}
		raw, err := l.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			if _, _, err := unix.Accept4(int(fd), unix.SOCK_NONBLOCK); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("accept: %v, want that nobody called", err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := testenv.Close(l); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
			t.Fatalf("in place of a stale socket: %v", err)
		}
		if got := s.size("nbd+unix:///?socket=" + own); got != "1048576" {
			t.Errorf("size: got %q", got)
		}
		if err := s.ctl.Remove(t.Context(), "b", true, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	s.stop()
}

// TestSocketThatComesLaterHasItsMode: its worker can change the mode of no path.
func TestSocketThatComesLaterHasItsMode(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	for _, mode := range []string{"", "0600", "0660", "0666"} {
		own := filepath.Join(s.dir, "own"+mode)
		x := config.Export{Name: "b" + mode, Image: "1M", Format: "mem",
			Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + own, Mode: mode}}}
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Lstat(own)
		if want := cmp.Or(mode, "0600"); err != nil || fmt.Sprintf("%04o", fi.Mode().Perm()) != want {
			t.Errorf("mode %q: got %v, %v, want %s", mode, fi.Mode(), err, want)
		}
	}
	s.stop()
}

// TestNamesOfHostsInAServiceThatRuns: its worker asks no name server, and says
// so.
func TestNamesOfHostsInAServiceThatRuns(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	for host, want := range map[string]string{"localhost": "", "vmdiskd.invalid": "operation not permitted"} {
		x := config.Export{Name: host, Image: "1M", Format: "mem"}
		x.Listeners = []config.Listener{{URI: "nbd://" + host + ":0"}}
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: x})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", host, err, want)
		}
	}
	s.stop()
}

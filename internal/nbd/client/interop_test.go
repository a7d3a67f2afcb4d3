package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// start runs a server on a socket that the test has bound, handed over as
// systemd does: a connection can be made at once and waits in its queue.
func start(t testing.TB, argv ...string) string {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("the tests need %s: %v", argv[0], err)
	}
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, argv...)...)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Start()
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", argv[0], out.String())
		}
	})
	return path
}

func connect(t testing.TB, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func open(t testing.TB, path string, o Options) *Client {
	t.Helper()
	c, err := New(context.Background(), connect(t, path), o)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// image makes a file of 4 MiB: 1 MiB of data, a hole of 1 MiB, 2 MiB of data.
func image(t testing.TB) (string, []byte) {
	t.Helper()
	want := make([]byte, 4<<20)
	for i := range want {
		if i < 1<<20 || i >= 2<<20 {
			want[i] = byte(i>>8) ^ byte(i*7) | 1
		}
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Truncate(int64(len(want)))
	f.WriteAt(want[:1<<20], 0)
	f.WriteAt(want[2<<20:], 2<<20)
	return path, want
}

func TestServersOfEveryHandshakeAreReadCorrectly(t *testing.T) {
	path, want := image(t)
	for _, tt := range []struct {
		name     string
		argv     []string
		protocol Protocol
		replies  Replies
		holes    bool
	}{
		{"nbdkit", []string{"nbdkit", "-f", "file", path}, NewstyleFixed, Structured, true},
		{"nbdkit without structured replies", []string{"nbdkit", "-f", "--no-sr", "file", path}, NewstyleFixed, Simple, false},
		{"nbdkit oldstyle", []string{"nbdkit", "-f", "-o", "file", path}, Oldstyle, Simple, false},
		{"nbdkit without handshake flags", []string{"nbdkit", "-f", "--mask-handshake=0", "file", path}, Newstyle, Simple, false},
		{"nbdkit fixed with zeroes", []string{"nbdkit", "-f", "--mask-handshake=1", "file", path}, NewstyleFixed, Structured, true},
		{"qemu-nbd", []string{"qemu-nbd", "-t", "-r", "-f", "raw", path}, NewstyleFixed, Structured, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, start(t, tt.argv...), Options{Contexts: []string{wire.ContextAllocation}})
			if c.Protocol() != tt.protocol || c.Replies() != tt.replies {
				t.Errorf("protocol %v with %v replies, want %v with %v", c.Protocol(), c.Replies(), tt.protocol, tt.replies)
			}
			if got := c.Export().Size; got != int64(len(want)) {
				t.Fatalf("size %d, want %d", got, len(want))
			}
			got := make([]byte, len(want))
			if err := c.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read of the whole disk: error %v, equal %v", err, bytes.Equal(got, want))
			}
			checkMap(t, c, tt.holes)
			if err := c.Disconnect(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func checkMap(t *testing.T, c *Client, holes bool) {
	t.Helper()
	var got []Extent
	err := c.Map(t.Context(), wire.ContextAllocation, 0, c.Export().Size, func(e Extent) bool {
		got = append(got, e)
		return true
	})
	if !holes {
		if err == nil {
			t.Errorf("map of a server without contexts: %v", got)
		}
		return
	}
	want := []Extent{{0, 1 << 20, 0}, {1 << 20, 1 << 20, 3}, {2 << 20, 2 << 20, 0}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("map %v, %v, want %v", got, err, want)
	}
}

func TestListNamesAllExports(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for i := range 300 {
		name := fmt.Sprintf("disk%03d", i)
		want = append(want, name)
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 512*(i+1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Negotiate(t.Context(), connect(t, start(t, "nbdkit", "-f", "file", "dir="+dir)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	list, err := s.List(t.Context())
	var got []string
	for _, l := range list {
		got = append(got, l.Name)
	}
	slices.Sort(got)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("list %v, %v", got, err)
	}
	if err := s.Abort(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestInfoDescribesAnExport(t *testing.T) {
	path, _ := image(t)
	sock := start(t, "qemu-nbd", "-t", "-f", "raw", "-x", "name", "-D", "a description", path)
	s, err := Negotiate(t.Context(), connect(t, sock), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	e, err := s.Info(t.Context(), "name")
	if err != nil || e.Description != "a description" || e.Size != 4<<20 || e.Blocks.Min != 1 || !e.Has(wire.SendDF) {
		t.Errorf("info %+v, %v", e, err)
	}
	contexts, err := s.ListContexts(t.Context(), "name")
	if err != nil || !slices.Contains(contexts, wire.ContextAllocation) {
		t.Errorf("contexts %q, %v", contexts, err)
	}
	var refused *OptionError
	if _, err := s.Info(t.Context(), "other"); !errors.As(err, &refused) || refused.Rep != wire.RepErrUnknown {
		t.Errorf("info of an unknown export: %v", err)
	}
	// The session has survived the refusal.
	c, err := s.Go(t.Context(), "name", nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	for _, flags := range []string{"", "--no-sr"} {
		t.Run("nbdkit "+flags, func(t *testing.T) {
			argv := []string{"nbdkit", "-f", "memory", "4M"}
			if flags != "" {
				argv = slices.Insert(argv, 1, flags)
			}
			c := open(t, start(t, argv...), Options{})
			p := bytes.Repeat([]byte("written "), 1<<17)
			must(t, c.WriteAt(t.Context(), p, 4096, wire.FlagFUA))
			must(t, c.Zero(t.Context(), 8192, 100, wire.FlagNoHole))
			must(t, c.Trim(t.Context(), 2<<20, 4096, 0))
			must(t, c.Cache(t.Context(), 0, 4096))
			must(t, c.Flush(t.Context()))
			got := make([]byte, len(p))
			must(t, c.ReadAt(t.Context(), got, 4096))
			clear(p[4096 : 4096+100])
			if !bytes.Equal(got, p) {
				t.Error("read differs from what was written")
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadErrorIsReported(t *testing.T) {
	for _, flags := range []string{"--no-fork", "--no-sr"} {
		c := open(t, start(t, "nbdkit", "-f", flags, "--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"), Options{})
		err := c.ReadAt(t.Context(), make([]byte, 4096), 0)
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, wire.EIO) || e.Cmd != wire.CmdRead {
			t.Errorf("%s: read error %v, want EIO", flags, err)
		}
		// The connection goes on.
		must(t, c.WriteAt(t.Context(), make([]byte, 512), 0, 0))
	}
}

func TestUnknownExportIsRefused(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "there"), make([]byte, 512), 0o600))
	for _, mask := range []string{"3", "0"} {
		sock := start(t, "nbdkit", "-f", "--mask-handshake="+mask, "file", "dir="+dir)
		if _, err := New(t.Context(), connect(t, sock), Options{Export: "not there"}); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("mask %s: unknown export: %v", mask, err)
		}
	}
}

func TestManyRequestsInFlight(t *testing.T) {
	path, want := image(t)
	c := open(t, start(t, "nbdkit", "-f", "--filter=delay", "file", path, "delay-read=2ms"), Options{})
	const n = 200
	errs := make(chan error, n)
	for i := range n {
		go func() {
			off := i * 20000
			got := make([]byte, 4096+i)
			err := c.ReadAt(t.Context(), got, int64(off))
			if err == nil && !bytes.Equal(got, want[off:off+len(got)]) {
				err = fmt.Errorf("bytes at %d differ", off)
			}
			errs <- err
		}()
	}
	for range n {
		must(t, <-errs)
	}
}

func TestServerDeathEndsRequests(t *testing.T) {
	c := open(t, start(t, "nbdkit", "-f", "--filter=exitlast", "--filter=delay", "memory", "1M", "delay-read=100"), Options{})
	done := make(chan error, 1)
	go func() { done <- c.ReadAt(context.Background(), make([]byte, 512), 0) }()
	c.Close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("read on a closed client: %v", err)
	}
	if err := c.Flush(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("flush on a closed client: %v", err)
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

// testService is a running service with its control socket.
type testService struct {
	*testing.T
	dir  string
	cmd  *exec.Cmd
	done chan error
	ctl  *control.Client

	// prepare, if not nil, changes the command before it is started.
	prepare func(cmd *exec.Cmd)
}

// newService starts a service whose configuration is a control socket, a
// listener and more. DIR in it is a fresh folder, the root of all images.
func newService(t *testing.T, more string) *testService {
	t.Helper()
	s := &testService{T: t, dir: t.TempDir()}
	for _, name := range []string{"a.img", "b.img"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.configure(more)
	s.start()
	return s
}

func (s *testService) configure(more string) {
	s.Helper()
	text := strings.ReplaceAll(`
[control]
socket = "DIR/control"
state = "DIR/state"
[images]
roots = ["DIR"]
[[listener]]
uri = "nbd+unix:///?socket=DIR/nbd"
`+more, "DIR", s.dir)
	err := errors.Join(os.MkdirAll(filepath.Join(s.dir, "state"), 0o700),
		os.WriteFile(filepath.Join(s.dir, "conf"), []byte(text), 0o600))
	if err != nil {
		s.Fatal(err)
	}
}

func (s *testService) start() {
	s.Helper()
	s.cmd = program("--config", filepath.Join(s.dir, "conf"), "--enable-fault-injection")
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.Fatal(err)
	}
	defer log.Close()
	s.cmd.Stderr = log
	if s.prepare != nil {
		s.prepare(s.cmd)
	}
	if err := s.cmd.Start(); err != nil {
		s.Fatal(err)
	}
	s.done = make(chan error, 1)
	go func() { s.done <- s.cmd.Wait() }()
	s.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		if s.Failed() {
			b, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			s.Logf("log:\n%s", b)
		}
	})
	s.await("the control socket answers", func() bool {
		s.ctl = control.Dial(filepath.Join(s.dir, "control"))
		_, err := s.ctl.Status(s.Context())
		return err == nil
	})
}

// stop ends the service in good order.
func (s *testService) stop() {
	s.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.Fatal(err)
	}
	select {
	case err := <-s.done:
		if err != nil {
			s.Errorf("service: %v", err)
		}
	case <-time.After(time.Minute):
		s.Fatal("the service does not end")
	}
}

func (s *testService) await(what string, f func() bool) {
	s.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			s.Fatalf("never: %s", what)
		}
	}
}

func (s *testService) uri(name string) string {
	return "nbd+unix:///" + name + "?socket=" + filepath.Join(s.dir, "nbd")
}

// size is what nbdinfo says of an export, or "" if there is none.
func (s *testService) size(uri string) string {
	out, err := exec.Command("nbdinfo", "--size", uri).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// states are the names and states of all exports.
func (s *testService) states() (list []string) {
	s.Helper()
	all, err := s.ctl.Exports(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, x := range all {
		list = append(list, x.Name+" "+x.State)
	}
	return list
}

const exportA = "[[export]]\nname = \"a\"\nimage = \"DIR/a.img\"\n"

func wantCode(t *testing.T, what string, err error, code string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("%s: got %v, want an error with code %s", what, err, code)
	}
}

// TestServiceHoldsManyExports: what is added, changed and removed concerns no
// other export.
func TestServiceHoldsManyExports(t *testing.T) {
	s := newService(t, exportA+"[[export]]\nname = \"lost\"\nimage = \"DIR/nothing\"\n")
	ctx := t.Context()
	if got := s.states(); !slices.Equal(got, []string{"a ready", "lost failed"}) {
		t.Errorf("exports at the start: got %q", got)
	}
	add := func(name, image string) error {
		_, err := s.ctl.Add(ctx, api.AddExport{Export: config.Export{Name: name, Image: image}})
		return err
	}
	if err := add("b", filepath.Join(s.dir, "b.img")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "the same name again", add("b", filepath.Join(s.dir, "b.img")), api.CodeExists)
	wantCode(t, "a place that is not allowed", add("c", "/etc/passwd"), api.CodeForbidden)
	for _, name := range []string{"a", "b"} {
		if got := s.size(s.uri(name)); got != "1048576" {
			t.Errorf("size of %s: got %q, want 1048576", name, got)
		}
	}
	x, err := s.ctl.Resize(ctx, "b", api.Resize{Size: 2 << 20})
	if err != nil || x.Size != 2<<20 || s.size(s.uri("b")) != "2097152" {
		t.Errorf("resize: got %+v, %v, and %q by nbdinfo, want 2 MiB", x, err, s.size(s.uri("b")))
	}
	if err := s.ctl.Remove(ctx, "b", false, 0); err != nil {
		t.Error(err)
	}
	if got := s.size(s.uri("b")); got != "" {
		t.Errorf("size of what was removed: got %q", got)
	}
	s.stop()
}

// TestImageComesAsDescriptor: the daemon needs no right to its path.
func TestImageComesAsDescriptor(t *testing.T) {
	s := newService(t, "")
	path := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := api.AddExport{Export: config.Export{Name: "x", Image: "fd:0"}}
	if _, err := s.ctl.Add(t.Context(), a, f); err != nil {
		t.Fatal(err)
	}
	if got := s.size(s.uri("x")); got != "4096" {
		t.Errorf("size: got %q, want 4096", got)
	}
	_, err = s.ctl.Snapshot(t.Context(), "x", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")})
	if wantCode(t, "snapshot", err, api.CodeUnsupported); err != nil && !strings.Contains(err.Error(), "descriptor") {
		t.Errorf("snapshot: got %v, want the descriptor for a reason", err)
	}
	s.stop()
}

// TestSnapshotUnderAClient: what is written before it is in the image, what is
// written after it in the overlay, and the client sees no error. The export
// comes back with the overlay, and can still be changed.
func TestSnapshotUnderAClient(t *testing.T) {
	s := newService(t, "")
	a := api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(s.dir, "top.qcow2")
	script := fmt.Sprintf(`
import nbd, subprocess
h = nbd.NBD()
h.connect_uri(%q)
h.pwrite(b"1" * 65536, 0)
subprocess.check_call(["curl", "-sSf", "--unix-socket", %q, "-d", '{"overlay": %q}', "http://x/v1/exports/a/snapshot"])
assert h.pread(65536, 0) == b"1" * 65536
h.pwrite(b"2" * 65536, 65536)
h.flush()
assert h.pread(131072, 0) == b"1" * 65536 + b"2" * 65536
`, s.uri("a"), filepath.Join(s.dir, "control"), overlay)
	if out, err := exec.Command("/usr/bin/python3", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("python3: %v\n%s", err, out)
	}
	text := "changed"
	if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{Description: &text}); err != nil {
		t.Error(err)
	}
	s.stop()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != overlay || x.Description != text {
		t.Errorf("after a restart: got %+v, %v, want the overlay", x, err)
	}
	s.stop()
	base, err := os.ReadFile(filepath.Join(s.dir, "a.img"))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(base[65535:65537]); got != "1\x00" {
		t.Errorf("image: got %q around the second write, want only the first", got)
	}
	if out, err := tool(t, s.dir, "qemu-img", "check", overlay); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
	if out, err := tool(t, s.dir, "qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x31 0 64k", "-c", "read -P 0x32 64k 64k", overlay); err != nil || strings.Contains(out, "failed") {
		t.Errorf("overlay: %v: %s", err, out)
	}
}

// TestReloadAppliesTheDifference: and none of it if a part is wrong.
func TestReloadAppliesTheDifference(t *testing.T) {
	s := newService(t, exportA)
	reload := func(more string) error {
		s.configure(more)
		_, err := s.ctl.Reload(t.Context(), false)
		return err
	}
	exportB := "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n"
	if err := reload(exportA + "description = \"new\"\n" + exportB); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Description != "new" {
		t.Errorf("a: got %+v, %v, want a new description", x, err)
	}
	wantCode(t, "an image that is not there", reload(exportA+"[[export]]\nname = \"c\"\nimage = \"DIR/no\"\n"), api.CodeInvalid)
	if got := s.states(); !slices.Equal(got, []string{"a ready", "b ready"}) {
		t.Errorf("after a reload that was refused: got %q, want a and b", got)
	}
	wantCode(t, "nonsense", reload("nonsense"), api.CodeInvalid)
	if err := reload(strings.Replace(exportA, "a.img", "b.img", 1)); err == nil {
		t.Error("an image that another export still has was opened")
	}
	s.configure(exportB)
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.await("a is gone", func() bool { return slices.Equal(s.states(), []string{"b ready"}) })
	s.stop()
}

// TestKeptExportsComeBack: also with what was changed since.
func TestKeptExportsComeBack(t *testing.T) {
	s := newService(t, "")
	ctx := t.Context()
	a := api.AddExport{Export: config.Export{Name: "k/ept", Image: filepath.Join(s.dir, "a.img")}, Persist: true}
	if _, err := s.ctl.Add(ctx, a); err != nil {
		t.Fatal(err)
	}
	text := "changed"
	if _, err := s.ctl.Patch(ctx, "k/ept", api.Patch{Description: &text}); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	if x, err := s.ctl.Export(ctx, "k/ept"); err != nil || x.Description != text || x.Origin != "state" {
		t.Errorf("got %+v, %v, want it back with its description", x, err)
	}
	if err := s.ctl.Remove(ctx, "k/ept", false, 0); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	if got := s.states(); len(got) != 0 {
		t.Errorf("after it was removed: got %q, want none", got)
	}
	s.stop()
}

// TestExportOfItsOwnListenerIsNowhereElse also takes the listener away with
// the export.
func TestExportOfItsOwnListenerIsNowhereElse(t *testing.T) {
	s := newService(t, exportA+"[[export]]\nname = \"c\"\nimage = \"8M\"\nformat = \"mem\"\n"+
		"[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/first\"\n")
	own := filepath.Join(s.dir, "own")
	x := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img"), Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + own}}}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
		t.Fatal(err)
	}
	for uri, want := range map[string]string{
		s.uri("b"): "", "nbd+unix:///?socket=" + own: "1048576", "nbd+unix:///a?socket=" + own: "",
		s.uri("c"): "", "nbd+unix:///?socket=" + filepath.Join(s.dir, "first"): "8388608",
	} {
		if got := s.size(uri); got != want {
			t.Errorf("size at %s: got %q, want %q", uri, got, want)
		}
	}
	if err := s.ctl.Remove(t.Context(), "b", true, time.Minute); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(own); !os.IsNotExist(err) {
		t.Errorf("socket of what was removed: got %v, want none", err)
	}
	s.stop()
}

// TestServiceManagerIsTold: that the service is ready, alive, reloading and
// stopping; the watchdog only hears of round trips through the engine.
func TestServiceManagerIsTold(t *testing.T) {
	dir := t.TempDir()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	t.Setenv("WATCHDOG_USEC", "100000")
	var told []string
	hear := func(want string) {
		t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		for b := make([]byte, 4096); ; {
			n, err := c.Read(b)
			if err != nil {
				t.Fatalf("never heard %s, but %q", want, told)
			}
			told = append(told, string(b[:n]))
			if strings.Contains(string(b[:n]), want) {
				return
			}
		}
	}
	s := newService(t, exportA)
	hear("READY=1")
	hear("WATCHDOG=1")
	hear("WATCHDOG=1")
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	hear("RELOADING=1")
	hear("READY=1")
	s.stop()
	hear("STOPPING=1")
}

// TestEventsTellWhatHappens: to who listens on the control socket.
func TestEventsTellWhatHappens(t *testing.T) {
	s := newService(t, exportA)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	heard := make(chan string, 100)
	go func() {
		defer close(heard)
		events, err := s.ctl.Events(ctx)
		if err != nil {
			return
		}
		for e, err := range events {
			if err != nil {
				return
			}
			heard <- strings.Join([]string{e.Kind, e.Export, e.State}, " ")
		}
	}()
	// Until the listener is there nothing is heard of clients.
	s.await("a client is heard of", func() bool { return s.size(s.uri("a")) != "" && len(heard) > 0 })
	if err := s.ctl.Remove(ctx, "a", true, time.Minute); err != nil {
		t.Fatal(err)
	}
	want := []string{"client-connected a ", "client-left a ", "export-state a draining", "export-state a closed"}
	for e := range heard {
		if e == want[0] {
			want = want[1:]
		}
		if len(want) == 0 {
			break
		}
	}
	if len(want) > 0 {
		t.Errorf("never heard: %q", want)
	}
	cancel()
	s.stop()
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// reload gives the service another configuration and has it read.
func (s *testService) reload(more string) error {
	s.Helper()
	s.configure(more)
	_, err := s.ctl.Reload(s.Context(), false)
	return err
}

// answers tells whether a Unix socket of the service does.
func (s *testService) answers(name string) bool {
	c, err := net.Dial("unix", filepath.Join(s.dir, name))
	if err != nil {
		return false
	}
	return c.Close() == nil
}

func (s *testService) wantAnswers(when string, want map[string]bool) {
	s.Helper()
	for name, want := range want {
		if got := s.answers(name); got != want {
			s.Errorf("%s: %s answers: got %t, want %t", when, name, got, want)
		}
	}
}

// unixListener is a listener of a configuration.
func unixListener(name, more string) string {
	return "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/" + name + "\"\n" + more
}

// TestFailedReloadChangesNoListener: what goes and what changes is there as it
// was, what came has gone, and the file can be mended without a restart.
func TestFailedReloadChangesNoListener(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+unixListener("one", ""))
	busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	next := exportA + unixListener("two", "") + unixListener("busy", "")
	if err := s.reload(next); err == nil {
		t.Error("a listener was opened where another server listens")
	}
	s.wantAnswers("one goes, busy cannot come", map[string]bool{"one": true, "two": false})
	if err := s.reload(exportA + unixListener("one", "owner = \"no-such-user\"\n")); err == nil {
		t.Error("a listener was given to a user that there is not")
	}
	s.wantAnswers("one cannot be changed", map[string]bool{"one": true, "nbd": true})
	if got := s.size("nbd+unix:///a?socket=" + filepath.Join(s.dir, "one")); got != "1048576" {
		t.Errorf("size at what was opened again: got %q, want 1048576", got)
	}
	if err := busy.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(next); err != nil {
		t.Errorf("when the cause is mended: %v", err)
	}
	s.wantAnswers("one has gone", map[string]bool{"one": false, "two": true, "busy": true})
	s.stop()
}

// TestExportsOfAListenerChangeInUse: the socket stays the same one.
func TestExportsOfAListenerChangeInUse(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB+unixListener("one", "exports = [\"a\"]\n"))
	path := filepath.Join(s.dir, "one")
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA + exportB + unixListener("one", "exports = [\"b\"]\n")); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("socket: got %v, %v, want the one that was there", after, err)
	}
	for name, want := range map[string]string{"a": "", "b": "1048576"} {
		if got := s.size("nbd+unix:///" + name + "?socket=" + path); got != want {
			t.Errorf("size of %s: got %q, want %q", name, got, want)
		}
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || strings.Contains(strings.Join(x.URIs, " "), path) {
		t.Errorf("a: got %+v, %v, want none of its addresses at the listener", x, err)
	}
	s.stop()
}

// TestListenerTakesTheAddressOfAnother: of one that goes, and of one whose export
// keeps it no more. If it cannot, the other stays.
func TestListenerTakesTheAddressOfAnother(t *testing.T) {
	t.Parallel()
	addr, one := tcpListener(t)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	all := "[[listener]]\nuri = \"nbd://0.0.0.0:" + port + "\"\ninsecure-plaintext = true\n"
	own := exportA + "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"
	s := newService(t, one+own)
	busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	if err := s.reload(all + own + unixListener("busy", "")); err == nil {
		t.Error("a listener was opened where another server listens")
	}
	if c, err := net.Dial("tcp", addr); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	} else {
		c.Close()
	}
	if err := s.reload(all + exportA + unixListener("own", "")); err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{"nbd://127.0.0.2:" + port + "/a", "nbd+unix:///a?socket=" + filepath.Join(s.dir, "own")} {
		if got := s.size(uri); got != "1048576" {
			t.Errorf("size at %s: got %q, want 1048576", uri, got)
		}
	}
	s.stop()
}

// hang has a client of an export that waits for a read, until it is let go.
func (s *testService) hang(name string) {
	s.Helper()
	s.setRate(name, config.Rate{Bytes: 1})
	k := s.open(name)
	for i := range uint64(2) { // the first may have what a rest has left
		k.request(wire.CmdRead, i, 0, 64<<10, nil)
	}
	s.await("the second read hangs", func() bool {
		all, err := s.ctl.Clients(s.Context(), &name)
		return err == nil && len(all) == 1 && all[0].InFlight == 1 && all[0].Requests == 2
	})
}

func (s *testService) setRate(name string, r config.Rate) {
	s.Helper()
	if _, err := s.ctl.Patch(s.Context(), name, api.Patch{Rate: &r}); err != nil {
		s.Fatal(err)
	}
}

// letGo ends what hangs: its client is leaving, and is cut off.
func (s *testService) letGo(name string) {
	s.Helper()
	all, err := s.ctl.Clients(s.Context(), &name)
	if err == nil && len(all) == 1 {
		err = s.ctl.Disconnect(s.Context(), all[0].ID)
	}
	if err != nil {
		s.Fatal(err)
	}
}

// hangingReload begins a reload that removes the export b and waits for a read of
// it, until that is let go.
func (s *testService) hangingReload() {
	s.Helper()
	s.hang("b")
	s.configure(exportA)
	s.signal(syscall.SIGHUP)
	s.await("the reload waits", func() bool { return slices.Contains(s.states(), "b draining") })
}

func (s *testService) signal(sig syscall.Signal) {
	s.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.Fatal(err)
	}
}

// hearManager notes the words of the service manager that the next service of
// the test says, in order, and returns them when that has ended.
func hearManager(t *testing.T) (end func() []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	var said []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 4096); ; {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			if word, _, ok := strings.Cut(string(b[:n]), "=1\n"); ok {
				if said = append(said, word); word == "STOPPING" {
					return
				}
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return func() []string {
		select {
		case <-done:
		case <-time.After(hangLimit):
			c.Close()
			<-done
		}
		return said
	}
}

// TestStopDoesNotWaitForAReload: the end begins while a reload waits for a
// client, and a second signal ends the service at once.
func TestStopDoesNotWaitForAReload(t *testing.T) {
	said := hearManager(t)
	s := newService(t, exportA+exportB)
	s.hangingReload()
	s.signal(syscall.SIGTERM)
	s.await("the end begins", func() bool { return !exists(filepath.Join(s.dir, "nbd")) })
	s.signal(syscall.SIGTERM)
	select {
	case <-s.done:
		if got := s.cmd.ProcessState.ExitCode(); got != 1 {
			t.Errorf("exit status: got %d, want 1", got)
		}
	case <-time.After(hangLimit):
		t.Fatal("the service does not end")
	}
	if got, want := said(), []string{"READY", "RELOADING", "STOPPING"}; !slices.Equal(got, want) {
		t.Errorf("the service manager was told %q, want %q", got, want)
	}
}

// TestReloadsTakeTurns: signals that come during a reload are one more of them.
func TestReloadsTakeTurns(t *testing.T) {
	said := hearManager(t)
	s := newService(t, exportA+exportB)
	s.hangingReload()
	s.configure(exportA + "[[export]]\nname = \"c\"\nimage = \"1M\"\nformat = \"mem\"\n")
	for range 5 {
		s.signal(syscall.SIGHUP)
	}
	s.open("a").works()
	if got := s.states(); !slices.Equal(got, []string{"a ready", "b draining"}) {
		t.Errorf("exports during the first reload: got %q", got)
	}
	s.letGo("b")
	s.await("the second reload is done", func() bool { return slices.Equal(s.states(), []string{"a ready", "c ready"}) })
	s.await("it is told", func() bool { return strings.Count(s.log(), "reloaded") == 2 })
	s.stop()
	if got, want := said(), []string{"READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING"}; !slices.Equal(got, want) {
		t.Errorf("the service manager was told %q, want %q", got, want)
	}
}

// TestVerboseLogStaysSo: a reload sets the level of the configuration only where the
// command line has not said it.
func TestVerboseLogStaysSo(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.stop()
	s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--verbose") }
	s.start()
	if err := s.reload(exportA + exportB); err != nil {
		t.Fatal(err)
	}
	before := strings.Count(s.log(), "level=DEBUG")
	s.open("b").works()
	s.await("a client is told of in full", func() bool { return strings.Count(s.log(), "level=DEBUG") > before })
	s.stop()
}

// wantReloadGauge is what the metrics say of the last reload.
func (s *testService) wantReloadGauge(when string, want float64) {
	s.Helper()
	if got := s.metric("config_last_reload_success"); got != want {
		s.Errorf("%s: the gauge of the last reload is %v, want %v", when, got, want)
	}
}

// TestFailedSignalIsAnError: it is told where only warnings are logged, too.
// The metrics tell of it until one is done; a dry run is none.
func TestFailedSignalIsAnError(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.wantReloadGauge("before any reload", 1)
	s.signal(syscall.SIGHUP)
	s.await("the signal is told", func() bool { return strings.Contains(s.log(), "msg=reloaded") })
	if log := s.log(); strings.Contains(log, "error=") {
		t.Errorf("log of a reload that was done: got an error in %q", log)
	}
	if err := s.reload(exportA + "[log]\nlevel = \"warn\"\n"); err != nil {
		t.Fatal(err)
	}
	s.configure(exportA + "[log]\nlevel = \"loud\"\n")
	s.signal(syscall.SIGHUP)
	s.await("it is told that the next one failed", func() bool {
		return strings.Contains(s.log(), "level=ERROR msg=\"not reloaded\"")
	})
	s.wantReloadGauge("after a signal that failed", 0)
	if _, err := s.ctl.Reload(t.Context(), true); err == nil {
		t.Error("a dry run with a mistake in the file was done")
	}
	s.configure(exportA)
	if _, err := s.ctl.Reload(t.Context(), true); err != nil {
		t.Error(err)
	}
	s.wantReloadGauge("after a dry run", 0)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Error(err)
	}
	s.wantReloadGauge("after a reload", 1)
	s.stop()
}

// TestReloadSaysInALineWhyItNeedsARestart, with all that changes.
func TestReloadSaysInALineWhyItNeedsARestart(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	err := s.reload(exportB + "[metrics]\nlisten = \"127.0.0.1:0\"\n")
	wantCode(t, "reload", err, api.CodeUnsupported)
	if want := `needs a restart; remove export "a"; add export "b"`; err != nil && !strings.HasSuffix(err.Error(), want) {
		t.Errorf("reload: got %q, want it to end with %q", err, want)
	}
	s.stop()
}

// leave has a caller leave while what it asked for waits for the clients of b.
func (s *testService) leave(ask func(context.Context) error) {
	s.Helper()
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	left := make(chan error, 1)
	go func() { left <- ask(ctx) }()
	s.await("b waits for its client", func() bool { return slices.Contains(s.states(), "b draining") })
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		s.Errorf("caller that left: got %v, want %v", err, context.Canceled)
	}
}

// TestReloadDoesNotEndWithItsCaller: it is done when the client has left.
func TestReloadDoesNotEndWithItsCaller(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	s.hang("b")
	s.configure(exportA + exportB + "flush-on-close = true\n")
	s.leave(func(ctx context.Context) error { _, err := s.ctl.Reload(ctx, false); return err })
	s.letGo("b")
	s.await("b is as the file says", func() bool {
		x, err := s.ctl.Export(t.Context(), "b")
		return err == nil && x.State == "ready" && x.FlushOnClose
	})
	s.open("b").reads(1)
	s.stop()
}

// TestExportWhoseClientsDoNotLeaveStays: when nobody waits any more for its end
// it is served as it was, and its overlay is not forgotten.
func TestExportWhoseClientsDoNotLeaveStays(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	overlay := filepath.Join(s.dir, "top.qcow2")
	if _, err := s.ctl.Snapshot(t.Context(), "b", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.hang("b")
	s.leave(func(ctx context.Context) error { _, err := s.ctl.Forget(ctx, "b", true, false); return err })
	s.await("b can be opened", func() bool { return !slices.Contains(s.states(), "b draining") })
	next := s.open("b")
	s.await("b can be changed", func() bool {
		_, err := s.ctl.Patch(t.Context(), "b", api.Patch{Rate: &config.Rate{}})
		return err == nil
	})
	next.reads(1)
	if x, err := s.ctl.Export(t.Context(), "b"); err != nil || x.State != "ready" || x.Image != overlay {
		t.Errorf("b: got %+v, %v, want it with its overlay", x, err)
	}
	s.stop()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "b"); err != nil || x.Image != overlay {
		t.Errorf("b after a restart: got %+v, %v, want it with its overlay", x, err)
	}
	s.stop()
}

// wantExports compares the names, states and origins of all exports.
func (s *testService) wantExports(when string, want ...string) {
	s.Helper()
	all, err := s.ctl.Exports(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	var got []string
	for _, x := range all {
		got = append(got, strings.Join([]string{x.Name, x.State, x.Origin}, " "))
	}
	if !slices.Equal(got, want) {
		s.Errorf("%s: got the exports %q, want %q", when, got, want)
	}
}

// TestReloadThatCannotBeDoneClosesNothing: neither for the image of another export
// that is missing, nor for one that is paused; and the pause goes on.
func TestReloadThatCannotBeDoneClosesNothing(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	k := s.open("a")
	image, again := filepath.Join(s.dir, "b.img"), "cache = \"none\"\n"
	if err := os.Rename(image, image+".away"); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA + again + exportB + again); err == nil {
		t.Error("an export without an image was changed")
	}
	k.reads(1)
	if err := os.Rename(image+".away", image); err != nil {
		t.Fatal(err)
	}
	if err := s.ctl.Pause(t.Context(), "b", 0); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "reload that closes a paused export", s.reload(exportA+again+exportB+again), api.CodeInUse)
	_, err := s.ctl.Reload(t.Context(), true)
	wantCode(t, "dry run of it", err, api.CodeInUse)
	k.reads(1)
	if err := s.ctl.Resume(t.Context(), "b"); err != nil {
		t.Errorf("resume: %v", err)
	}
	if err := s.reload(exportA + again + exportB + again); err != nil {
		t.Error(err)
	}
	s.wantExports("after all", "a ready config", "b ready config")
	s.stop()
}

// TestImageMovesWhileItIsServed: the configuration follows it.
func TestImageMovesWhileItIsServed(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	k := s.open("a")
	k.request(wire.CmdWrite, 1, 0, 4096, bytes.Repeat([]byte{7}, 4096))
	if e, _ := k.reply(); e != wire.OK {
		t.Fatalf("write: %v", e)
	}
	if err := os.Rename(filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "moved.img")); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(strings.Replace(exportA, "a.img", "moved.img", 1)); err != nil {
		t.Fatal(err)
	}
	k = s.open("a")
	k.request(wire.CmdRead, 1, 0, 1, nil)
	if e, _ := k.reply(); e != wire.OK || k.read(1)[0] != 7 {
		t.Errorf("read: %v, or other bytes than were written", e)
	}
	s.stop()
}

// TestImageThatMovedComesBack: a reload that follows it and fails, before or after
// the export is open again, has the file served that was, with nothing at its old
// path or another file.
func TestImageThatMovedComesBack(t *testing.T) {
	t.Parallel()
	for _, fails := range []struct{ what, more, listener string }{
		{"as it cannot be opened", "window = { offset = \"1G\" }\n", "goes"},
		{"at a listener after it", "", "busy"},
	} {
		for _, format := range []string{"raw", "qcow2"} {
			for _, other := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %s, another file %t", fails.what, format, other), func(t *testing.T) {
					t.Parallel()
					comesBackMoved(t, format, fails.more, fails.listener, other)
				})
			}
		}
	}
}

// comesBackMoved is that of an image which moves, under a reload that fails by what
// more there is of its export or by a listener. other puts another file at its path.
func comesBackMoved(t *testing.T, format, more, listener string, other bool) {
	s := newService(t, unixListener("goes", ""))
	busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	conf := func(dir string) string {
		return "[[export]]\nname = \"a\"\nimage = \"DIR/" + dir + "/image\"\nformat = \"" + format + "\"\n"
	}
	from, to := filepath.Join(s.dir, "old"), filepath.Join(s.dir, "new")
	create := func(dir string) {
		t.Helper()
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := tool(t, dir, "qemu-img", "create", "-q", "-f", format, "image", "1M"); err != nil {
			t.Fatal(err, out)
		}
	}
	create(from)
	if err := s.reload(conf("old") + unixListener("goes", "")); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x31", "0")
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	if other {
		create(from)
	}
	if err := s.reload(conf("new") + more + unixListener(listener, "")); err == nil {
		t.Error("the reload did not fail")
	}
	s.wantExports("after the reload that failed", "a ready config")
	s.wantBytes("a", "0x31", "0")
	s.write("a", "0x32", "64k")
	if err := s.reload(conf("new") + unixListener("goes", "")); err != nil {
		t.Errorf("the next reload: %v", err)
	}
	s.wantBytes("a", "0x32", "64k")
	s.stop()
}

// forgetful are exports called a whose writes are in no file of theirs, with more keys.
var forgetful = map[string]func(more string) string{
	"an overlay":                    func(more string) string { return exportA + more + overlayTable },
	"an overlay of a chain":         func(more string) string { return exportChain + more + overlayTable },
	"memory":                        func(more string) string { return memExport("a", "1M", more) },
	"an overlay, of memory as well": func(more string) string { return memExport("a", "1M", more+overlayTable) },
}

const (
	overlayTable = "[export.overlay]\nquota = \"1M\"\n"
	exportChain  = "[[export]]\nname = \"a\"\nimage = \"DIR/top.qcow2\"\nformat = \"qcow2\"\nbacking = \"same-dir\"\n"
)

// newForgetful is a service with exports called a and b, of which conf makes the first.
func newForgetful(t *testing.T, conf func(more string) string) *testService {
	t.Helper()
	s := newService(t, "")
	if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "raw", "top.qcow2"); err != nil {
		t.Fatal(err, out)
	}
	if err := s.reload(conf("") + exportB); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x41", "0")
	return s
}

// TestReloadThatFailsForgetsNoWrites: of an export that was closed for it, whether it
// fails before that is open again or later; nor what was written meanwhile.
func TestReloadThatFailsForgetsNoWrites(t *testing.T) {
	t.Parallel()
	for what, conf := range forgetful {
		for why, more := range map[string]string{
			"another cannot be opened":  anew + exportB + "window = { offset = \"2M\" }\n",
			"it cannot be opened":       anew + "window = { offset = \"2M\" }\n" + exportB,
			"a listener cannot be made": anew + exportB + unixListener("busy", ""),
		} {
			t.Run(what+", "+why, func(t *testing.T) {
				t.Parallel()
				s := newForgetful(t, conf)
				busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
				if err != nil {
					t.Fatal(err)
				}
				defer busy.Close()
				own, more, _ := strings.Cut(more, exportB)
				for range 2 {
					if err := s.reload(conf(own) + exportB + more); err == nil {
						t.Error("the reload did not fail")
					}
					s.wantExports("after the reload that failed", "a ready config", "b ready config")
					s.wantBytes("a", "0x41", "0")
				}
				s.stop()
			})
		}
	}
}

// TestReloadForgetsWritesOnlyWithTheirDisk: they outlast that the export is closed for
// other keys, also with another quota, and not that it shows another part of the image,
// or another image.
func TestReloadForgetsWritesOnlyWithTheirDisk(t *testing.T) {
	t.Parallel()
	for what, conf := range forgetful {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newForgetful(t, conf)
			wants := func(conf, first, second string) {
				t.Helper()
				if err := s.reload(conf + exportB); err != nil {
					t.Fatal(err)
				}
				s.wantBytes("a", first, "0")
				s.wantBytes("a", second, "64k")
				s.write("a", "0x42", "64k")
			}
			wants(conf(anew), "0x41", "0")
			wants(strings.Replace(conf(anew), "quota = \"1M\"", "quota = \"2M\"", 1), "0x41", "0x42")
			wants(conf(""), "0x41", "0x42")
			const window = "window = { offset = \"512K\" }\n"
			wants(conf(window), "0", "0")
			for _, name := range []string{"a.img", "top.qcow2"} {
				path := filepath.Join(s.dir, name)
				b, err := os.ReadFile(path)
				if err := errors.Join(err, os.WriteFile(path+".new", b, 0o600), os.Rename(path+".new", path)); err != nil {
					t.Fatal(err)
				}
			}
			wants(strings.Replace(conf(window+anew), "1M\"\nformat", "2M\"\nformat", 1), "0", "0")
			s.stop()
		})
	}
}

// TestFailedExportComesBackAsNoOther: one that has failed while it was open has no
// file any more, and stays failed when a reload that follows its image fails.
func TestFailedExportComesBackAsNoOther(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	lock := s.deny("a.img")
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")}); err == nil {
		t.Fatal("a snapshot of an image that another locks was made")
	}
	image := filepath.Join(s.dir, "a.img")
	err := errors.Join(testenv.Close(lock), os.Rename(image, filepath.Join(s.dir, "c.img")), os.WriteFile(image, make([]byte, 4096), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	moved := strings.Replace(exportA, "a.img", "c.img", 1)
	if err := s.reload(moved + "window = { offset = \"1G\" }\n"); err == nil {
		t.Error("the reload did not fail")
	}
	s.wantExports("after the reload that failed", "a failed config")
	if err := s.reload(moved); err != nil {
		t.Errorf("the next reload: %v", err)
	}
	if got := s.size(s.uri("a")); got != "1048576" {
		t.Errorf("size after the next reload: got %q, want 1048576", got)
	}
	s.stop()
}

const exportLost = "[[export]]\nname = \"lost\"\nimage = \"DIR/lost.img\"\n"

// wantTried is a reload, or a dry run of one, that only tries an export again, and
// what it says of that.
func (s *testService) wantTried(when string, done bool, want string) {
	s.Helper()
	r, err := s.ctl.Reload(s.Context(), !done)
	if err != nil || !slices.Equal(r.Changes, []string{want}) {
		s.Errorf("reload %s, done %t: got %q, %v, want %q", when, done, r.Changes, err, want)
	}
}

// TestFailedExportsComeBack: one that is changed and fails again is still known,
// and each reload tries it, whether it is changed or not, and tells
// what has come of it.
func TestFailedExportsComeBack(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportLost)
	image := filepath.Join(s.dir, "lost.img")
	if err := s.reload(exportA + exportLost + "cache = \"none\"\n"); err == nil {
		t.Error("an export without an image was changed")
	}
	s.wantExports("after a reload that failed", "a ready config", "lost failed config")
	if got := s.metric(`export_info{export="lost",state="failed"}`); got != 1 {
		t.Errorf("metrics: lost failed: got %v, want 1", got)
	}
	if x, err := s.ctl.Status(t.Context()); err != nil || x.Exports != 2 {
		t.Errorf("status: got %d exports, %v, want 2", x.Exports, err)
	}
	if err := s.reload(exportA + exportLost + "description = \"new\"\n"); err != nil {
		t.Errorf("a change of what does not concern the image: %v", err)
	}
	if x, err := s.ctl.Export(t.Context(), "lost"); err != nil || x.Description != "new" || x.State != "failed" {
		t.Errorf("lost: got %+v, %v, want it failed with its description", x, err)
	}
	events, err := s.ctl.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.wantTried("while the image is missing", false, `try export "lost" again`)
	fails := fmt.Sprintf(`export "lost" still fails: open image %s: no such file or directory`, image)
	s.wantTried("while the image is missing", true, fails)
	for e, err := range events {
		if err == nil && e.Kind != "reloaded" {
			continue
		}
		if err != nil || e.Text != fails {
			t.Errorf("event: got %q, %v, want %q", e.Text, err, fails)
		}
		break
	}
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	s.wantTried("when the image is there", false, `try export "lost" again`)
	s.wantTried("when the image is there", true, `export "lost" is open`)
	s.wantExports("when the image is there", "a ready config", "lost ready config")
	if got := s.size(s.uri("lost")); got != "4096" {
		t.Errorf("size: got %q, want 4096", got)
	}
	if r, err := s.ctl.Reload(t.Context(), false); err != nil || len(r.Changes) > 0 {
		t.Errorf("when all are open: got %q, %v, want no changes", r.Changes, err)
	}
	s.stop()
}

// TestLockedImageIsTriedAgain: the export is there soon after the program has gone
// that had its image, without a reload, and held up no other.
func TestLockedImageIsTriedAgain(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	s.stop()
	other := s.deny("a.img")
	s.start()
	if got := s.states(); slices.Contains(got, "a ready") || !slices.Contains(got, "b ready") {
		t.Errorf("while the image of a is locked: got %q, want b ready alone", got)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	s.await("a is ready", func() bool { return slices.Contains(s.states(), "a ready") })
	s.stop()
}

// TestReloadOpensWhatHasFailedWhileItWasOpen when a key of it changes, whichever,
// and changes the others. While its image is locked that fails, as for any export.
func TestReloadOpensWhatHasFailedWhileItWasOpen(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	const new = "description = \"new\"\n"
	lock := s.deny("a.img")
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")}); err == nil {
		t.Fatal("a snapshot of an image that another locks was made")
	}
	s.configure(exportA + new + exportB + new)
	r, err := s.ctl.Reload(t.Context(), true)
	if want := []string{`change export "a": description (is closed and opened again)`, `change export "b": description`}; err != nil || !slices.Equal(r.Changes, want) {
		t.Errorf("dry run: got %q, %v, want %q", r.Changes, err, want)
	}
	if _, err := s.ctl.Reload(t.Context(), false); err == nil || !strings.Contains(err.Error(), "image is in use") {
		t.Errorf("reload while the image is locked: got %v, want it to be in use", err)
	}
	s.wantExports("while the image is locked", "a failed config", "b ready config")
	if err := testenv.Close(lock); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Errorf("reload: %v", err)
	}
	s.wantExports("after the reload", "a ready config", "b ready config")
	for _, name := range []string{"a", "b"} {
		if x, err := s.ctl.Export(t.Context(), name); err != nil || x.Description != "new" || x.Error != "" {
			t.Errorf("got %+v, %v, want it with its description", x, err)
		}
	}
	s.open("a").reads(1)
	s.stop()
}

// TestReloadTouchesNoExportOfTheAPI, also if it has taken the name of one of the
// configuration.
func TestReloadTouchesNoExportOfTheAPI(t *testing.T) {
	t.Parallel()
	s := newService(t, exportLost)
	if err := s.ctl.Remove(t.Context(), "lost", false, 0); err != nil {
		t.Fatal(err)
	}
	x := config.Export{Name: "lost", Image: filepath.Join(s.dir, "a.img")}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
		t.Fatal(err)
	}
	reader := s.open("lost")
	for _, more := range []string{"description = \"new\"\n", "cache = \"none\"\n", "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"} {
		s.configure(exportLost + more)
		for _, dry := range []bool{true, false} {
			_, err := s.ctl.Reload(t.Context(), dry)
			wantCode(t, fmt.Sprintf("a change of what has another's name, dry run %t, by %q", dry, more), err, api.CodeExists)
		}
	}
	if err := s.reload(""); err != nil {
		t.Error(err)
	}
	s.wantExports("when the configuration drops its own", "lost ready api")
	if x, err := s.ctl.Export(t.Context(), "lost"); err != nil || x.Description != "" {
		t.Errorf("got %+v, %v, want no description", x, err)
	}
	reader.reads(1)
	s.stop()
}

// TestReloadKeepsWhatWasSet: until it finds that very key changed, whether the export
// stays open for what it changes or not.
func TestReloadKeepsWhatWasSet(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	yes, most, cid, text := true, 3, []config.Grant{{Access: "rw", CIDs: []uint32{7}}}, "set"
	rate := config.Rate{Ops: 1000}
	p := api.Patch{ReadOnly: &yes, Connections: &most, Grants: &cid, TrustCID: &yes, Rate: &rate, Description: &text}
	if _, err := s.ctl.Patch(t.Context(), "a", p); err != nil {
		t.Fatal(err)
	}
	own := "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"
	var file string
	for _, step := range []struct{ more, description string }{
		{"log-requests = true\n", text},
		{"description = \"of the file\"\n", "of the file"},
		{"cache = \"none\"\n", "of the file"},
		{own, "of the file"},
	} {
		file += step.more
		if err := s.reload(exportA + file); err != nil {
			t.Fatalf("%s: %v", step.more, err)
		}
		x, err := s.ctl.Export(t.Context(), "a")
		got := api.Patch{ReadOnly: &x.ReadOnly, Connections: &x.Connections, Grants: &x.Grants, TrustCID: &x.TrustCID, Rate: x.Rate, Description: &x.Description}
		p.Description = &step.description
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("after a change of %s: got %+v, %v, want what was set and the description %q", step.more, x, err, step.description)
		}
		if got := s.size(s.uri("a")); got != "" {
			t.Errorf("after a change of %s: everybody has access", step.more)
		}
	}
	s.stop()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.ReadOnly || x.Grants != nil || x.Rate != nil {
		t.Errorf("after a restart: got %+v, %v, want what the file says", x, err)
	}
	s.stop()
}

// TestReadOnlyThatWasSetCanBeTakenBack, also when a reload has closed the export and
// opened it again, as it shall be or as it was.
func TestReadOnlyThatWasSetCanBeTakenBack(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	set := func(on bool) {
		t.Helper()
		if x, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &on}); err != nil || x.Writable == on {
			t.Errorf("read-only is set to %t: got %+v, %v", on, x, err)
		}
	}
	const direct = "cache = \"none\"\n"
	for _, step := range []struct {
		what, a, b string
		locked     bool // b, so that it cannot be opened again
	}{
		{"another key", direct, "", false},
		{"a window that the image has not", direct + "window = { offset = \"1G\" }\n", "", false},
		{"a change of another that fails later", "", direct, true},
	} {
		set(true)
		if step.locked {
			defer s.deny("b.img").Close()
		}
		err := s.reload(exportA + step.a + exportB + step.b)
		if fails := step.what != "another key"; (err != nil) != fails {
			t.Errorf("%s: got %v, want an error %t", step.what, err, fails)
		}
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || !x.ReadOnly || x.Writable || x.Cache != "none" {
			t.Errorf("%s: got %+v, %v, want it read-only, past the cache of the host", step.what, x, err)
		}
		k := s.open("a")
		k.request(wire.CmdWrite, 7, 0, 4096, make([]byte, 4096))
		if e, _ := k.reply(); e != wire.EPERM {
			t.Errorf("%s: write got %v, want %v", step.what, e, wire.EPERM)
		}
		k.disconnect()
		set(false)
		s.write("a", "0x31", "0")
	}
	s.stop()
}

// TestRemovedExportOfTheConfigurationIsAway: until a reload finds a key of it
// changed, or one of its listeners, and says that it is added.
func TestRemovedExportOfTheConfigurationIsAway(t *testing.T) {
	t.Parallel()
	own := "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"
	for _, more := range []string{"description = \"new\"\n", "cache = \"none\"\n", own} {
		s := newService(t, exportA+exportB)
		if err := s.ctl.Remove(t.Context(), "b", false, 0); err != nil {
			t.Fatal(err)
		}
		if x, err := s.ctl.Status(t.Context()); err != nil || !strings.Contains(x.Notes["export b"], "removed") {
			t.Errorf("status: got notes %q, %v, want that b was removed", x.Notes, err)
		}
		if err := s.reload(exportA + "description = \"new\"\n" + exportB); err != nil {
			t.Error(err)
		}
		s.wantExports("when another is changed", "a ready config")
		s.configure(exportA + exportB + more)
		for _, dry := range []bool{true, false} {
			r, err := s.ctl.Reload(t.Context(), dry)
			if err != nil || !slices.Contains(r.Changes, `add export "b"`) {
				t.Errorf("reload with %s: got %q, %v, want that b is added", more, r.Changes, err)
			}
		}
		s.wantExports("when it is changed", "a ready config", "b ready config")
		if x, err := s.ctl.Status(t.Context()); err != nil || len(x.Notes) > 0 {
			t.Errorf("status: got notes %q, %v, want none", x.Notes, err)
		}
		s.stop()
	}
}

// TestStatusTellsWhoHasAConfiguredName: another export was added by the name of
// one that was removed.
func TestStatusTellsWhoHasAConfiguredName(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+exportB)
	if err := s.ctl.Remove(t.Context(), "b", false, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img")}}); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Status(t.Context()); err != nil || !strings.Contains(x.Notes["export b"], "another was added") {
		t.Errorf("got notes %q, %v, want that another export has the name", x.Notes, err)
	}
	s.stop()
}

// TestRateGroupOfAnExportChangesInUse: into a group whose second write waits for
// more than an hour, and out of it.
func TestRateGroupOfAnExportChangesInUse(t *testing.T) {
	t.Parallel()
	const still, quick = "[rate-group.g]\nwrite-bytes = 1\n", "[rate-group.g]\nwrite-bytes = \"1G\"\n"
	s := newService(t, still+exportA)
	k := s.open("a")
	write := func(cookie uint64) { k.request(wire.CmdWrite, cookie, 0, 4096, make([]byte, 4096)) }
	answered := func(want uint64) {
		t.Helper()
		if e, got := k.reply(); e != wire.OK || got != want {
			t.Fatalf("got %v for %d, want OK for %d", e, got, want)
		}
	}
	for cookie := range uint64(3) {
		write(1000 + cookie)
		answered(1000 + cookie)
	}
	if err := s.reload(still + exportA + "rate-group = \"g\"\n"); err != nil {
		t.Fatal(err)
	}
	write(2000)
	answered(2000)
	write(2001)
	k.reads(100) // nothing else is answered meanwhile
	text := "new"
	if x, err := s.ctl.Patch(t.Context(), "a", api.Patch{Description: &text}); err != nil || x.RateGroup != "g" {
		t.Errorf("patch: got %+v, %v, want it in its group", x, err)
	}
	write(2002)
	k.reads(100)
	if err := s.reload(still + exportA); err != nil {
		t.Fatal(err)
	}
	write(3000)
	answered(3000)
	if err := s.reload(quick + exportA); err != nil { // those that wait are let go
		t.Fatal(err)
	}
	got := map[uint64]wire.Errno{}
	for range 2 {
		e, cookie := k.reply()
		got[cookie] = e
	}
	if want := map[uint64]wire.Errno{2001: wire.OK, 2002: wire.OK}; !maps.Equal(got, want) {
		t.Errorf("those that waited: got %v, want %v", got, want)
	}
	s.stop()
}

// TestRateGroupInUseStays: a reload that removes the group of an export of the
// API is refused whole. Those of the configuration leave theirs with it.
func TestRateGroupInUseStays(t *testing.T) {
	t.Parallel()
	const group = "[rate-group.g]\nops = 1000\n"
	s := newService(t, group+exportA+"rate-group = \"g\"\n")
	kept := config.Export{Name: "k", Image: filepath.Join(s.dir, "b.img"), RateGroup: "g"}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: kept, Persist: true}); err != nil {
		t.Fatal(err)
	}
	err := s.reload(exportA + "description = \"new\"\n")
	wantCode(t, "a reload without the group of k", err, api.CodeInUse)
	if err != nil && !strings.Contains(err.Error(), `export "k"`) {
		t.Errorf("got %q, want the export named", err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.RateGroup != "g" || x.Description != "" {
		t.Errorf("a: got %+v, %v, want it as it was", x, err)
	}
	if _, err := s.ctl.Reload(t.Context(), true); err == nil {
		t.Error("a dry run does not tell")
	}
	s.stop()
	s.configure(group + exportA)
	s.start()
	s.wantExports("after a restart", "a ready config", "k ready state")
	if err := s.ctl.Remove(t.Context(), "k", true, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA); err != nil {
		t.Errorf("when k has gone: %v", err)
	}
	s.stop()
}

// TestListenerIsTheSameHoweverItIsSpelt: it can be changed and removed after a
// reload in which its address was written in another way.
func TestListenerIsTheSameHoweverItIsSpelt(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+unixListener("one", ""))
	path := filepath.Join(s.dir, "one")
	again := func(more string) string {
		return strings.Replace(unixListener("one", more), "nbd+unix:///?", "NBD+UNIX://?", 1)
	}
	for _, tt := range []struct {
		conf string
		mode os.FileMode
	}{
		{exportA + "flush-on-close = true\n" + again(""), 0o600},
		{exportA + again("mode = \"0660\"\n"), 0o660},
		{exportA + unixListener("one", "mode = \"0640\"\n"), 0o640},
	} {
		if err := s.reload(tt.conf); err != nil {
			t.Errorf("with mode %v: %v", tt.mode, err)
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != tt.mode {
			t.Errorf("socket: got %v, %v, want the mode %v", fi, err, tt.mode)
		}
	}
	if err := s.reload(exportA); err != nil || exists(path) {
		t.Errorf("when it goes: %v, and the socket is there: %t", err, exists(path))
	}
	s.stop()
}

// TestFailedExportKeepsWrites that are in no file, when it cannot be opened again as it
// was: until it is opened, whatever fails in between, or removed. Nobody else writes to
// the image below meanwhile.
func TestFailedExportKeepsWrites(t *testing.T) {
	t.Parallel()
	const remembered = "an overlay of that of a snapshot"
	all := maps.Clone(forgetful)
	all[remembered] = forgetful["an overlay"]
	for what, conf := range all {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, "")
			if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "raw", "top.qcow2"); err != nil {
				t.Fatal(err, out)
			}
			if what == remembered {
				if err := s.reload(exportA); err != nil {
					t.Fatal(err)
				}
				if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "over.qcow2")}); err != nil {
					t.Fatal(err)
				}
			}
			own := func(more, socket string) string {
				return conf(more) + "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/" + socket + "\"\n"
			}
			uri := func(socket string) string { return "nbd+unix:///a?socket=" + filepath.Join(s.dir, socket) }
			if err := s.reload(own("", "one") + exportZ); err != nil {
				t.Fatal(err)
			}
			if out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write -P 0x41 0 64k", "-c", "flush", uri("one")); err != nil {
				t.Fatal(err, out)
			}
			occupy := func(name string) (leave func()) {
				l, err := net.Listen("unix", filepath.Join(s.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				return func() { l.Close() }
			}
			wantKept := func(when string) {
				t.Helper()
				if strings.Contains(what, "memory") {
					return
				}
				if out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write -P 0x77 0 64k", "a.img"); err == nil || !strings.Contains(out, "lock") {
					t.Errorf("%s: another program writes to the image: %v %s", when, err, out)
				}
			}
			var leave func()
			// It is closed by then: its socket is free, and another program has it.
			fails := own(anew, "two") + exportZ + "window = { offset = \"2M\" }\n"
			if err := s.meanwhile(fails, func() { leave = occupy("one") }); err == nil {
				t.Fatal("the reload did not fail")
			}
			s.await("a has failed", func() bool { return slices.Contains(s.states(), "a failed") })
			wantKept("when it has failed")
			if err := s.reload(own("", "one") + exportZ); err != nil { // it is tried again
				t.Errorf("a reload while the socket is taken: %v", err)
			}
			s.await("a fails still", func() bool { return slices.Contains(s.states(), "a failed") })
			if err := s.reload(own(anew, "one") + exportZ); err == nil {
				t.Error("a reload that changes it while the socket is taken was done")
			}
			wantKept("when it has failed again")
			leave()
			if err := s.reload(fails); err == nil {
				t.Error("a reload that opens it and fails later was done")
			}
			wantKept("when it was opened and closed again")
			if err := s.reload(own(anew, "one") + exportZ + unixListener("none/there", "")); err == nil {
				t.Error("a reload with a listener that cannot be made was done")
			}
			if err := s.reload(own("", "one") + exportZ); err != nil {
				t.Errorf("the last reload: %v", err)
			}
			s.await("a is ready", func() bool { return slices.Contains(s.states(), "a ready") })
			if out, err := tool(t, s.dir, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x41 0 64k", uri("one")); err != nil || strings.Contains(out, "Pattern") {
				t.Errorf("what was written is not there: %v %s", err, out)
			}
			s.stop()
		})
	}
}

// atSocket is what conf makes of a with more keys, at a socket of its own, and export z.
func atSocket(conf func(more string) string, more, socket string) string {
	return conf(more) + "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/" + socket + "\"\n" + exportZ
}

// failInAReload has a reload that fails close a, which conf makes and which has the socket
// one, and another program take that socket, so that a cannot come back.
func (s *testService) failInAReload(conf func(more string) string) {
	s.Helper()
	var other net.Listener
	err := s.meanwhile(atSocket(conf, anew, "two")+"window = { offset = \"2M\" }\n", func() {
		var err error
		if other, err = net.Listen("unix", filepath.Join(s.dir, "one")); err != nil {
			s.Fatal(err)
		}
	})
	if err == nil {
		s.Fatal("the reload did not fail")
	}
	if got := s.states(); !slices.Contains(got, "a failed") {
		s.Fatalf("states: got %q, want a failed", got)
	}
	if err := other.Close(); err != nil {
		s.Fatal(err)
	}
}

// TestFailedExportShowsAnotherStoreWhenTheReloadIsDone: clients of one that holds what was
// written before find it then, and not before. What they write would be lost, or spoil
// the image below what it holds, if the reload could not be done.
func TestFailedExportShowsAnotherStoreWhenTheReloadIsDone(t *testing.T) {
	t.Parallel()
	for what, after := range map[string]string{"an overlay": exportA + "format = \"raw\"\n", "memory": memExport("a", "2M", "")} {
		for _, done := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, done %t", what, done), func(t *testing.T) {
				t.Parallel()
				s, before := newService(t, ""), forgetful[what]
				other := func(more string) string { return after + more }
				uri := func(socket string) string { return "nbd+unix:///a?socket=" + filepath.Join(s.dir, socket) }
				if err := s.reload(atSocket(before, "", "one")); err != nil {
					t.Fatal(err)
				}
				if !s.tryToWrite(uri("one"), "0x41", "0") {
					t.Fatal("a cannot be opened")
				}
				s.failInAReload(before)
				conf := atSocket(other, "", "three") + anew
				if !done {
					conf = atSocket(other, "", "three") + "window = { offset = \"2M\" }\n"
				}
				if err := s.meanwhile(conf, func() {
					if s.tryToWrite(uri("three"), "0x77", "128k") {
						t.Error("a can be opened before the reload is over")
					}
				}); (err == nil) != done {
					t.Errorf("reload: got %v, want it done %t", err, done)
				}
				if done {
					if !s.tryToWrite(uri("three"), "0x77", "128k") {
						t.Error("a cannot be opened when the reload is done")
					}
					s.stop()
					return
				}
				if err := s.reload(atSocket(before, "", "one")); err != nil {
					t.Fatal(err)
				}
				out, err := tool(t, s.dir, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x41 0 64k", "-c", "read -P 0 128k 64k", uri("one"))
				if err != nil || strings.Contains(out, "Pattern") {
					t.Errorf("a is not what it was: %v %s", err, out)
				}
				s.stop()
			})
		}
	}
}

// TestFailedExportKeepsWhatWasSet until a reload finds that very key changed, whether
// another key changes with it or not: it comes back open to nobody else.
func TestFailedExportKeepsWhatWasSet(t *testing.T) {
	t.Parallel()
	for what, more := range map[string]string{"nothing changes": "", "keys change in use": "description = \"of the file\"\n", "others too": "description = \"of the file\"\n" + anew} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s, conf := newService(t, ""), func(more string) string { return exportA + more }
			if err := s.reload(atSocket(conf, "", "one")); err != nil {
				t.Fatal(err)
			}
			yes, no, text, nobody := true, false, "set", []config.Grant{{Access: "rw", UIDs: []uint32{4242}}}
			if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &yes, Grants: &nobody, Description: &text}); err != nil {
				t.Fatal(err)
			}
			s.failInAReload(conf)
			if err := s.reload(atSocket(conf, more, "one")); err != nil {
				t.Fatal(err)
			}
			if more != "" {
				text = "of the file"
			}
			x, err := s.ctl.Export(t.Context(), "a")
			if err != nil || x.State != "ready" || !x.ReadOnly || x.Writable || !reflect.DeepEqual(x.Grants, nobody) || x.Description != text {
				t.Errorf("got %+v, %v, want it ready, what was set and the description %q", x, err, text)
			}
			if got := s.size("nbd+unix:///a?socket=" + filepath.Join(s.dir, "one")); got != "" {
				t.Errorf("everybody has access, and finds %s bytes", got)
			}
			if x, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &no}); err != nil || !x.Writable {
				t.Errorf("read-only is taken back: got %+v, %v", x, err)
			}
			s.stop()
		})
	}
}

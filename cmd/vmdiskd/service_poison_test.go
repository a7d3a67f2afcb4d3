package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// exportQ is of an image that poison can damage.
const exportQ = "[[export]]\nname = \"q\"\nformat = \"qcow2\"\nimage = \"DIR/q.qcow2\"\n"

// poison damages an image of testenv.SparseQcow2 which an export serves, and has a
// client find that: the export takes no more writes.
func (s *testService) poison(name, image string) {
	s.Helper()
	testenv.SpoilQcow2(s, image)
	_, _ = tool(s.T, s.dir, "qemu-io", "-f", "raw", "-c", "write 2G 64k", s.uri(name)) // it fails, or opening the disk does
	s.await("the export is poisoned", func() bool { return slices.Contains(s.states(), name+" poisoned") })
}

// TestExportThatTakesNoMoreWritesIsNotWell: all who ask are told, until the image is
// repaired and opened anew; what can be read is.
func TestExportThatTakesNoMoreWritesIsNotWell(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	served := filepath.Join(s.dir, "q.qcow2")
	testenv.SparseQcow2(t, served)
	if err := s.reload(exportA + exportQ); err != nil {
		t.Fatal(err)
	}
	if got := s.metric(`export_poisoned{export="q"}`); got != 0 {
		t.Errorf("before: the gauge is %v, want 0", got)
	}
	sound, err := os.ReadFile(served)
	if err != nil {
		t.Fatal(err)
	}
	s.poison("q", served)
	s.await("the gauge tells it", func() bool { return s.metric(`export_poisoned{export="q"}`) == 1 })
	if got := s.states(); !slices.Equal(got, []string{"a ready", "q poisoned"}) {
		t.Errorf("states: %q", got)
	}
	x, err := s.ctl.Export(t.Context(), "q")
	if err != nil || x.Writable || x.Size != 4<<30 || !strings.Contains(x.Error, "damaged") {
		t.Errorf("export: got %+v, %v, want it without writes, with its size and the reason", x, err)
	}
	if st, err := s.ctl.Status(t.Context()); err != nil || !strings.Contains(st.Notes["export q"], "takes no more writes") || st.Notes["export a"] != "" {
		t.Errorf("status: got the notes %q, %v", st.Notes, err)
	}
	if got := s.metric(`export_writable{export="q"}`); got != 0 {
		t.Errorf("metrics: writable is %v, want 0", got)
	}
	s.wantLogged("msg=\"export takes no more writes")
	s.wantBytes("q", "0xcd", "0")

	if err := s.ctl.Remove(t.Context(), "q", true, 0); err != nil { // that it cannot be flushed is known
		t.Error(err)
	}
	if err := os.WriteFile(served, sound, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA + exportQ + "description = \"repaired\"\n"); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Export(t.Context(), "q"); err != nil || x.State != "ready" || !x.Writable || x.Error != "" {
		t.Errorf("when it is repaired: got %+v, %v, want it ready", x, err)
	}
	s.stop()
}

// TestPoisonedExportIsRemoved like any other: that it could not be flushed is known.
func TestPoisonedExportIsRemoved(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image := filepath.Join(s.dir, "q.qcow2")
	testenv.SparseQcow2(t, image)
	a := api.AddExport{Export: config.Export{Name: "q", Format: "qcow2", Image: image}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	s.poison("q", image)
	if err := s.ctl.Remove(t.Context(), "q", false, 0); err != nil {
		t.Errorf("remove: %v", err)
	}
	if states, files := s.states(), s.kept(); len(states)+len(files) != 0 {
		t.Errorf("afterwards: got %q and %q, want nothing", states, files)
	}
	s.wantLogged("msg=\"export was closed without its last writes")
	s.stop()
}

// TestPoisonedExportBecomesReadOnlyByAReload: what can be read stays so.
func TestPoisonedExportBecomesReadOnlyByAReload(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image := filepath.Join(s.dir, "q.qcow2")
	testenv.SparseQcow2(t, image)
	if err := s.reload(exportQ); err != nil {
		t.Fatal(err)
	}
	s.poison("q", image)
	if err := s.reload(exportQ + "readonly = true\n"); err != nil {
		t.Errorf("reload: %v", err)
	}
	if got := s.states(); !slices.Equal(got, []string{"q ready"}) {
		t.Errorf("states: got %q, want it ready", got)
	}
	s.wantBytes("q", "0xcd", "0")
	s.stop()
}

// TestPoisonedOverlayIsForgotten, and the export serves what the file names.
func TestPoisonedOverlayIsForgotten(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image, overlay := filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "top.qcow2")
	if err := os.Truncate(image, 4<<30); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA + "format = \"raw\"\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x31", "2G")
	s.stop()
	s.start() // it has not looked at 2 GiB
	s.poison("a", overlay)
	if _, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil {
		t.Errorf("forget: %v", err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || x.Image != image {
		t.Errorf("afterwards: got %+v, %v, want %s", x, err, image)
	}
	s.wantBytes("a", "0", "2G")
	s.stop()
}

// newThin is a service with an export called a of a volume, of that format, that has
// less storage than it promises: of what the page cache takes most is lost. It
// returns the configuration of the export, with more keys. It ends with the test.
func newThin(t *testing.T, format string) (s *testService, conf func(more string) string) {
	t.Helper()
	s = &testService{T: t, dir: t.TempDir()}
	volume := filepath.Join(backingtest.Tmpfs(t, 2<<20), "volume")
	if err := errors.Join(os.WriteFile(volume, nil, 0o600), os.Truncate(volume, 64<<20)); err != nil {
		t.Fatal(err)
	}
	node := backingtest.Loop(t, volume, 512)
	if format == "qcow2" {
		if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", node, "32M"); err != nil {
			t.Fatal(err, out)
		}
	}
	conf = func(more string) string {
		return fmt.Sprintf("[[export]]\nname = \"a\"\nimage = %q\nformat = %q\n%s", node, format, more)
	}
	s.reconfigure(conf(""))
	s.start()
	t.Cleanup(func() { // before the volume goes
		_ = s.cmd.Process.Kill()
		<-s.done
	})
	return s, conf
}

// reconfigure is configure with the devices of the host among the images.
func (s *testService) reconfigure(more string) {
	s.Helper()
	s.configure(more)
	s.rewrite(`roots = ["`+s.dir+`"]`, `roots = ["`+s.dir+`", "/dev"]`)
}

// lose has a client write what the volume of newThin has no storage for.
func (s *testService) lose() {
	s.Helper()
	k, block := s.open("a"), bytes.Repeat([]byte{0x55}, 1<<20)
	for i := range uint64(16) {
		k.request(wire.CmdWrite, i, i<<20, uint64(len(block)), block)
		if e, _ := k.reply(); e != wire.OK {
			s.Fatalf("write %d: %v", i, e)
		}
	}
}

// wantLost fails the test unless the export called a says that a write was lost, and
// takes no more, nor a flush, of a client that comes now.
func (s *testService) wantLost(when string) {
	s.Helper()
	x, err := s.ctl.Export(s.Context(), "a")
	if err != nil || x.State != "poisoned" || x.Writable || !strings.Contains(x.Error, "an earlier write was lost") {
		s.Errorf("%s: got state %q, writable %t, %q, %v, want it poisoned", when, x.State, x.Writable, x.Error, err)
	}
	k := s.open("a")
	k.request(wire.CmdWrite, 1, 0, 512, make([]byte, 512))
	if e, _ := k.reply(); e != wire.EIO {
		s.Errorf("%s: write: got %v, want %v", when, e, wire.EIO)
	}
	k.request(wire.CmdFlush, 2, 0, 0, nil)
	if e, _ := k.reply(); e != wire.EIO {
		s.Errorf("%s: flush: got %v, want %v", when, e, wire.EIO)
	}
	k.reads(1)
}

// TestReloadForgetsNoLostWrite, whether it was lost before, or when the reload closed
// the image, and whether the reload is done: a flush that says later that all is there
// would be a lie. Who removes the export and adds it again has a new one.
func TestReloadForgetsNoLostWrite(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"raw", "qcow2"} {
		for _, before := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, lost before %t", format, before), func(t *testing.T) {
				t.Parallel()
				s, conf := newThin(t, format)
				s.lose()
				reload := func(more string) error {
					s.reconfigure(conf(more))
					_, err := s.ctl.Reload(t.Context(), false)
					return err
				}
				if before {
					k := s.open("a")
					k.request(wire.CmdFlush, 1, 0, 0, nil)
					if e, _ := k.reply(); e != wire.EIO {
						t.Fatalf("flush: got %v, want %v", e, wire.EIO)
					}
					s.wantLost("before the reload")
				}
				if err := reload(anew + "window = { offset = \"1T\" }\n"); err == nil {
					t.Error("the reload was done")
				}
				s.wantLost("after a reload that failed")
				if err := reload(anew); err != nil {
					t.Errorf("the next reload: %v", err)
				}
				s.wantLost("after a reload that was done")
				if err := reload("readonly = true\n"); err != nil {
					t.Errorf("the reload to what is read-only: %v", err)
				}
				s.wantExports("read-only", "a ready config")
				if err := reload(""); err != nil {
					t.Errorf("the reload back: %v", err)
				}
				s.wantLost("after it was read-only")
				if err := s.ctl.Remove(t.Context(), "a", true, 0); err != nil {
					t.Errorf("remove: %v", err)
				}
				if err := reload("description = \"checked\"\n"); err != nil {
					t.Error(err)
				}
				s.wantExports("when it was removed and added", "a ready config")
			})
		}
	}
}

// TestFailedExportForgetsNoLostWrite when its device is named by another node: one that
// a reload has closed and could not open again takes no writes when it is opened.
func TestFailedExportForgetsNoLostWrite(t *testing.T) {
	t.Parallel()
	for _, node := range []string{"the same node", "another node"} {
		t.Run(node, func(t *testing.T) {
			t.Parallel()
			s, conf := newThin(t, "raw")
			own := func(more, socket string) string {
				return conf(more) + "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/" + socket + "\"\n"
			}
			reload := func(conf string) error {
				s.reconfigure(conf)
				_, err := control.Dial(filepath.Join(s.dir, "control")).Reload(t.Context(), false)
				return err
			}
			s.lose()
			k := s.open("a")
			k.request(wire.CmdFlush, 1, 0, 0, nil)
			if e, _ := k.reply(); e != wire.EIO {
				t.Fatalf("flush: got %v, want %v", e, wire.EIO)
			}
			k.Close()
			if err := reload(own("", "one") + exportZ); err != nil {
				t.Fatal(err)
			}
			s.hang("z")
			refused := make(chan error, 1)
			go func() { refused <- reload(own(anew, "two") + exportZ + "window = { offset = \"2M\" }\n") }()
			s.await("the reload waits", func() bool { return slices.Contains(s.states(), "z draining") })
			l, err := net.Listen("unix", filepath.Join(s.dir, "one")) // it is closed by then
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s.letGo("z")
			if err := <-refused; err == nil {
				t.Fatal("the reload did not fail")
			}
			s.await("a has failed", func() bool { return slices.Contains(s.states(), "a failed") })
			next := conf("")
			if node == "another node" {
				next = s.renode(next)
			}
			if err := reload(next + exportZ); err != nil {
				t.Errorf("the next reload: %v", err)
			}
			s.wantLost("when it is opened again")
		})
	}
}

// renode is the configuration of newThin with another node of the same device.
func (s *testService) renode(conf string) string {
	s.Helper()
	_, rest, _ := strings.Cut(conf, "image = \"")
	old, _, _ := strings.Cut(rest, "\"")
	var st unix.Stat_t
	other := filepath.Join(s.dir, "volume")
	if err := errors.Join(unix.Stat(old, &st), unix.Mknod(other, unix.S_IFBLK|0o600, int(st.Rdev))); err != nil {
		s.Fatal(err)
	}
	return strings.Replace(conf, old, other, 1)
}

// TestFailedExportServesTheFileThatReplacesItsOwn: that a write to the one was lost says
// nothing of the other.
func TestFailedExportServesTheFileThatReplacesItsOwn(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	served := filepath.Join(s.dir, "q.qcow2")
	testenv.SparseQcow2(t, served)
	sound, err := os.ReadFile(served)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportQ); err != nil {
		t.Fatal(err)
	}
	s.poison("q", served)
	if err := s.reload(exportQ + anew); err == nil {
		t.Error("the reload opened an image that is marked corrupt")
	}
	if got := s.states(); !slices.Equal(got, []string{"q failed"}) {
		t.Errorf("after the reload: got %q, want it failed", got)
	}
	if err := errors.Join(os.WriteFile(served+".new", sound, 0o600), os.Rename(served+".new", served)); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportQ); err != nil {
		t.Errorf("the next reload: %v", err)
	}
	if x, err := s.ctl.Export(t.Context(), "q"); err != nil || x.State != "ready" || !x.Writable {
		t.Errorf("with another file at its path: got %+v, %v, want it ready", x, err)
	}
	s.stop()
}

// TestReloadTellsOfWritesThatAreLostAtTheEnd of an export that it removes: that cannot
// be taken back, and is in its answer, in its event and in the log.
func TestReloadTellsOfWritesThatAreLostAtTheEnd(t *testing.T) {
	t.Parallel()
	s, _ := newThin(t, "raw")
	s.lose()
	events, err := s.ctl.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.reconfigure("")
	r, err := s.ctl.Reload(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	const want = `export "a" is removed, but what was written to it last may be lost: flush`
	if len(r.Changes) != 2 || r.Changes[0] != `remove export "a"` || !strings.HasPrefix(r.Changes[1], want) {
		t.Errorf("reload: got %q, want the removal and %q", r.Changes, want)
	}
	for e, err := range events {
		if err == nil && e.Kind != "reloaded" {
			continue
		}
		if err != nil || !strings.Contains(e.Text, want) {
			t.Errorf("event: got %q, %v, want %q", e.Text, err, want)
		}
		break
	}
	s.wantLogged("msg=\"export was not removed in good order")
	s.wantExports("afterwards")
}

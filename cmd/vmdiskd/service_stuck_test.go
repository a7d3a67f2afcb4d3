package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// stuck is a client of the export slow with requests that wait, for minutes.
func (s *testService) stuck() *client {
	s.Helper()
	c := s.open("slow")
	for i := range uint64(40) {
		c.request(wire.CmdRead, i, 0, 1<<20, nil)
	}
	s.await("requests wait", func() bool {
		list, err := s.ctl.Clients(s.Context(), nil)
		return err == nil && len(list) == 1 && list[0].InFlight >= 10
	})
	return c
}

// slow is an export whose requests wait long.
const slow = "[[export]]\nname = \"slow\"\nimage = \"64M\"\nformat = \"mem\"\n[export.rate]\nbytes = \"64K\"\n"

// TestForceCutsOffWhoWaits: requests that wait for their turn do not keep an
// export from being removed, nor a client from being disconnected.
func TestForceCutsOffWhoWaits(t *testing.T) {
	t.Parallel()
	s := newService(t, slow)
	c := s.stuck()
	list, err := s.ctl.Clients(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.ctl.Disconnect(t.Context(), list[0].ID); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("who was disconnected twice: %v, want the end", err)
	}
	s.stuck()
	if err := s.ctl.Remove(t.Context(), "slow", true, time.Nanosecond); err != nil {
		t.Errorf("remove by force: %v", err)
	}
	s.stop()
}

// TestForceRemovesWhatHangs, and says that it could not flush.
func TestForceRemovesWhatHangs(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"[[export.fault]]\ndelay = \"10m\"\n")
	s.open("a").request(wire.CmdWrite, 1, 0, 512, make([]byte, 512))
	s.await("it hangs", func() bool {
		list, err := s.ctl.Clients(t.Context(), nil)
		return err == nil && len(list) == 1 && list[0].InFlight == 1
	})
	if err := s.ctl.Remove(t.Context(), "a", true, time.Millisecond); err == nil {
		t.Error("an export that cannot be flushed was removed in good order")
	}
	if got := s.states(); len(got) != 0 {
		t.Errorf("left are %q", got)
	}
	s.stop()
}

// atTop puts a line of the configuration before its tables.
func (s *testService) atTop(line string) {
	s.Helper()
	conf := filepath.Join(s.dir, "conf")
	text, err := os.ReadFile(conf)
	if err == nil {
		err = os.WriteFile(conf, append([]byte(line), text...), 0o600)
	}
	if err != nil {
		s.Fatal(err)
	}
}

// TestStuckGuestLosesNobodysData: a guest that does not let the service end in
// good order is no reason not to flush the disks of others.
func TestStuckGuestLosesNobodysData(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(s.dir, "q"), "1M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, out)
	}
	s.stop()
	s.configure("[[export]]\nname = \"q\"\nimage = \"DIR/q\"\nformat = \"qcow2\"\n" + slow)
	s.atTop("drain-timeout = \"100ms\"\n")
	s.start()
	s.stuck()
	c := s.open("q")
	c.request(wire.CmdWrite, 1, 0, 65536, bytes.Repeat([]byte{'z'}, 65536))
	if e, _ := c.reply(); e != wire.OK {
		t.Fatalf("write: %v", e)
	}
	c.disconnect()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.done; err == nil {
		t.Error("a service that gave up requests ends as if it had not")
	}
	out, err := exec.Command("qemu-io", "-r", "-c", "read -P 0x7a 0 64k", filepath.Join(s.dir, "q")).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("what the other guest wrote: %v\n%s", err, out)
	}
}

// TestPauseHoldsUpNoEnd: neither that of an export nor that of the service. A
// removal that is refused ends no pause.
func TestPauseHoldsUpNoEnd(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n")
	for _, name := range []string{"a", "b"} {
		if err := s.ctl.Pause(t.Context(), name, 5*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	k := s.open("a")
	wantCode(t, "remove of an export in use", s.ctl.Remove(t.Context(), "a", false, time.Minute), api.CodeInUse)
	s.wantExports("after that", "a paused config", "b paused config")
	if got := s.metric(`export_info{export="a",state="paused"}`); got != 1 {
		s.Errorf("the metric of a paused export is %v", got)
	}
	k.disconnect()
	if err := s.ctl.Remove(t.Context(), "a", true, time.Second); err != nil {
		t.Errorf("remove of a paused export: %v", err)
	}
	s.stop()
}

// TestPausedDiskIsNotResized, nor is a snapshot made of it: both would wait for the
// end of the pause. What it is set to meanwhile is done at once.
func TestPausedDiskIsNotResized(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	if err := s.ctl.Pause(t.Context(), "a", 5*time.Second); err != nil {
		t.Fatal(err)
	}
	_, err := s.ctl.Resize(t.Context(), "a", api.Resize{Size: 2 << 20})
	wantCode(t, "resize", err, api.CodeInUse)
	_, err = s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")})
	wantCode(t, "snapshot", err, api.CodeInUse)
	text := "changed"
	if x, err := s.ctl.Patch(t.Context(), "a", api.Patch{Description: &text}); err != nil || x.State != "paused" {
		t.Errorf("set: got %+v, %v, want it done and paused", x, err)
	}
	if err := s.ctl.Resume(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if x, err := s.ctl.Resize(t.Context(), "a", api.Resize{Size: 2 << 20}); err != nil || x.Size != 2<<20 {
		t.Errorf("resize of what goes on: got %+v, %v", x, err)
	}
	s.stop()
}

// hangStorage makes a file of the service one whose storage does not answer: FUSE with a
// server that is stopped.
func (s *testService) hangStorage(name string) { s.fuseStorage(name)(false) }

// fuseStorage makes a file of the service one of FUSE, whose server answers as long as
// it is told to, at first so.
func (s *testService) fuseStorage(name string) (answer func(bool)) {
	s.Helper()
	path := filepath.Join(s.dir, name)
	back := filepath.Join(s.TempDir(), "back")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.WriteFile(back, make([]byte, 1<<20), 0o600)); err != nil {
		s.Fatal(err)
	}
	cmd := exec.Command("qemu-storage-daemon", "--blockdev", "file,node-name=f,filename="+back,
		"--export", "fuse,id=e,node-name=f,writable=on,mountpoint="+path)
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { // by force: it does not always end of itself with requests in flight
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = unix.Unmount(path, unix.MNT_DETACH)
	})
	s.await("the file is that of FUSE", func() bool {
		var st unix.Statfs_t
		return unix.Statfs(path, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
	})
	return func(yes bool) {
		sig := syscall.SIGSTOP
		if yes {
			sig = syscall.SIGCONT
		}
		if err := cmd.Process.Signal(sig); err != nil {
			s.Error(err)
		}
	}
}

// TestClientsLeaveWhileAReloadHangs: at the end nobody is held up by a reload for as long
// as requests in flight have.
func TestClientsLeaveWhileAReloadHangs(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.stop()
	answer := s.fuseStorage("b.img")
	s.configure(exportA + exportB)
	s.atTop("drain-timeout = \"1h\"\n")
	s.start()
	s.open("b").works()
	healthy := s.open("a")
	answer(false)
	s.configure(exportA)
	s.atTop("drain-timeout = \"1h\"\n")
	s.signal(syscall.SIGHUP)
	s.await("the reload waits for the storage", func() bool { return slices.Contains(s.states(), "b draining") })
	s.signal(syscall.SIGTERM)
	left := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, healthy)
		left <- err
	}()
	select {
	case err := <-left:
		if err != nil {
			t.Errorf("a client that is told to leave: %v, want the end", err)
		}
	case <-time.After(hangLimit):
		t.Error("a client is not told to leave while a reload hangs")
	}
	answer(true)
	if err := <-s.done; err != nil {
		t.Errorf("service: %v", err)
	}
}

// TestStorageThatHangsHoldsUpNoOther: an image that cannot be opened in time has
// failed, and the service starts.
func TestStorageThatHangsHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	for _, confined := range []string{"auto", "off"} {
		t.Run("confine "+confined, func(t *testing.T) {
			t.Parallel()
			s := newService(t, "")
			s.stop()
			s.hangStorage("b.img")
			s.configure(exportA + "[[export]]\nname = \"b\"\nimage = \"DIR/b.img\"\n")
			s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--confine="+confined) }
			s.start()
			if got, want := s.states(), []string{"a ready", "b failed"}; !slices.Equal(got, want) {
				t.Errorf("exports are %q, want %q", got, want)
			}
			s.open("a").reads(1)
			s.outlivesHang()
			s.stop()
		})
	}
}

// TestOverlayThatHangsHoldsUpNoOther: one that is remembered, whose storage is not that
// of the image that the configuration names, which answers.
func TestOverlayThatHangsHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	for _, confined := range []string{"auto", "off"} {
		t.Run("confine "+confined, func(t *testing.T) {
			t.Parallel()
			s := newService(t, exportA+exportB)
			overlay := filepath.Join("elsewhere", "top.qcow2")
			if err := os.Mkdir(filepath.Join(s.dir, "elsewhere"), 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, overlay)}); err != nil {
				t.Fatal(err)
			}
			s.stop()
			s.hangStorage(overlay)
			s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--confine="+confined) }
			s.start()
			s.wantExports("with a silent overlay", "a failed config", "b ready config")
			if x, err := s.ctl.Export(t.Context(), "a"); err != nil || !strings.Contains(x.Error, overlay+`": no answer in time`) {
				t.Errorf("got %q, %v, want the overlay that does not answer", x.Error, err)
			}
			s.open("b").reads(1)
			s.stop()
		})
	}
}

// outlivesHang has the service open b.img, whose storage hangs, by a reload and by
// an addition, which are answered, and then by a reload that is not waited for.
func (s *testService) outlivesHang() {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), hangLimit)
	defer cancel()
	added := make(chan error, 1)
	go func() {
		ctl := control.Dial(filepath.Join(s.dir, "control"))
		_, err := ctl.Add(ctx, api.AddExport{Export: config.Export{Name: "c", Image: filepath.Join(s.dir, "b.img")}})
		added <- err
	}()
	if _, err := s.ctl.Reload(ctx, false); err != nil {
		s.Errorf("reload: %v", err)
	}
	wantCode(s.T, "addition", <-added, api.CodeFailed)
	if got, want := s.states(), []string{"a ready", "b failed"}; !slices.Equal(got, want) {
		s.Errorf("after a reload and an addition: exports are %q, want %q", got, want)
	}
	s.signal(syscall.SIGHUP)
}

// TestKeptExportThatHangsTakesNoOtherDown: its storage is not even asked where it is not
// opened because the configuration has its name by now.
func TestKeptExportThatHangsTakesNoOtherDown(t *testing.T) {
	t.Parallel()
	for _, confined := range []string{"auto", "off"} {
		t.Run("confine "+confined, func(t *testing.T) {
			t.Parallel()
			s := newService(t, "")
			image := filepath.Join(s.dir, "h.img")
			if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			x := api.AddExport{Export: config.Export{Name: "a", Image: image}, Persist: true}
			if _, err := s.ctl.Add(t.Context(), x); err != nil {
				t.Fatal(err)
			}
			s.stop()
			s.hangStorage("h.img")
			s.configure(exportA + exportB)
			s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--confine="+confined) }
			s.start()
			s.wantExports("with the configuration's own", "a failed state", "b ready config")
			if strings.Contains(s.log(), "no answer in time") {
				t.Error("the storage of what is not opened was asked")
			}
			s.stop()
		})
	}
}

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// client runs a script with h, which has export a open, and snapshot and add, which
// ask the service and tell whether it did so. fails asserts that an operation is
// an input/output error.
func (s *testService) client(script string) {
	s.Helper()
	head := fmt.Sprintf(`
import errno, json, nbd, subprocess
h = nbd.NBD()
h.connect_uri(%q)
def ask(path, **body):
    return subprocess.run(["curl", "-sSf", "--unix-socket", %q, "-d", json.dumps(body), "http://x/v1/" + path]).returncode == 0
def snapshot(name): return ask("exports/a/snapshot", overlay=%q + "/" + name)
def add(name): return ask("exports", name=name, image=%[3]q + "/" + name + ".img")
def fails(do, *args):
    try: do(*args)
    except nbd.Error as e: assert e.errnum == errno.EIO, e
    else: assert False, "it worked"
`, s.uri("a"), filepath.Join(s.dir, "control"), s.dir)
	if out, err := exec.Command("/usr/bin/python3", "-c", head+script).CombinedOutput(); err != nil {
		s.Fatalf("python3: %v\n%s", err, out)
	}
}

// deny has the image locked by another program that shares it with nobody, as
// one that comes in the moment in which the service does not lock it.
func (s *testService) deny(name string) *os.File {
	s.Helper()
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDWR, 0)
	if err != nil {
		s.Fatal(err)
	}
	const denies = 200 // QEMU's byte for "does not share reading"
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: denies, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		s.Fatal(err)
	}
	return f
}

// TestExportThatLosesItsImageHasFailed: its clients get errors and see nothing of
// the image that is opened next, and it can be removed.
func TestExportThatLosesItsImageHasFailed(t *testing.T) {
	t.Parallel()
	for _, cache := range []string{"writeback", "none"} {
		for _, engine := range []string{"uring", "pool"} {
			t.Run(engine+","+cache, func(t *testing.T) {
				s := newService(t, exportA+"cache = \""+cache+"\"\n")
				s.stop()
				conf := filepath.Join(s.dir, "conf")
				text, err := os.ReadFile(conf)
				if err == nil {
					err = os.WriteFile(conf, append([]byte("engine = \""+engine+"\"\n"), text...), 0o600)
				}
				secret := bytes.Repeat([]byte("SECRET!!"), 1<<17)
				if err := errors.Join(err, os.WriteFile(filepath.Join(s.dir, "c.img"), secret, 0o600)); err != nil {
					t.Fatal(err)
				}
				s.start()
				lock := s.deny("a.img")
				s.client(`
assert h.pread(4, 0) == bytes(4)
assert not snapshot("top.qcow2")
assert add("c")
fails(h.pread, 8192, 0)
fails(h.pwrite, b"PWNED!!!" * 1024, 8192)
fails(h.zero, 4096, 0)
fails(h.trim, 4096, 0)
fails(h.flush)
assert not snapshot("again.qcow2")
`)
				x, err := s.ctl.Export(t.Context(), "a")
				if err != nil || x.State != "failed" || !strings.Contains(x.Error, "image is in use") || x.Size != 1<<20 {
					t.Errorf("export: %+v, %v", x, err)
				}
				if got := s.states(); !slices.Equal(got, []string{"a failed", "c ready"}) {
					t.Errorf("exports: got %q", got)
				}
				if st, err := s.ctl.Status(t.Context()); err != nil || st.Notes["export a"] == "" {
					t.Errorf("status has no note of it: %+v, %v", st.Notes, err)
				}
				if got := s.size(s.uri("a")); got != "" {
					t.Errorf("a new client finds it: size %q", got)
				}
				if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
					t.Errorf("remove: %v", err)
				}
				if err := testenv.Close(lock); err != nil {
					t.Fatal(err)
				}
				if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}}); err != nil {
					t.Errorf("add again: %v", err)
				}
				s.write("a", "0x41", "0")
				s.write("c", "0x42", "512k")
				s.stop()
				copy(secret[512<<10:], bytes.Repeat([]byte{0x42}, 64<<10))
				if got, err := os.ReadFile(filepath.Join(s.dir, "c.img")); err != nil || !bytes.Equal(got, secret) {
					t.Errorf("the next image has other bytes, or %v", err)
				}
			})
		}
	}
}

// TestSnapshotIsRefusedBeforeAnythingIsClosed: where the image has another name
// by now, or another file has its name.
func TestSnapshotIsRefusedBeforeAnythingIsClosed(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	move := func(from, to string) {
		if err := os.Rename(filepath.Join(s.dir, from), filepath.Join(s.dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	refused := `
h.pwrite(b"1" * 4096, 0)
assert not snapshot("top.qcow2")
h.pwrite(b"2" * 4096, 4096)
h.flush()
assert h.pread(8192, 0) == b"1" * 4096 + b"2" * 4096
`
	move("a.img", "moved.img")
	s.client(refused)
	if err := os.WriteFile(filepath.Join(s.dir, "a.img"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.client(refused)
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || x.Image != filepath.Join(s.dir, "a.img") {
		t.Errorf("export: %+v, %v", x, err)
	}
	move("moved.img", "a.img")
	s.client(`assert snapshot("top.qcow2")`)
	s.stop()
}

// TestSnapshotThatNothingWouldBeWrittenToIsRefused: the export stays as it is, and
// is not kept.
func TestSnapshotThatNothingWouldBeWrittenToIsRefused(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image := filepath.Join(s.dir, "a.img")
	for name, x := range map[string]config.Export{
		"read-only": {Image: image, ReadOnly: true},
		"overlay":   {Image: image, Overlay: &config.Overlay{Quota: 1 << 20}},
		"memory":    {Image: "1M", Format: "mem"},
	} {
		x.Name = name
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
			t.Fatal(err)
		}
		overlay := filepath.Join(s.dir, "top.qcow2")
		_, err := s.ctl.Snapshot(t.Context(), name, api.Snapshot{Overlay: overlay})
		wantCode(t, name, err, api.CodeUnsupported)
		if is, err := s.ctl.Export(t.Context(), name); err != nil || is.Origin != "api" || is.Image != x.Image || exists(overlay) {
			t.Errorf("%s: export %+v, %v, overlay is there: %t", name, is, err, exists(overlay))
		}
		if err := s.ctl.Remove(t.Context(), name, false, 0); err != nil {
			t.Fatal(err)
		}
	}
	s.stop()
}

// asNobody has the service run as nobody, strictly confined, from its next start
// on. Its images stay the user's of the test.
func (s *testService) asNobody() {
	s.Helper()
	if os.Getuid() != 0 {
		s.Skip("needs root")
	}
	for _, dir := range []string{filepath.Dir(s.dir), s.dir} {
		if err := os.Chmod(dir, 0o755); err != nil {
			s.Fatal(err)
		}
	}
	state := filepath.Join(s.dir, "state")
	if err := errors.Join(os.Chmod(filepath.Join(s.dir, "conf"), 0o644), os.Chown(s.dir, 65534, 65534), os.Chown(state, 65534, 65534), os.Chown(filepath.Join(state, ".lock"), 65534, 65534)); err != nil {
		s.Fatal(err)
	}
	s.prepare = func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args, "--confine=strict", "-u", "nobody") }
}

// TestReloadOfAnImageThatTheWorkerMayNotOpen: the descriptor that it has will do,
// or else nothing is closed.
func TestReloadOfAnImageThatTheWorkerMayNotOpen(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.stop()
	s.asNobody()
	s.start()
	if err := s.reload(exportA + "flush-on-close = true\n"); err != nil {
		t.Errorf("a change that the open file suits: %v", err)
	}
	s.open("a").reads(1)
	if err := s.reload(exportA + "cache = \"none\"\n"); err == nil {
		t.Error("a change that takes another descriptor: no error")
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || !x.FlushOnClose || x.Cache == "none" {
		t.Errorf("after it: got %+v, %v, want it as it was", x, err)
	}
	s.open("a").reads(1)
	s.stop()
}

// TestSnapshotOfAnImageThatTheWorkerMayNotOpen: stage 0 opened it, in this process
// and again in the next, which finds the overlays.
func TestSnapshotOfAnImageThatTheWorkerMayNotOpen(t *testing.T) {
	t.Parallel()
	for _, more := range []string{"", "cache = \"none\"\n", "format = \"qcow2\"\nbacking = \"same-dir\"\n"} {
		s := newService(t, "")
		s.stop()
		s.configure(exportA + more)
		qcow2 := strings.Contains(more, "qcow2")
		if qcow2 {
			if out, err := tool(t, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", "a.img", "1M"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		s.asNobody()
		s.start()
		s.client(`
h.pwrite(b"1" * 4096, 0)
assert snapshot("one.qcow2")
h.pwrite(b"2" * 4096, 4096)
h.flush()
assert h.pread(8192, 0) == b"1" * 4096 + b"2" * 4096
assert snapshot("two.qcow2")
h.pwrite(b"3" * 4096, 8192)
assert h.pread(12288, 0) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096
`)
		s.stop()
		s.start()
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || x.Image != filepath.Join(s.dir, "two.qcow2") {
			t.Errorf("%safter a restart: %+v, %v", more, x, err)
		}
		s.client(`
assert h.pread(12288, 0) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096
assert snapshot("three.qcow2")
h.pwrite(b"4" * 4096, 12288)
assert h.pread(16384, 0) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096 + b"4" * 4096
`)
		s.stop()
		base, err := os.ReadFile(filepath.Join(s.dir, "a.img"))
		if err != nil || !qcow2 && string(base[4095:4097]) != "1\x00" {
			t.Errorf("%sthe image has other bytes, or %v", more, err)
		}
	}
}

// TestSnapshotWaitsForAReload that has opened its export and may take it back: the
// overlay would stand on another image than the export has then.
func TestSnapshotWaitsForAReload(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprint("reload fails ", fails), func(t *testing.T) {
			s := newService(t, exportA+slow)
			s.stuck()
			changed := strings.ReplaceAll(exportA, "a.img", "b.img") + strings.ReplaceAll(slow, "64M", "32M")
			if fails {
				changed += "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/no/such/folder\"\n"
			}
			s.configure(changed)
			reloaded := make(chan error, 1)
			go func() {
				_, err := control.Dial(filepath.Join(s.dir, "control")).Reload(s.Context(), false)
				reloaded <- err
			}()
			s.await("the reload has opened the other image", func() bool {
				x, err := s.ctl.Export(t.Context(), "a")
				return err == nil && x.Image == filepath.Join(s.dir, "b.img") && x.State == "opening"
			})
			overlay := filepath.Join(s.dir, "top.qcow2")
			_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay})
			wantCode(t, "snapshot during the reload", err, api.CodeInUse)
			clients, err := s.ctl.Clients(t.Context(), nil)
			if err != nil || len(clients) != 1 {
				t.Fatalf("clients: %v, %v", clients, err)
			}
			if err := s.ctl.Disconnect(t.Context(), clients[0].ID); err != nil {
				t.Fatal(err)
			}
			if err := <-reloaded; (err != nil) != fails {
				t.Fatalf("reload: %v, want it to fail: %v", err, fails)
			}
			if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
				t.Errorf("snapshot after the reload: %v", err)
			}
			s.stop()
			if fails {
				s.configure(exportA + slow)
			}
			s.start()
			if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != overlay || x.Error != "" {
				t.Errorf("after a restart: %+v, %v", x, err)
			}
			s.stop()
		})
	}
}

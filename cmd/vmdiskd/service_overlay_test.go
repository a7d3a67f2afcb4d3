package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// write has an export's client write and flush; read is what it then finds.
func (s *testService) write(name, byteAs string, at string) {
	s.Helper()
	if out, err := tool(s.T, s.dir, "qemu-io", "-f", "raw", "-c", "write -P "+byteAs+" "+at+" 64k", "-c", "flush", s.uri(name)); err != nil || strings.Contains(out, "failed") {
		s.Fatalf("write: %v: %s", err, out)
	}
}

func (s *testService) wantBytes(name, byteAs, at string) {
	s.Helper()
	if out, err := tool(s.T, s.dir, "qemu-io", "-r", "-f", "raw", "-c", "read -P "+byteAs+" "+at+" 64k", s.uri(name)); err != nil || strings.Contains(out, "failed") || strings.Contains(out, "Pattern") {
		s.Errorf("%s does not read %s at %s: %v: %s", name, byteAs, at, err, out)
	}
}

// kill ends the service as a power cut would.
func (s *testService) kill() {
	s.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		s.Fatal(err)
	}
	<-s.done
}

// TestOverlayOfTheConfigurationIsRemembered: whatever a guest has written since
// a snapshot is there after the service was killed, after reloads, and with a
// second snapshot; the image stays what it was.
func TestOverlayOfTheConfigurationIsRemembered(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.write("a", "0x31", "0")
	for i, name := range []string{"one.qcow2", "two.qcow2"} {
		overlay := filepath.Join(s.dir, name)
		if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
			t.Fatal(err)
		}
		at := []string{"64k", "128k"}[i]
		s.write("a", "0x32", at)
		s.kill()
		s.start()
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != overlay || x.Error != "" {
			t.Fatalf("after a restart: %+v, %v, want %s", x, err, overlay)
		}
		s.wantBytes("a", "0x31", "0")
		s.wantBytes("a", "0x32", at)
	}
	two := filepath.Join(s.dir, "two.qcow2")
	for _, more := range []string{"description = \"live\"\n", "description = \"live\"\nflush-on-close = true\n"} { // the second closes it
		s.configure(exportA + more)
		if _, err := s.ctl.Reload(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != two || x.Description != "live" {
			t.Errorf("after a reload: %+v, %v", x, err)
		}
		s.wantBytes("a", "0x32", "128k")
	}
	s.stop()
	base, err := os.ReadFile(filepath.Join(s.dir, "a.img"))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(base[65535:65537]) + string(base[131072:131073]); got != "1\x00\x00" {
		t.Errorf("image: got %q, want only what was written before the first snapshot", got)
	}
}

// TestExportTellsWhichFileItHasOpen: the image that is at the path when it is opened,
// whatever comes there later, or the overlay that a snapshot has put above it.
func TestExportTellsWhichFileItHasOpen(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"\n[[export]]\nname = \"none\"\nimage = \"DIR/nowhere.img\"\n")
	image, overlay := filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "top.qcow2")
	want := fileAt(t, image)
	for _, replace := range []func() error{
		func() error { return nil },
		func() error {
			return errors.Join(os.Rename(image, image+".old"), os.WriteFile(image, nil, 0o600))
		},
		func() error { return os.Rename(image+".old", image) },
	} {
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.File != want {
			t.Errorf("%+v, %v, want file %+v", x, err, want)
		}
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.File != fileAt(t, overlay) {
		t.Errorf("with an overlay: %+v, %v, want file %+v", x, err, fileAt(t, overlay))
	}
	if x, err := s.ctl.Export(t.Context(), "none"); err != nil || x.File != (api.File{}) {
		t.Errorf("that failed: %+v, %v, want no file", x, err)
	}
	s.stop()
}

// fileAt is the file at path.
func fileAt(t *testing.T, path string) api.File {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Ino == 0 {
		t.Fatal(err)
	}
	return api.File{Device: fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), Inode: st.Ino}
}

// TestOverlayIsNotForgottenForAnother: a configuration that names a third image
// gets no export, and one that names the overlay is right.
func TestOverlayIsNotForgottenForAnother(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	overlay := filepath.Join(s.dir, "top.qcow2")
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x33", "0")
	s.stop()
	s.configure(strings.ReplaceAll(exportA, "a.img", "b.img"))
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "failed" || !strings.Contains(x.Error, overlay) {
		t.Errorf("with a third image: %+v, %v", x, err)
	}
	s.stop()
	s.configure(strings.ReplaceAll(exportA, "a.img", "top.qcow2") + "format = \"qcow2\"\nbacking = \"explicit\"\nbacking-files = [\"DIR/a.img:raw\"]\n")
	s.start()
	s.wantBytes("a", "0x33", "0")
	s.stop()
}

// TestOverlayOfAnExportOfTheAPIIsRemembered, also where the export was not to be
// kept: what a guest has written since is there after the service was killed, and
// the name is no other image's until the export is removed.
func TestOverlayOfAnExportOfTheAPIIsRemembered(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	a := api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}}
	if x, err := s.ctl.Add(t.Context(), a); err != nil || x.Origin != "api" {
		t.Fatalf("%+v, %v", x, err)
	}
	overlay, state := filepath.Join(s.dir, "top.qcow2"), filepath.Join(s.dir, "state")
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err == nil || exists(overlay) {
		t.Errorf("snapshot that cannot be remembered: %v, or the overlay is there", err)
	}
	if err := os.Rename(state+"2", state); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Origin != "api" || x.Error != "" {
		t.Errorf("then: %+v, %v", x, err)
	}
	if x, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil || x.Origin != "state" {
		t.Fatalf("snapshot: %+v, %v", x, err)
	}
	s.write("a", "0x36", "0")
	s.kill()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != overlay || x.Error != "" {
		t.Fatalf("after a restart: %+v, %v, want %s", x, err, overlay)
	}
	s.wantBytes("a", "0x36", "0")
	_, err := s.ctl.Add(t.Context(), a)
	wantCode(t, "the image below", err, api.CodeExists)
	if err := s.ctl.Remove(t.Context(), "a", true, 0); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	if list, err := s.ctl.Exports(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("removed, and after a restart: %+v, %v", list, err)
	}
	s.stop()
}

// TestWhatIsTakenBackBetweenTwoSnapshots, a reload or a forgetting, changes nothing
// of what the second is remembered to stand for: the image that the file names.
func TestWhatIsTakenBackBetweenTwoSnapshots(t *testing.T) {
	t.Parallel()
	before := exportA + unixListener("one", "")
	for name, takenBack := range map[string]func(s *testService) error{
		"the export cannot be opened as it shall be": func(s *testService) error {
			defer s.configure(before)
			return s.reload(exportA + "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/no/such/folder\"\n" + unixListener("one", ""))
		},
		"a later step fails": func(s *testService) error {
			defer s.configure(before)
			return s.reload(exportA + "flush-on-close = true\n" + unixListener("one", "owner = \"no-such-user\"\n"))
		},
		"the image cannot be written to": func(s *testService) error {
			x := config.Export{Name: "reader", Image: filepath.Join(s.dir, "a.img"), ReadOnly: true}
			if _, err := s.ctl.Add(s.Context(), api.AddExport{Export: x}); err != nil {
				s.Fatal(err)
			}
			_, err := s.ctl.Forget(s.Context(), "a", true, false)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, before)
			two := filepath.Join(s.dir, "two.qcow2")
			if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "one.qcow2")}); err != nil {
				t.Fatal(err)
			}
			if err := takenBack(s); err == nil {
				t.Error("nothing was taken back")
			}
			if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: two}); err != nil {
				t.Fatal(err)
			}
			s.write("a", "0x38", "0")
			s.stop()
			s.start()
			if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != two || x.Error != "" {
				t.Fatalf("after a restart: %+v, %v, want %s", x, err, two)
			}
			s.wantBytes("a", "0x38", "0")
			s.stop()
		})
	}
}

// TestOverlayNeedsAPlaceToBeRemembered: without one nothing is done.
func TestOverlayNeedsAPlaceToBeRemembered(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.stop()
	conf := filepath.Join(s.dir, "conf")
	text, err := os.ReadFile(conf)
	if err == nil {
		err = os.WriteFile(conf, []byte(strings.ReplaceAll(string(text), "state =", "#")), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img")}}); err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(s.dir, "top.qcow2")
	for _, name := range []string{"a", "b"} {
		_, err = s.ctl.Snapshot(t.Context(), name, api.Snapshot{Overlay: overlay})
		wantCode(t, name+": no folder for state", err, api.CodeUnsupported)
		if _, err := os.Stat(overlay); !os.IsNotExist(err) {
			t.Errorf("%s: overlay: %v", name, err)
		}
	}
	s.stop()
	s.configure(exportA)
	s.start()
	for name, spoil := range map[string]func() error{
		"no JSON": func() error { return os.WriteFile(filepath.Join(s.dir, "state/.overlay=a.json"), []byte("{"), 0o600) },
		"another export": func() error {
			return os.WriteFile(filepath.Join(s.dir, "state/.overlay=a.json"), []byte(`{"of":{"name":"b"},"serve":{"name":"b","image":"/x"}}`), 0o600)
		},
		"no regular file": func() error { return os.Mkdir(filepath.Join(s.dir, "state/.overlay=a.json"), 0o700) },
	} {
		s.stop()
		if err := os.RemoveAll(filepath.Join(s.dir, "state/.overlay=a.json")); err != nil {
			t.Fatal(err)
		}
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		s.start()
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "failed" {
			t.Errorf("%s: %+v, %v", name, x, err)
		}
	}
}

// TestOverlayIsForgottenIfTheOperatorSaysSo: the image of the configuration is
// served again, at once and after a restart, with what was merged into it. What
// a guest would lose is refused without force.
func TestOverlayIsForgottenIfTheOperatorSaysSo(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	overlay, image := filepath.Join(s.dir, "top.qcow2"), filepath.Join(s.dir, "a.img")
	_, err := s.ctl.Forget(t.Context(), "a", true, false)
	wantCode(t, "no snapshot yet", err, api.CodeNotFound)
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x34", "0")
	_, err = s.ctl.Forget(t.Context(), "a", false, false)
	wantCode(t, "an overlay with data", err, api.CodeForbidden)
	_, err = s.ctl.Forget(t.Context(), "b", true, false)
	wantCode(t, "another export", err, api.CodeNotFound)
	want := api.Forgotten{DryRun: true, Overlay: overlay, Image: image}
	if f, err := s.ctl.Forget(t.Context(), "a", true, true); err != nil || f != want {
		t.Errorf("dry run: %+v, %v, want %+v", f, err, want)
	}
	s.kill()
	s.start()
	s.wantBytes("a", "0x34", "0") // so far nothing was forgotten
	s.stop()
	if out, err := tool(t, s.dir, "qemu-img", "commit", "-q", "-f", "qcow2", overlay); err != nil {
		t.Fatalf("qemu-img commit: %v: %s", err, out)
	}
	s.start()
	want.DryRun = false
	if f, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil || f != want {
		t.Errorf("forgotten: %+v, %v, want %+v", f, err, want)
	}
	for range 2 {
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != image || x.Error != "" {
			t.Errorf("then: %+v, %v, want %s", x, err, image)
		}
		s.wantBytes("a", "0x34", "0")
		s.kill()
		s.start()
	}
	if _, err := os.Stat(overlay); err != nil {
		t.Errorf("the overlay's file: %v", err)
	}
}

// TestForgettingAnOverlayRepairsAnExport that does not work since: its overlay is
// gone, what is remembered is damaged, or the file names a third image. One that
// works by the overlay alone keeps it.
func TestForgettingAnOverlayRepairsAnExport(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	overlay, image := filepath.Join(s.dir, "top.qcow2"), filepath.Join(s.dir, "a.img")
	kept := filepath.Join(s.dir, "state/.overlay=a.json")
	snapshot := func() {
		t.Helper()
		if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
			t.Fatal(err)
		}
	}
	for name, spoil := range map[string]func() error{
		"gone":    func() error { return os.Remove(overlay) },
		"damaged": func() error { return errors.Join(os.Remove(overlay), os.WriteFile(kept, []byte("{"), 0o600)) },
	} {
		snapshot()
		s.stop()
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		s.start()
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "failed" {
			t.Errorf("%s: %+v, %v", name, x, err)
		}
		_, err := s.ctl.Forget(t.Context(), "a", false, false)
		wantCode(t, name, err, api.CodeForbidden)
		if _, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != image || x.State != "ready" {
			t.Errorf("%s, then: %+v, %v", name, x, err)
		}
	}
	snapshot()
	s.write("a", "0x35", "0")
	if err := os.Rename(image, image+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Forget(t.Context(), "a", true, false); err == nil {
		t.Error("forgotten, and the image is not there")
	}
	if err := os.Rename(image+".away", image); err != nil {
		t.Fatal(err)
	}
	s.kill()
	s.start()
	s.wantBytes("a", "0x35", "0")
	s.stop()
	s.configure(strings.ReplaceAll(exportA, "a.img", "top.qcow2") + "format = \"qcow2\"\nbacking = \"explicit\"\nbacking-files = [\"DIR/a.img:raw\"]\n")
	s.start()
	if f, err := s.ctl.Forget(t.Context(), "a", false, false); err != nil || f.Image != overlay {
		t.Errorf("the file names the overlay itself: %+v, %v", f, err)
	}
	s.wantBytes("a", "0x35", "0")
	if _, err := os.Stat(kept); !os.IsNotExist(err) {
		t.Errorf("still remembered: %v", err)
	}
}

// TestForgettingAnOverlayOpensNoRemovedExport: it is away until the next start, which
// serves the image of the configuration.
func TestForgettingAnOverlayOpensNoRemovedExport(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	want := api.Forgotten{Overlay: filepath.Join(s.dir, "top.qcow2"), Image: filepath.Join(s.dir, "a.img")}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: want.Overlay}); err != nil {
		t.Fatal(err)
	}
	if err := s.ctl.Remove(t.Context(), "a", true, 0); err != nil {
		t.Fatal(err)
	}
	if f, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil || f != want {
		t.Errorf("forgotten: got %+v, %v, want %+v", f, err, want)
	}
	s.wantExports("then")
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s.wantExports("after a reload that changes nothing")
	s.stop()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.Image != want.Image || x.State != "ready" {
		t.Errorf("after a restart: got %+v, %v, want it ready with %s", x, err, want.Image)
	}
	s.stop()
}

// TestRefusedSnapshotLeavesNoOverlay: it can be asked for again.
func TestRefusedSnapshotLeavesNoOverlay(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	a := api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	overlay, state := filepath.Join(s.dir, "top.qcow2"), filepath.Join(s.dir, "state")
	refused := func(why string) {
		t.Helper()
		if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err == nil {
			t.Errorf("snapshot of %s: no error", why)
		}
		if exists(overlay) {
			t.Errorf("snapshot of %s: the overlay is there", why)
		}
	}
	if err := s.ctl.Pause(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	refused("a disk that is paused")
	if err := s.ctl.Resume(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	refused("a disk whose overlay cannot be remembered")
	if err := os.Rename(state+"2", state); err != nil {
		t.Fatal(err)
	}
	s.write("a", "1", "0")
	if x, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil || x.Image != overlay {
		t.Errorf("asked for again: got %+v, %v", x, err)
	}
	s.wantBytes("a", "1", "0")
	if err := os.WriteFile(overlay+"3", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay + "3"}); err == nil || !exists(overlay+"3") {
		t.Errorf("snapshot to a file that is there: %v, or the file is gone", err)
	}
	s.stop()
}

// TestOverlayBehindALinkIsRefused: the text of a path and the kernel may mean two
// files, of which one would be made and the other removed.
func TestOverlayBehindALinkIsRefused(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	other := filepath.Join(s.dir, "other")
	link, mine, state := filepath.Join(s.dir, "link"), filepath.Join(other, "top.qcow2"), filepath.Join(s.dir, "state")
	for _, err := range []error{
		os.MkdirAll(filepath.Join(other, "sub"), 0o700),
		os.Symlink(filepath.Join(other, "sub"), link),
		os.WriteFile(mine, []byte("mine"), 0o600),
		os.Rename(state, state+"2"), // so that what was made is removed again
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: link + "/../top.qcow2"})
	wantCode(t, "a path with ..", err, api.CodeUnsupported)
	if made := exists(filepath.Join(s.dir, "top.qcow2")); made || !exists(mine) {
		t.Errorf("an overlay was made: %t; a file of another folder is there: %t", made, exists(mine))
	}
	s.stop()
}

// TestPlaceOfAFileDecidesTheCode: outside of the roots is forbidden and a name
// that is taken is taken, for images and overlays alike.
func TestPlaceOfAFileDecidesTheCode(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	away := filepath.Join(t.TempDir(), "x")
	add := func(image string) error {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "x", Image: image}})
		return err
	}
	snapshot := func(path string) error {
		_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: path})
		return err
	}
	for _, tt := range []struct {
		name, code string
		err        error
	}{
		{"an image outside", api.CodeForbidden, add(away)},
		{"an overlay outside", api.CodeForbidden, snapshot(away)},
		{"an overlay that is there", api.CodeExists, snapshot(filepath.Join(s.dir, "b.img"))},
		{"a relative image", api.CodeInvalid, add("x")},
	} {
		var e *api.Error
		if !errors.As(tt.err, &e) || e.Code != tt.code {
			t.Errorf("%s: got %+v, want %s", tt.name, tt.err, tt.code)
		}
	}
	if err := add(away); err == nil || !strings.Contains(err.Error(), "--fd hands it over, or add its folder there and restart") {
		t.Errorf("an image outside: %v", err)
	}
}

// TestImageBelowAnOverlayIsNotWrittenTo by an export of another name, or origin,
// when no lock of the overlay's tells.
func TestImageBelowAnOverlayIsNotWrittenTo(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	image, overlay := filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "top.qcow2")
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.write("a", "0x37", "0")
	s.stop()
	s.configure(strings.ReplaceAll(exportA, `"a"`, `"renamed"`))
	s.start()
	if x, err := s.ctl.Export(t.Context(), "renamed"); err != nil || x.State != "failed" || !strings.Contains(x.Error, overlay) {
		t.Errorf("export of another name: %+v, %v", x, err)
	}
	b := api.AddExport{Export: config.Export{Name: "b", Image: image}}
	_, err := s.ctl.Add(t.Context(), b)
	wantCode(t, "writable export of the API", err, api.CodeForbidden)
	b.ReadOnly = true
	if _, err := s.ctl.Add(t.Context(), b); err != nil {
		t.Errorf("read-only export: %v", err)
	}
	if err := s.ctl.Remove(t.Context(), "b", true, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	s.wantExports("once it is forgotten", "renamed ready config")
	s.stop()
}

// away has the service start without a file, and back brings that again.
func (s *testService) away(file string) (back func()) {
	s.Helper()
	move := func(from, to string) {
		s.Helper()
		s.stop()
		if err := os.Rename(from, to); err != nil {
			s.Fatal(err)
		}
		s.start()
	}
	move(file, file+".away")
	return func() { s.Helper(); move(file+".away", file) }
}

// wantForbidden adds exports that would write to files, each given as its name and
// format, and wants all to be refused.
func (s *testService) wantForbidden(files ...string) {
	s.Helper()
	for _, f := range files {
		name, format, _ := strings.Cut(f, ":")
		x := config.Export{Name: "x", Image: filepath.Join(s.dir, name), Format: format}
		if format == "qcow2" {
			x.Backing = "same-dir"
		}
		_, err := s.ctl.Add(s.Context(), api.AddExport{Export: x})
		wantCode(s.T, f, err, api.CodeForbidden)
		if err == nil {
			err = s.ctl.Remove(s.Context(), "x", true, 0)
		} else {
			x.ReadOnly = true
			if _, err = s.ctl.Add(s.Context(), api.AddExport{Export: x}); err == nil {
				err = s.ctl.Remove(s.Context(), "x", true, 0)
			}
		}
		if err != nil {
			s.Errorf("%s, read-only or removed: %v", f, err)
		}
	}
}

// images makes images with qemu-img create, each given by its arguments.
func (s *testService) images(list ...string) {
	s.Helper()
	for _, args := range list {
		if out, err := tool(s.T, s.dir, "qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, strings.Fields(args)...)...); err != nil {
			s.Fatalf("qemu-img create %s: %v: %s", args, err, out)
		}
	}
}

// TestFilesBelowAnOverlayAreNotWrittenTo, whatever names them: the overlay alone
// does, or the export has them by another path. The overlay's file is not there when
// the service starts, so that nothing is locked.
func TestFilesBelowAnOverlayAreNotWrittenTo(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	at := func(name string) string { return filepath.Join(s.dir, name) }
	s.images("-b a.img -F raw one.qcow2", "-o data_file=data.raw base.qcow2 1M", "-o data_file=link.raw other.qcow2 1M")
	configured := strings.ReplaceAll(exportA, "a.img", "one.qcow2") + "format = \"qcow2\"\nbacking = \"same-dir\"\n"
	if err := s.reload(configured); err != nil {
		t.Fatal(err)
	}
	kept := api.AddExport{Export: config.Export{Name: "k", Image: at("base.qcow2"), Format: "qcow2", Backing: "same-dir"}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), kept); err != nil {
		t.Fatal(err)
	}
	for _, x := range [][2]string{{"a", "two.qcow2"}, {"a", "three.qcow2"}, {"k", "top.qcow2"}} {
		if _, err := s.ctl.Snapshot(t.Context(), x[0], api.Snapshot{Overlay: at(x[1])}); err != nil {
			t.Fatal(err)
		}
		s.write(x[0], "0x39", "0")
	}
	text := "changed"
	if _, err := s.ctl.Patch(t.Context(), "k", api.Patch{Description: &text}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Link(at("a.img"), at("hard.img")), os.Remove(at("link.raw")), os.Link(at("a.img"), at("link.raw"))); err != nil {
		t.Fatal(err)
	}
	back := s.away(at("three.qcow2"))
	s.wantForbidden("a.img:raw", "one.qcow2:qcow2", "two.qcow2:qcow2", "hard.img:raw", "other.qcow2:qcow2")
	back()
	s.wantBytes("a", "0x39", "0")
	back = s.away(at("top.qcow2"))
	s.wantForbidden("base.qcow2:qcow2", "data.raw:raw")
	back()
	s.wantBytes("k", "0x39", "0")
	if err := s.ctl.Remove(t.Context(), "k", true, 0); err != nil {
		t.Fatal(err)
	}
	kept.Name, kept.Persist = "again", false
	if _, err := s.ctl.Add(t.Context(), kept); err != nil {
		t.Errorf("once it is forgotten: %v", err)
	}
	s.stop()
}

// TestOverlayThatNamesNoFilesBelowItIsRemembered: its folder was written by a
// version that knew the names only.
func TestOverlayThatNamesNoFilesBelowItIsRemembered(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	b := api.AddExport{Export: config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img")}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"a": ".overlay=a.json", "b": "b.json"} {
		if _, err := s.ctl.Snapshot(t.Context(), name, api.Snapshot{Overlay: filepath.Join(s.dir, name+".qcow2")}); err != nil {
			t.Fatal(err)
		}
		s.write(name, "0x3a", "0")
		var x map[string]any
		path := filepath.Join(s.dir, "state", file)
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &x)
		}
		if err != nil || x["below"] == nil {
			t.Fatalf("%s: %v, %s", file, err, text)
		}
		delete(x, "below")
		if text, err = json.Marshal(x); err == nil {
			err = os.WriteFile(path, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, image := range map[string]string{"a": "a.img:raw", "b": "b.img:raw"} {
		back := s.away(filepath.Join(s.dir, name+".qcow2"))
		s.wantForbidden(image)
		back()
		s.wantBytes(name, "0x3a", "0")
	}
	s.stop()
}

// TestImageBelowAKeptOverlayIsNotWrittenTo: the kept export has lost its name to
// one of the configuration, which has the image as it was.
func TestImageBelowAKeptOverlayIsNotWrittenTo(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	overlay := filepath.Join(s.dir, "top.qcow2")
	a := api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}, Persist: true}
	if _, err := s.ctl.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.configure(exportA)
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "failed" {
		t.Errorf("%+v, %v", x, err)
	}
	s.stop()
}

// TestOverlayOfAnImageWithAColon: QEMU takes the name in the overlay for the file that
// is served, neither for a protocol nor for the file that "file:" leads to.
func TestOverlayOfAnImageWithAColon(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"vm:1.raw", "file:b.img"} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, exportA)
			s.stop()
			image, overlay := filepath.Join(s.dir, name), filepath.Join(s.dir, "top.qcow2")
			if err := os.Rename(filepath.Join(s.dir, "a.img"), image); err != nil {
				t.Fatal(err)
			}
			s.configure(strings.ReplaceAll(exportA, "a.img", name))
			s.start()
			if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
				t.Fatal(err)
			}
			s.write("a", "0x39", "0")
			s.stop()
			s.start()
			s.wantBytes("a", "0x39", "0")
			s.stop()
			if out, err := tool(t, s.dir, "qemu-img", "commit", "-q", "-f", "qcow2", overlay); err != nil {
				t.Errorf("qemu-img commit: %v: %s", err, out)
			}
			for file, want := range map[string]byte{name: 0x39, "b.img": 0} {
				if b, err := os.ReadFile(filepath.Join(s.dir, file)); err != nil || b[0] != want {
					t.Errorf("%s: got %v, %v, want its first byte to be %x", file, b[:min(len(b), 1)], err, want)
				}
			}
		})
	}
}

// TestOverlayThatWasRebasedIsNotServedAboveTheOldImage: what qemu-img has merged is in
// the other one, and the guest would not find it.
func TestOverlayThatWasRebasedIsNotServedAboveTheOldImage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		config  bool
		rebased string // one of two overlays
		back    string // what it was made above, and in which format
	}{
		{"of the configuration, the top", true, "two.qcow2", "one.qcow2:qcow2"},
		{"of the configuration, below", true, "one.qcow2", "a.img:raw"},
		{"of the API, the top", false, "two.qcow2", "one.qcow2:qcow2"},
		{"of the API, below", false, "one.qcow2", "a.img:raw"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conf := ""
			if tt.config {
				conf = exportA
			}
			s := newService(t, conf)
			if !tt.config {
				a := api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "a.img")}}
				if _, err := s.ctl.Add(t.Context(), a); err != nil {
					t.Fatal(err)
				}
			}
			for i, name := range []string{"one.qcow2", "two.qcow2"} {
				if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, name)}); err != nil {
					t.Fatal(err)
				}
				s.write("a", []string{"0x51", "0x52"}[i], []string{"0", "64k"}[i])
			}
			s.stop()
			base, format, _ := strings.Cut(tt.back, ":")
			for _, args := range [][]string{
				{"convert", "-q", "-f", format, "-O", "raw", base, "c.img"},
				{"rebase", "-q", "-f", "qcow2", "-F", "raw", "-b", "c.img", tt.rebased},
				{"commit", "-q", "-f", "qcow2", tt.rebased},
			} {
				if out, err := tool(t, s.dir, "qemu-img", args...); err != nil {
					t.Fatalf("qemu-img %q: %v: %s", args, err, out)
				}
			}
			s.start()
			x, err := s.ctl.Export(t.Context(), "a")
			if err != nil || x.State != "failed" || !strings.Contains(x.Error, `"c.img"`) || !strings.Contains(x.Error, filepath.Join(s.dir, base)) {
				t.Errorf("rebased: got %+v, %v, want it failed and both files named", x, err)
			}
			s.stop()
			if out, err := tool(t, s.dir, "qemu-img", "rebase", "-q", "-f", "qcow2", "-F", format, "-b", filepath.Join(s.dir, base), tt.rebased); err != nil {
				t.Fatalf("qemu-img rebase: %v: %s", err, out)
			}
			s.start()
			s.wantBytes("a", "0x51", "0")
			s.wantBytes("a", "0x52", "64k")
			s.stop()
		})
	}
}

// TestForgettingSaysHowToMerge: with the command that the refusal has, all that was
// written since the first of several snapshots is in the image.
func TestForgettingSaysHowToMerge(t *testing.T) {
	t.Parallel()
	for _, overlays := range [][]string{{"one.qcow2"}, {"one.qcow2", "two.qcow2"}, {"one.qcow2", "two.qcow2", "three.qcow2"}} {
		t.Run(overlays[len(overlays)-1], func(t *testing.T) {
			s := newService(t, exportA)
			at := func(i int) string { return []string{"0", "64k", "128k"}[i] }
			for i, name := range overlays {
				if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, name)}); err != nil {
					t.Fatal(err)
				}
				s.write("a", "0x61", at(i))
			}
			_, err := s.ctl.Forget(t.Context(), "a", false, false)
			wantCode(t, "an overlay with data", err, api.CodeForbidden)
			_, rest, _ := strings.Cut(err.Error(), "(qemu-img ")
			command, _, ok := strings.Cut(rest, ")")
			if !ok {
				t.Fatalf("refusal has no command: %v", err)
			}
			s.stop()
			if out, err := tool(t, s.dir, "/bin/sh", "-c", "qemu-img "+command); err != nil {
				t.Fatalf("%s: %v: %s", command, err, out)
			}
			s.start()
			if _, err := s.ctl.Forget(t.Context(), "a", true, false); err != nil {
				t.Fatal(err)
			}
			for i := range overlays {
				s.wantBytes("a", "0x61", at(i))
			}
			s.stop()
		})
	}
}

// TestSnapshotOfAPartOfASector is refused with the way out, which works: an overlay has
// whole sectors.
func TestSnapshotOfAPartOfASector(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image, overlay := filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "top.qcow2")
	if err := os.Truncate(image, 1<<20-1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "a", Image: image}}); err != nil {
		t.Fatal(err)
	}
	_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay})
	wantCode(t, "a part of a sector", err, api.CodeUnsupported)
	if err == nil || !strings.Contains(err.Error(), "vmdiskctl export resize a 1048576") || exists(overlay) {
		t.Errorf("got %v, want the command that helps, and no overlay", err)
	}
	if _, err := s.ctl.Resize(t.Context(), "a", api.Resize{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay}); err != nil {
		t.Errorf("then: %v", err)
	}
	s.stop()
}

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

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

// TestOverlayIsNotForgottenForAnother: a configuration that names a third image
// gets no export, and one that names the overlay is right.
func TestOverlayIsNotForgottenForAnother(t *testing.T) {
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

// TestOverlayNeedsAPlaceToBeRemembered: without one nothing is done.
func TestOverlayNeedsAPlaceToBeRemembered(t *testing.T) {
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
	overlay := filepath.Join(s.dir, "top.qcow2")
	_, err = s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay})
	wantCode(t, "no folder for state", err, api.CodeUnsupported)
	if _, err := os.Stat(overlay); !os.IsNotExist(err) {
		t.Errorf("overlay: %v", err)
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

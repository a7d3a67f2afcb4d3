package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// newQcow2 makes an image in the folder of the service.
func (s *testService) newQcow2(name string) string {
	s.Helper()
	if out, err := tool(s.T, s.dir, "qemu-img", "create", "-q", "-f", "qcow2", name, "1M"); err != nil {
		s.Fatal(err, out)
	}
	return filepath.Join(s.dir, name)
}

// TestQcow2IsNotServedAsRawByDefault: an image that begins as qcow2 is not
// written to as raw because nobody said its format. That concerns no other export,
// and whoever says what it is gets it.
func TestQcow2IsNotServedAsRawByDefault(t *testing.T) {
	t.Parallel()
	const exportB, exportR = "[[export]]\nname = \"b\"\nimage = \"DIR/b.qcow2\"\n", "[[export]]\nname = \"r\"\nimage = \"DIR/r.qcow2\"\nreadonly = true\n"
	s := newService(t, "")
	path := s.newQcow2("b.qcow2")
	s.newQcow2("r.qcow2")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.configure(exportA + exportB + exportR)
	s.start()
	if got := strings.Join(s.states(), ", "); got != "a ready, b failed, r ready" {
		t.Errorf("exports: got %s", got)
	}
	if x, err := s.ctl.Export(t.Context(), "b"); err != nil || !strings.Contains(x.Error, `format = "qcow2"`) {
		t.Errorf("refused: got %q, %v, want what to write", x.Error, err)
	}
	_, err = s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "c", Image: path}})
	wantCode(t, "add without a format", err, api.CodeInvalid)
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the refused image: %v, or it has changed", err)
	}
	for _, format := range []string{"qcow2", "raw"} {
		s.configure(exportA + exportB + "format = \"" + format + "\"\n" + exportR)
		if _, err := s.ctl.Reload(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if x, err := s.ctl.Export(t.Context(), "b"); err != nil || x.State != "ready" || x.Format != format {
			t.Errorf("with format %s: %+v, %v", format, x, err)
		}
	}
	s.stop()
}

// TestQcow2IsNotWrittenToAsRawAfterItWasRead: that an image was served read-only as
// raw, because nobody said its format, does not say it for writing.
func TestQcow2IsNotWrittenToAsRawAfterItWasRead(t *testing.T) {
	t.Parallel()
	const exportQ = "[[export]]\nname = \"q\"\nimage = \"DIR/q.qcow2\"\n"
	s := newService(t, "")
	path := s.newQcow2("q.qcow2")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, said := range []string{"", "format = \"raw\"\n"} {
		s.stop()
		s.configure(exportQ + "readonly = true\n" + said)
		s.start()
		s.configure(exportQ + "readonly = false\n")
		_, err := s.ctl.Reload(t.Context(), false)
		wantCode(t, "reload for writing", err, api.CodeInvalid)
		s.wantExports("as before", "q ready config")
	}
	k := config.Export{Name: "k", Image: path, ReadOnly: true}
	if x, err := s.ctl.Add(t.Context(), api.AddExport{Export: k, Persist: true}); err != nil || x.Format != "" {
		t.Errorf("added: %+v, %v, want no format", x, err)
	}
	if list, _, err := config.ReadExports(filepath.Join(s.dir, "state")); err != nil || len(list) != 1 || list[0].Format != "" {
		t.Errorf("kept: got %+v, %v, want no format", list, err)
	}
	s.stop()
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the image: %v, or it has changed", err)
	}
}

// TestWhatAGuestWritesKeepsNoDiskFromIt: a disk that was taken for raw stays
// one, whatever its guest writes to the first sector, while it is served and, if
// the daemon keeps its export, from the next start on.
func TestWhatAGuestWritesKeepsNoDiskFromIt(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	b := filepath.Join(s.dir, "b.img")
	if x, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "b", Image: b}, Persist: true}); err != nil || x.Format != "raw" {
		t.Fatalf("added: %+v, %v, want format raw", x, err)
	}
	s.newQcow2("header")
	for _, name := range []string{"a", "b"} {
		if out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write -s header 0 64k", s.uri(name)); err != nil {
			t.Fatal(err, out)
		}
	}
	// The first reload closes a and opens it again.
	for _, more := range []string{"flush-on-close = true\n", "flush-on-close = true\nformat = \"raw\"\n", "flush-on-close = true\n"} {
		s.configure(exportA + more)
		r, err := s.ctl.Reload(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(strings.Join(r.Changes, ""), "format") {
			t.Errorf("to say the default is a change: %q", r.Changes)
		}
	}
	if got := strings.Join(s.states(), ", "); got != "a ready, b ready" {
		t.Errorf("after reloads: got %s", got)
	}
	if _, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "none", "top.qcow2")}); err == nil {
		t.Error("snapshot into a folder that is not there: got no error")
	}
	if _, err := s.ctl.Resize(t.Context(), "b", api.Resize{Size: 2 << 20}); err != nil {
		t.Error(err)
	}
	s.stop()
	s.start()
	if got := strings.Join(s.states(), ", "); got != "a failed, b ready" {
		t.Errorf("after a restart: got %s, want the kept one", got)
	}
	s.stop()
}

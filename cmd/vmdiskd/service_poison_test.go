package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
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
	if log := s.log(); !strings.Contains(log, "msg=\"export takes no more writes") {
		t.Error("the log has no line of it")
	}
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
	if log := s.log(); !strings.Contains(log, "msg=\"export was closed without its last writes") {
		t.Error("the log has no line of it")
	}
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

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// TestExportThatHasTheImageIsNamed: by the start, by a reload, by the control API
// and, where the paths are one, by who reads the file.
func TestExportThatHasTheImageIsNamed(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.stop()
	for _, name := range []string{"c.img", "d.img"} {
		if err := os.Link(filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	const has = `export "a" has it open for writing`
	const exportC = "[[export]]\nname = \"c\"\nimage = \"DIR/c.img\"\n"
	const exportD = "[[export]]\nname = \"d\"\nimage = \"DIR/d.img\"\nreadonly = true\n"
	s.configure(exportA + exportC)
	s.start()
	if got := s.states(); !slices.Equal(got, []string{"a ready", "c failed"}) {
		t.Errorf("exports: got %q", got)
	}
	if x, err := s.ctl.Export(t.Context(), "c"); err != nil || !strings.HasSuffix(x.Error, has) {
		t.Errorf("c: got %+v, %v; want the error %q", x, err, has)
	}
	x := api.AddExport{}
	x.Name, x.Image = "e", filepath.Join(s.dir, "d.img")
	if _, err := s.ctl.Add(t.Context(), x); err == nil || !strings.Contains(err.Error(), has) {
		t.Errorf("added: %v, want %q", err, has)
	}
	s.configure(exportA + exportD)
	if _, err := s.ctl.Reload(t.Context(), false); err == nil || !strings.Contains(err.Error(), has) {
		t.Errorf("reloaded: %v, want %q", err, has)
	}
	s.configure(exportA + strings.Replace(exportD, "d.img", "a.img", 1))
	if _, err := s.ctl.Reload(t.Context(), true); err == nil || !strings.Contains(err.Error(), has) {
		t.Errorf("reload of one image twice, dry: %v, want %q", err, has)
	}
	fails(t, program("--config", filepath.Join(s.dir, "conf"), "--check"), has)
}

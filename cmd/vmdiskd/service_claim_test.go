package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// exportDevice is an export of the device at DIR/disk, which is root's link.
const exportDevice = "[[export]]\nname = \"a\"\nimage = \"DIR/disk\"\nformat = \"raw\"\n"

// newDeviceService is newService with a block device at DIR/disk.
func newDeviceService(t *testing.T, more string) (s *testService, node string) {
	t.Helper()
	s = newService(t, "")
	s.stop()
	node = backingtest.Loop(t, filepath.Join(s.dir, "a.img"), 512)
	if err := os.Symlink(node, filepath.Join(s.dir, "disk")); err != nil {
		t.Fatal(err)
	}
	s.configure(more)
	s.start()
	return s, node
}

// setReadOnly has the API set it of the export a.
func (s *testService) setReadOnly(to bool) error {
	_, err := s.ctl.Patch(s.Context(), "a", api.Patch{ReadOnly: &to})
	return err
}

// wantWritable fails the test unless clients may write to the export a, or may not.
func (s *testService) wantWritable(when string, want bool) {
	s.Helper()
	x, err := s.ctl.Export(s.Context(), "a")
	if err != nil || x.Writable != want || x.ReadOnly == want {
		s.Errorf("%s: got writable: %t, readonly = %t, %v; want writable: %t", when, x.Writable, x.ReadOnly, err, want)
	}
}

// TestClaimedDeviceIsNotMadeWritableAgain: it is mounted, or the kernel uses it for
// something else, since clients of the export could not write to it any more.
func TestClaimedDeviceIsNotMadeWritableAgain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, more string
		free       bool // is made writable all the same
	}{
		{"locked", "", false},
		{"without locks", "image-lock = \"off\"\n", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, node := newDeviceService(t, exportDevice+tt.more)
			if err := s.setReadOnly(true); err != nil {
				t.Fatal(err)
			}
			free := backingtest.Claim(t, node)
			if err := s.setReadOnly(false); tt.free != (err == nil) || err != nil && !strings.Contains(err.Error(), "mounted") {
				t.Errorf("readonly=false while somebody has the device: got %v, want it done: %t", err, tt.free)
			}
			s.wantWritable("while somebody has the device", tt.free)
			free()
			if err := s.setReadOnly(false); err != nil {
				t.Errorf("readonly=false when nobody has the device: %v", err)
			}
			s.wantWritable("when nobody has the device", true)
			s.stop() // before the device is gone
		})
	}
}

// TestClaimedDeviceIsNotMadeWritableByAReload: it lies in no folder that the worker may
// look into.
func TestClaimedDeviceIsNotMadeWritableByAReload(t *testing.T) {
	t.Parallel()
	s, node := newDeviceService(t, exportDevice)
	if err := s.reload(exportDevice + "readonly = true\n"); err != nil {
		t.Fatal(err)
	}
	free := backingtest.Claim(t, node)
	if err := s.reload(exportDevice); err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("while somebody has the device: got %v, want that it is mounted", err)
	}
	s.wantWritable("while somebody has the device", false)
	free()
	if err := s.reload(exportDevice); err != nil {
		t.Errorf("when nobody has the device: %v", err)
	}
	s.wantWritable("when nobody has the device", true)
	s.stop()
}

// TestClaimOfAWritableExportIsNotAsked: who has the device since it was opened for
// writing takes nothing from its clients, whatever else is set.
func TestClaimOfAWritableExportIsNotAsked(t *testing.T) {
	t.Parallel()
	s, node := newDeviceService(t, exportDevice)
	backingtest.Claim(t, node)
	no, text := false, "new"
	if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &no, Description: &text}); err != nil {
		t.Error(err)
	}
	s.wantWritable("after the change", true)
	s.stop()
}

// TestReloadThatIsTakenBackLeavesAClaimedDeviceReadOnly: somebody has it since the
// reload has made it that.
func TestReloadThatIsTakenBackLeavesAClaimedDeviceReadOnly(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		claimed bool
	}{
		{"claimed", true},
		{"free", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, node := newDeviceService(t, exportDevice+exportZ+unixListener("goes", ""))
			s.failMeanwhile(exportDevice+"readonly = true\n", func() {
				s.wantWritable("while the reload is under way", false)
				if tt.claimed {
					backingtest.Claim(t, node)
				}
			})
			s.wantWritable("after the reload", !tt.claimed)
			if tt.claimed {
				s.wantLogged("export stays changed")
			}
			s.stop()
		})
	}
}

package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// spoil damages a qcow2 image of which the middle was written: the entry of the L1
// table at mid leads to a table whose first entry names no cluster.
func spoil(t *testing.T, path string, mid int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := func(off int64) int64 {
		var p [8]byte
		if _, err := f.ReadAt(p[:], off); err != nil {
			t.Fatal(err)
		}
		return int64(binary.BigEndian.Uint64(p[:]) & 0x00fffffffffffe00)
	}
	const l1Offset = 40 // of the header, see "Header" of the format
	entry := binary.BigEndian.AppendUint64(nil, 1<<63|0x777)
	if _, err := f.WriteAt(entry, at(at(l1Offset)+8*mid)); err != nil {
		t.Fatal(err)
	}
}

// TestExportThatTakesNoMoreWritesIsNotWell: all who ask are told, until the image is
// repaired and opened anew; what can be read is.
func TestExportThatTakesNoMoreWritesIsNotWell(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image := filepath.Join(dir, "q.qcow2")
	for _, args := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", image, "4G"},
		{"qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "write -q 2G 64k", image},
	} {
		if out, err := tool(t, dir, args[0], args[1:]...); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	s := newService(t, exportA)
	s.configure(exportA + "[[export]]\nname = \"q\"\nformat = \"qcow2\"\nimage = \"DIR/q.qcow2\"\n")
	served := filepath.Join(s.dir, "q.qcow2")
	if err := os.Rename(image, served); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if got := s.metric(`export_poisoned{export="q"}`); got != 0 {
		t.Errorf("before: the gauge is %v, want 0", got)
	}
	sound, err := os.ReadFile(served)
	if err != nil {
		t.Fatal(err)
	}
	spoil(t, served, 4)                                                             // 512 MiB for each entry
	_, _ = tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write 2G 64k", s.uri("q")) // it fails, or opening the disk does
	s.await("the export is poisoned", func() bool { return s.metric(`export_poisoned{export="q"}`) == 1 })
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

	_ = s.ctl.Remove(t.Context(), "q", true, 0) // it cannot be flushed
	if err := os.WriteFile(served, sound, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.reload(exportA + "[[export]]\nname = \"q\"\nformat = \"qcow2\"\nimage = \"DIR/q.qcow2\"\ndescription = \"repaired\"\n"); err != nil {
		t.Fatal(err)
	}
	if x, err := s.ctl.Export(t.Context(), "q"); err != nil || x.State != "ready" || !x.Writable || x.Error != "" {
		t.Errorf("when it is repaired: got %+v, %v, want it ready", x, err)
	}
	s.stop()
}

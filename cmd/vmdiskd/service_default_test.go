package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestEmptyNameOpensNoOtherDisk: neither after a reload that opens its export
// again, nor while that has failed.
func TestEmptyNameOpensNoOtherDisk(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	image := filepath.Join(s.dir, "a.img")
	if err := os.Truncate(filepath.Join(s.dir, "b.img"), 2<<20); err != nil {
		t.Fatal(err)
	}
	opens := func(when, want string) {
		t.Helper()
		if got := s.size(s.uri("")); got != want {
			t.Errorf("%s: the empty name opens a disk of %q bytes, want %q", when, got, want)
		}
	}
	reload := func(more string) {
		t.Helper()
		if err := s.reload(more); err != nil {
			t.Fatal(err)
		}
	}
	reload(exportA + exportB)
	opens("at first", "1048576")
	again := exportA + "cache = \"none\"\n" + exportB
	reload(again)
	opens("opened again", "1048576")
	s.stop()
	if err := os.Rename(image, image+".away"); err != nil {
		t.Fatal(err)
	}
	s.start()
	opens("failed", "")
	if err := os.Rename(image+".away", image); err != nil {
		t.Fatal(err)
	}
	reload(again)
	opens("mended", "1048576")
	if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
		t.Error(err)
	}
	opens("removed", "2097152")
	s.stop()
}

// memExport is an export of memory, with more keys.
func memExport(name, size, more string) string {
	return fmt.Sprintf("[[export]]\nname = %q\nimage = %q\nformat = \"mem\"\n", name, size) + more
}

// TestEmptyNameIsWhatItsListenerShows: the first export has a listener of its own,
// and whether it can be opened is nothing to the others.
func TestEmptyNameIsWhatItsListenerShows(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA+"[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"+memExport("b", "2M", ""))
	opens := func(when string) {
		t.Helper()
		if got, want := s.size(s.uri("")), "2097152"; got != want {
			t.Errorf("%s: the empty name opens a disk of %q bytes at the listener of all, want %q", when, got, want)
		}
	}
	opens("it is open")
	s.stop()
	if err := os.Remove(filepath.Join(s.dir, "a.img")); err != nil {
		t.Fatal(err)
	}
	s.start()
	if got, want := s.states(), []string{"a failed", "b ready"}; !slices.Equal(got, want) {
		t.Errorf("without its image: got %q, want %q", got, want)
	}
	opens("it has failed")
	s.stop()
}

// TestMovedDefaultWaitsForItsDisk: while a client holds up the reload that makes its
// export the default, the empty name opens that which was it, and no third.
func TestMovedDefaultWaitsForItsDisk(t *testing.T) {
	t.Parallel()
	for what, more := range map[string]string{"the other stays open": "", "the other is opened again": anew} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			const chosen = "default = true\n"
			first := memExport("c", "3M", "")
			s := newService(t, first+memExport("a", "2M", chosen)+exportZ)
			opens := func(when, want string) {
				t.Helper()
				if got := s.size(s.uri("")); got != want {
					t.Errorf("%s: the empty name opens a disk of %q bytes, want %q", when, got, want)
				}
			}
			opens("before", "2097152")
			err := s.meanwhile(first+memExport("a", "2M", more)+exportZ+chosen+anew, func() { opens("meanwhile", "2097152") })
			if err != nil {
				t.Error(err)
			}
			opens("after", "1048576")
			s.stop()
		})
	}
}

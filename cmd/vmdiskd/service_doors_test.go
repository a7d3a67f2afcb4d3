package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// TestClosedListenerShowsNothing: also not to those who came in by it before
// and have opened no export yet.
func TestClosedListenerShowsNothing(t *testing.T) {
	const shared = "[[listener]]\nuri = \"nbd+unix:///?socket=DIR/some\"\nexports = [\"a\"]\n"
	s := newService(t, exportA+shared)
	own := filepath.Join(s.dir, "own")
	x := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img"), Listeners: []config.Listener{{URI: "nbd+unix:///?socket=" + own}}}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x}); err != nil {
		t.Fatal(err)
	}
	at := map[*client]string{greet(t, s.dialAt("own")): "b", greet(t, s.dialAt("some")): "a"}
	for c, want := range at {
		if got := c.list(); len(got) != 1 || got[0] != want {
			t.Errorf("before: got %q, want %s", got, want)
		}
	}
	if err := s.ctl.Remove(t.Context(), "b", true, time.Minute); err != nil {
		t.Fatal(err)
	}
	s.configure(exportA)
	if _, err := s.ctl.Reload(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	for c, name := range at {
		if got := c.list(); got != nil {
			t.Errorf("who came in to see %s sees %q", name, got)
		}
	}
	s.stop()
}

// TestListenersOfOneURIAreTwo: the kernel gives each its own port.
func TestListenersOfOneURIAreTwo(t *testing.T) {
	const own = "[[export.listener]]\nuri = \"nbd://127.0.0.1:0\"\n"
	s := newService(t, exportA+own+"[[export]]\nname = \"b\"\nimage = \"8M\"\nformat = \"mem\"\n"+own)
	for name, want := range map[string]string{"a": "1048576", "b": "8388608"} {
		x, err := s.ctl.Export(t.Context(), name)
		if err != nil || len(x.URIs) != 1 {
			t.Fatalf("export %s: %q, %v; want one URI", name, x.URIs, err)
		}
		if got := s.size(strings.TrimSuffix(x.URIs[0], name)); got != want {
			t.Errorf("the default at %s: got %q, want %q", x.URIs[0], got, want)
		}
	}
	s.stop()
}

// TestToolsListManyExports: they ask about each of them on one connection.
func TestToolsListManyExports(t *testing.T) {
	var exports strings.Builder
	const many = 100
	for i := range many {
		fmt.Fprintf(&exports, "[[export]]\nname = \"e%d\"\nimage = \"1M\"\nformat = \"mem\"\n", i)
	}
	s := newService(t, exports.String())
	for _, argv := range [][]string{
		{"nbdinfo", "--list", s.uri("")},
		{"qemu-nbd", "-L", "-k", filepath.Join(s.dir, "nbd")},
	} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if n := strings.Count(string(out), "1048576"); err != nil || n < many {
			t.Errorf("%s: %v, %d exports, want %d\n%s", argv[0], err, n, many, out)
		}
	}
	s.stop()
}

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
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

// TestEmptyNameIsTheSameAfterARestart: what is first, and what is the default, is what
// a start makes of the configuration and of what was kept.
func TestEmptyNameIsTheSameAfterARestart(t *testing.T) {
	t.Parallel()
	yes := true
	add := func(s *testService, name, size string, persist, isDefault bool) {
		s.Helper()
		x := config.Export{Name: name, Format: "mem", Image: size, Default: isDefault}
		if _, err := s.ctl.Add(s.Context(), api.AddExport{Export: x, Persist: persist}); err != nil {
			s.Fatal(err)
		}
	}
	set := func(s *testService, name string) {
		s.Helper()
		if _, err := s.ctl.Patch(s.Context(), name, api.Patch{Default: &yes}); err != nil {
			s.Fatal(err)
		}
	}
	reload := func(s *testService, conf string) {
		s.Helper()
		if err := s.reload(conf); err != nil {
			s.Fatal(err)
		}
	}
	const mega, chosen = "1048576", "default = true\n"
	for _, tt := range []struct {
		name, conf, want string
		do               func(s *testService)
	}{
		{"kept, by the order of their making", "", mega, func(s *testService) {
			add(s, "b", "1M", true, false)
			add(s, "a", "2M", true, false)
		}},
		{"kept by a snapshot, by the same", "", mega, func(s *testService) {
			x := config.Export{Name: "b", Image: filepath.Join(s.dir, "b.img")}
			if _, err := s.ctl.Add(s.Context(), api.AddExport{Export: x}); err != nil {
				s.Fatal(err)
			}
			add(s, "a", "2M", true, false)
			if _, err := s.ctl.Snapshot(s.Context(), "b", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")}); err != nil {
				s.Fatal(err)
			}
		}},
		{"kept, over two restarts", "", mega, func(s *testService) {
			add(s, "c", "1M", true, false)
			add(s, "b", "2M", true, false)
			s.stop()
			s.start()
			add(s, "a", "3M", true, false)
			set := false
			if _, err := s.ctl.Patch(s.Context(), "c", api.Patch{ReadOnly: &set}); err != nil {
				s.Fatal(err)
			}
		}},
		{"of the file, by its order", exportZ, "2097152", func(s *testService) {
			reload(s, memExport("a", "2M", "")+exportZ)
		}},
		{"of the file, put in another order", exportZ + memExport("a", "2M", ""), "2097152", func(s *testService) {
			reload(s, memExport("a", "2M", "")+exportZ)
		}},
		{"of the file, which comes before what was kept", "", mega, func(s *testService) {
			add(s, "a", "2M", true, false)
			reload(s, exportZ)
		}},
		{"the last kept one that was made the default", "", mega, func(s *testService) {
			add(s, "b", "1M", true, false)
			add(s, "a", "2M", true, true)
			set(s, "b")
		}},
		{"the last kept one that came as the default", "", mega, func(s *testService) {
			add(s, "b", "2M", true, true)
			add(s, "a", "1M", true, true)
		}},
		{"kept, against one of the file", exportZ + chosen, "2097152", func(s *testService) {
			add(s, "a", "2M", true, true)
		}},
		{"of the file, made it anew against one that was kept", exportZ + chosen, mega, func(s *testService) {
			add(s, "a", "2M", true, true)
			set(s, "z")
		}},
		{"of the file, by a reload, against one that was kept", exportZ, mega, func(s *testService) {
			add(s, "a", "2M", true, true)
			reload(s, exportZ+chosen)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tt.conf)
			tt.do(s)
			for _, when := range []string{"before", "after"} {
				if got := s.size(s.uri("")); got != tt.want {
					t.Errorf("%s the restart the empty name opens a disk of %q bytes, want %q", when, got, tt.want)
				}
				s.stop()
				s.start()
			}
			s.stop()
		})
	}
}

// TestDefaultYieldsLater: when its file can be written again. Until then whoever looks
// is told, and what took its place has it.
func TestDefaultYieldsLater(t *testing.T) {
	t.Parallel()
	const chosen = "default = true\n"
	c := memExport("c", "1M", "")
	yes := true
	for _, tt := range []struct {
		name string
		do   func(s *testService) // makes the disk of 1M the default
	}{
		{"to one of the file", func(s *testService) {
			s.configure(c + chosen)
			r, err := s.ctl.Reload(s.Context(), false)
			if n := len(r.Changes); err != nil || n == 0 || !strings.Contains(r.Changes[n-1], "\"k\" is still a default") {
				s.Errorf("reload: got %q, %v, want that k is still a default", r.Changes, err)
			}
		}},
		{"to one that is added", func(s *testService) {
			x := config.Export{Name: "k2", Format: "mem", Image: "1M", Default: true}
			if got, err := s.ctl.Add(s.Context(), api.AddExport{Export: x, Persist: true}); err != nil || !got.Default {
				s.Errorf("addition: got %+v, %v, want it the default", got, err)
			}
		}},
		{"to one that is set", func(s *testService) {
			_, err := s.ctl.Patch(s.Context(), "c", api.Patch{Default: &yes})
			if err == nil || !strings.Contains(err.Error(), "\"c\" is changed, but export \"k\" is still a default") {
				s.Errorf("change: got %v, want it to say that c is changed", err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, c)
			k := config.Export{Name: "k", Format: "mem", Image: "2M", Default: true}
			if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: k, Persist: true}); err != nil {
				t.Fatal(err)
			}
			looks := func(when string, still bool) {
				t.Helper()
				if got := s.size(s.uri("")); got != "1048576" {
					t.Errorf("%s: the empty name opens a disk of %q bytes, want 1048576", when, got)
				}
				x, err := s.ctl.Status(t.Context())
				if got := strings.Contains(x.Notes["export k"], "still a default"); err != nil || got != still {
					t.Errorf("%s: got the notes %q, %v; want one about k: %t", when, x.Notes, err, still)
				}
			}
			inTheWay := filepath.Join(s.dir, "state", ".k.json.new")
			if err := os.MkdirAll(filepath.Join(inTheWay, "full"), 0o700); err != nil {
				t.Fatal(err)
			}
			tt.do(s)
			looks("k cannot be written", true)
			if err := os.RemoveAll(inTheWay); err != nil {
				t.Fatal(err)
			}
			if r, err := s.ctl.Reload(t.Context(), false); err != nil || len(r.Changes) != 0 {
				t.Errorf("reload of the same: got %q, %v, want no changes", r.Changes, err)
			}
			looks("k can be written", false)
			s.stop()
			s.start()
			looks("after a restart", false)
			s.stop()
		})
	}
}

// TestOneDefaultOfTheAPIIsShown: what was it before says so no more, there or failed,
// and however many are made it at a time.
func TestOneDefaultOfTheAPIIsShown(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	yes := true
	for _, name := range []string{"a", "b", "c", "d"} {
		x := config.Export{Name: name, Image: filepath.Join(s.dir, name+".img"), Default: name == "b"}
		if err := os.WriteFile(x.Image, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x, Persist: name != "d"}); err != nil {
			t.Fatal(err)
		}
	}
	defaults := func(when string, want int) {
		t.Helper()
		all, err := s.ctl.Exports(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range all {
			if x.Default {
				got = append(got, x.Name+" "+x.State)
			}
		}
		if len(got) != want {
			t.Errorf("%s: the defaults are %q, want %d", when, got, want)
		}
	}
	defaults("at first", 1)
	var both sync.WaitGroup
	for _, name := range []string{"a", "c", "d"} {
		both.Go(func() {
			if _, err := s.ctl.Patch(t.Context(), name, api.Patch{Default: &yes}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	both.Wait()
	defaults("made it at a time", 1)
	if _, err := s.ctl.Patch(t.Context(), "b", api.Patch{Default: &yes}); err != nil {
		t.Error(err)
	}
	s.stop()
	if err := os.Remove(filepath.Join(s.dir, "b.img")); err != nil {
		t.Fatal(err)
	}
	s.start()
	defaults("the default has failed", 1)
	if _, err := s.ctl.Patch(t.Context(), "a", api.Patch{Default: &yes}); err != nil {
		t.Error(err)
	}
	defaults("another is it", 1)
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || !x.Default {
		t.Errorf("a: got %+v, %v, want it the default", x, err)
	}
	s.stop()
}

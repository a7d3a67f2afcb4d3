package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

const (
	// exportZ is closed after those that are called a and b.
	exportZ = "[[export]]\nname = \"z\"\nimage = \"1M\"\nformat = \"mem\"\n"

	// anew has an export closed and opened again.
	anew = "flush-on-close = true\n"
)

// meanwhile does something while a reload waits for a client of z, and returns
// what comes of the reload.
func (s *testService) meanwhile(conf string, do func()) error {
	s.Helper()
	s.hang("z")
	s.configure(conf)
	reloaded := make(chan error, 1)
	go func() {
		_, err := control.Dial(filepath.Join(s.dir, "control")).Reload(s.Context(), false)
		reloaded <- err
	}()
	s.await("the reload waits", func() bool { return slices.Contains(s.states(), "z draining") })
	do()
	s.letGo("z")
	return <-reloaded
}

// replace removes an export, and adds another by its name, of 2 MiB, which grants
// as say.
func (s *testService) replace(name string, grants ...config.Grant) {
	s.Helper()
	image := filepath.Join(s.dir, name+".other")
	if err := os.WriteFile(image, make([]byte, 2<<20), 0o600); err != nil {
		s.Fatal(err)
	}
	if err := s.ctl.Remove(s.Context(), name, true, time.Minute); err != nil {
		s.Fatal(err)
	}
	x := config.Export{Name: name, Image: image, Format: "raw", Grants: grants}
	if _, err := s.ctl.Add(s.Context(), api.AddExport{Export: x}); err != nil {
		s.Fatal(err)
	}
}

// TestReloadClosesNoOtherOfTheName: an export that takes a name while the reload
// waits is not closed to open the one of the configuration, which is refused.
func TestReloadClosesNoOtherOfTheName(t *testing.T) {
	t.Parallel()
	const first, last = "[[export]]\nname = \"x\"\nimage = \"1M\"\nformat = \"mem\"\n", "[[export]]\nname = \"zz\"\nimage = \"DIR/b.img\"\n"
	s := newService(t, first+exportZ+last)
	var other *client
	err := s.meanwhile(first+anew+exportZ+anew+last+anew, func() {
		s.replace("zz")
		other = s.open("zz")
	})
	wantCode(t, "reload", err, api.CodeExists)
	s.wantExports("after the reload", "x ready config", "z ready config", "zz ready api")
	other.reads(1)
	for name, want := range map[string]string{"x": "1048576", "z": "1048576", "zz": "2097152"} {
		if x, err := s.ctl.Export(t.Context(), name); err != nil || x.FlushOnClose {
			t.Errorf("%s: got %+v, %v, want it as it was", name, x, err)
		}
		if got := s.size(s.uri(name)); got != want {
			t.Errorf("size of %s: got %q, want %q", name, got, want)
		}
	}
	s.stop()
}

// TestReloadThatIsTakenBackTouchesNoOther: what has taken the name of an export
// that the reload has opened or changed stays as it is.
func TestReloadThatIsTakenBackTouchesNoOther(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ what, before, after string }{
		{"opened again", exportA, exportA + anew},
		{"opened for the first time", "[[export]]\nname = \"a\"\nimage = \"DIR/c.img\"\n", exportA},
		{"added", "", exportA},
		{"changed", exportA, exportA + "description = \"new\"\n"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tt.before+exportZ+unixListener("goes", ""))
			busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
			if err != nil {
				t.Fatal(err)
			}
			defer busy.Close()
			err = s.meanwhile(tt.after+exportZ+anew+unixListener("busy", ""), func() {
				s.open("a").disconnect()
				s.replace("a", config.Grant{Access: "rw", UIDs: []uint32{4242}})
			})
			if err == nil {
				t.Error("the reload opened a listener where another server listens")
			}
			s.wantExports("after the reload", "a ready api", "z ready config")
			x, err := s.ctl.Export(t.Context(), "a")
			if err != nil || x.Size != 2<<20 || x.Description != "" || len(x.Grants) != 1 {
				t.Errorf("a: got %+v, %v, want the one of the API", x, err)
			}
			if got := s.size(s.uri("a")); got != "" {
				t.Errorf("a can be opened without its grant, and has %s bytes", got)
			}
			s.stop()
		})
	}
}

// failMeanwhile is meanwhile with a reload that fails when all exports are changed.
func (s *testService) failMeanwhile(conf string, do func()) {
	s.Helper()
	busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
	if err != nil {
		s.Fatal(err)
	}
	defer busy.Close()
	if err := s.meanwhile(conf+exportZ+anew+unixListener("busy", ""), do); err == nil {
		s.Error("the reload opened a listener where another server listens")
	}
}

// TestReloadThatIsTakenBackKeepsWhatWasSet by the API while it was under way: of the
// keys that it has changed, those go back that nobody has set since.
func TestReloadThatIsTakenBackKeepsWhatWasSet(t *testing.T) {
	t.Parallel()
	const changes = "description = \"new\"\nmax-connections = 7\n"
	for _, tt := range []struct{ what, after string }{
		{"changed", exportA + changes},
		{"opened again", exportA + changes + anew},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, exportA+"description = \"old\"\n"+exportZ+unixListener("goes", ""))
			yes, most, nobody := true, 3, []config.Grant{{Access: "rw", UIDs: []uint32{4242}}}
			s.failMeanwhile(tt.after, func() {
				x, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &yes, Connections: &most, Grants: &nobody})
				if err != nil || x.Description != "new" {
					t.Errorf("patch: got %+v, %v, want it with the description of the reload", x, err)
				}
			})
			x, err := s.ctl.Export(t.Context(), "a")
			if err != nil || !x.ReadOnly || x.Writable || x.Connections != most || len(x.Grants) != 1 {
				t.Errorf("after the reload: got %+v, %v, want what was set", x, err)
			}
			if x.Description != "old" || x.FlushOnClose {
				t.Errorf("after the reload: got %+v, want the rest as it was", x)
			}
			if got := s.size(s.uri("a")); got != "" {
				t.Errorf("a can be opened without its grant, and has %s bytes", got)
			}
			no := false
			if x, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: &no}); err != nil || !x.Writable {
				t.Errorf("read-only is taken back: got %+v, %v", x, err)
			}
			s.stop()
		})
	}
}

// TestNothingIsSetThatAReloadMayTakeAway: an export that was not open before the reload
// which has opened it would go with what was set.
func TestNothingIsSetThatAReloadMayTakeAway(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ what, before, state string }{
		{"opened for the first time", "[[export]]\nname = \"a\"\nimage = \"DIR/c.img\"\n", "a failed"},
		{"added", "", ""},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tt.before+exportZ+unixListener("goes", ""))
			set := func() error {
				_, err := s.ctl.Patch(t.Context(), "a", api.Patch{ReadOnly: new(true)})
				return err
			}
			s.failMeanwhile(exportA, func() { wantCode(t, "set during the reload", set(), api.CodeInUse) })
			if got, want := strings.Join(s.states(), ", "), strings.TrimPrefix(tt.state+", z ready", ", "); got != want {
				t.Errorf("after the reload: got %q, want %q", got, want)
			}
			if err := s.reload(exportA + exportZ); err != nil {
				t.Error(err)
			}
			if err := set(); err != nil {
				t.Errorf("set after a reload that is done: %v", err)
			}
			s.stop()
		})
	}
}

// TestPauseOutlastsAReloadThatIsTakenBack, or is refused: what the reload has opened
// it would close.
func TestPauseOutlastsAReloadThatIsTakenBack(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		what, before, after string
		refused             bool
	}{
		{"changed", exportA, exportA + "description = \"new\"\n", false},
		{"opened again", exportA, exportA + anew, true},
		{"added", "", exportA, true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tt.before+exportZ+unixListener("goes", ""))
			s.failMeanwhile(tt.after, func() {
				switch err := s.ctl.Pause(t.Context(), "a", time.Minute); {
				case tt.refused:
					wantCode(t, "pause", err, api.CodeInUse)
				case err != nil:
					t.Errorf("pause: %v", err)
				}
			})
			if tt.before == "" {
				s.wantExports("after the reload", "z ready config")
				s.stop()
				return
			}
			if tt.refused {
				if err := s.ctl.Pause(t.Context(), "a", time.Minute); err != nil {
					t.Errorf("pause after the reload: %v", err)
				}
			}
			s.wantExports("after the reload", "a paused config", "z ready config")
			if err := s.ctl.Resume(t.Context(), "a"); err != nil {
				t.Errorf("resume: %v", err)
			}
			s.stop()
		})
	}
}

// TestNothingIsKeptThatAReloadLeavesNoRoomFor: neither by a name that comes, also if
// the export of the reload has been removed, nor in a rate group that goes.
func TestNothingIsKeptThatAReloadLeavesNoRoomFor(t *testing.T) {
	t.Parallel()
	s := newService(t, "[rate-group.g]\nops = 1000\n"+exportZ)
	a := config.Export{Name: "a", Image: filepath.Join(s.dir, "b.img"), Format: "raw"}
	k := config.Export{Name: "k", Image: "1M", Format: "mem", RateGroup: "g"}
	add := func(x config.Export, persist bool) error {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: x, Persist: persist})
		return err
	}
	err := s.meanwhile(exportA+exportZ+anew, func() {
		if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "one that is kept by a name that comes", add(a, true), api.CodeExists)
		for _, persist := range []bool{true, false} {
			wantCode(t, "one in a group that goes", add(k, persist), api.CodeInvalid)
		}
		if err := add(a, false); err != nil {
			t.Errorf("one that is not kept: %v", err)
		}
		_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "top.qcow2")})
		wantCode(t, "a snapshot, for which it would be kept", err, api.CodeExists)
	})
	if err != nil {
		t.Errorf("reload: %v", err)
	}
	if got := s.kept(); len(got) > 0 {
		t.Errorf("kept are %q", got)
	}
	s.stop()
	s.start()
	s.wantExports("after a restart", "a ready config", "z ready config")
	s.stop()
}

// exportOwn is the listener of one export, at the socket own.
const exportOwn = "[[export.listener]]\nuri = \"nbd+unix:///?socket=DIR/own\"\n"

// otherStores are exports called a, before and after a reload that has them keep what
// clients write in another place.
var otherStores = map[string]struct{ before, after string }{
	"an overlay comes":         {exportA, exportA + overlayTable},
	"an overlay goes":          {exportA + overlayTable, exportA},
	"another image":            {exportA, strings.Replace(exportA, "a.img", "b.img", 1)},
	"another part of it":       {exportA, exportA + "window = { offset = \"512K\" }\n"},
	"another size of memory":   {memExport("a", "1M", ""), memExport("a", "2M", "")},
	"at a listener of its own": {exportA + exportOwn, exportA + overlayTable + exportOwn},
}

// tryToWrite is write for a client that may find no export.
func (s *testService) tryToWrite(uri, byteAs, at string) (done bool) {
	s.Helper()
	out, err := tool(s.T, s.dir, "qemu-io", "-f", "raw", "-c", "write -P "+byteAs+" "+at+" 64k", "-c", "flush", uri)
	if done = err == nil; done && strings.Contains(out, "failed") {
		s.Errorf("an export that can be opened takes no writes: %s", out)
	}
	return done
}

// TestReloadThatFailsLosesNoWrites to another place than that in which they are kept
// before and after it: while the reload may be undone clients write to the first, or
// find no export.
func TestReloadThatFailsLosesNoWrites(t *testing.T) {
	t.Parallel()
	for what, a := range otherStores {
		for when, z := range map[string]string{"is to be closed": exportZ + anew, "is open as it shall be": memExport("z", "2M", "")} {
			t.Run(what+", and it "+when, func(t *testing.T) {
				t.Parallel()
				s := newService(t, a.before+exportZ+unixListener("goes", ""))
				busy, err := net.Listen("unix", filepath.Join(s.dir, "busy"))
				if err != nil {
					t.Fatal(err)
				}
				defer busy.Close()
				uri := s.uri("a")
				if strings.Contains(a.before, exportOwn) {
					uri = "nbd+unix:///a?socket=" + filepath.Join(s.dir, "own")
				}
				if !s.tryToWrite(uri, "0x41", "0") {
					t.Fatal("a cannot be opened before the reload")
				}
				written := "0"
				if err := s.meanwhile(a.after+z+unixListener("busy", ""), func() {
					if s.tryToWrite(uri, "0x42", "256k") {
						written = "0x42"
					}
				}); err == nil {
					t.Error("the reload opened a listener where another server listens")
				}
				s.wantExports("after the reload that failed", "a ready config", "z ready config")
				out, err := tool(t, s.dir, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x41 0 64k", "-c", "read -P "+written+" 256k 64k", uri)
				if err != nil || strings.Contains(out, "Pattern") {
					t.Errorf("a does not read 0x41 at 0 and %s at 256k: %v: %s", written, err, out)
				}
				s.stop()
				for _, name := range []string{"a.img", "b.img"} {
					b, err := os.ReadFile(filepath.Join(s.dir, name))
					if err != nil {
						t.Fatal(err)
					}
					if kept := name == "a.img" && strings.HasPrefix(a.before, exportA) && !strings.Contains(a.before, overlayTable); !kept && slices.Max(b) > 0 {
						t.Errorf("%s has bytes of what is thrown away", name)
					}
				}
			})
		}
	}
}

// TestReloadShowsAnotherStoreWhenItIsDone: nobody finds an export before that which
// keeps what clients write in another place, at its own listener neither; and everybody
// while what goes still waits for clients.
func TestReloadShowsAnotherStoreWhenItIsDone(t *testing.T) {
	t.Parallel()
	for what, a := range otherStores {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newService(t, a.before+exportZ)
			uri := s.uri("a")
			if strings.Contains(a.before, exportOwn) {
				uri = "nbd+unix:///a?socket=" + filepath.Join(s.dir, "own")
			}
			z := memExport("z", "2M", "")
			if err := s.meanwhile(a.after+z, func() {
				if got := s.size(uri); got != "" {
					t.Errorf("during the reload: a can be opened, and has %s bytes", got)
				}
			}); err != nil {
				t.Errorf("reload: %v", err)
			}
			if !s.tryToWrite(uri, "0x42", "0") {
				t.Error("a cannot be opened after the reload")
			}
			if err := s.reload(a.before + z); err != nil {
				t.Error(err)
			}
			if err := s.meanwhile(a.after, func() {
				if !s.tryToWrite(uri, "0x42", "0") {
					t.Error("a cannot be opened when all is done but that z goes")
				}
			}); err != nil {
				t.Errorf("reload that removes z: %v", err)
			}
			s.wantExports("after all", "a ready config")
			s.stop()
		})
	}
}

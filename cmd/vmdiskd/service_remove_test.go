package main

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// kept are the names of the files in the folder of kept exports that export
// something.
func (s *testService) kept() (list []string) {
	s.Helper()
	all, err := os.ReadDir(filepath.Join(s.dir, "state"))
	if err != nil {
		s.Fatal(err)
	}
	for _, f := range all {
		if f.Name()[0] != '.' {
			list = append(list, f.Name())
		}
	}
	return list
}

// keep adds an export of memory that is kept.
func (s *testService) keep(name string, faults ...config.Fault) {
	s.Helper()
	x := config.Export{Name: name, Format: "mem", Image: "1M", Faults: faults}
	if _, err := s.ctl.Add(s.Context(), api.AddExport{Export: x, Persist: true}); err != nil {
		s.Fatal(err)
	}
}

// TestRemovedExportStaysRemoved: also if it is changed at the same time.
func TestRemovedExportStaysRemoved(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	for round := range 50 {
		s.keep("a")
		changed := make(chan error, 1)
		go func() {
			text := "changed"
			ctl := control.Dial(filepath.Join(s.dir, "control"))
			_, err := ctl.Patch(t.Context(), "a", api.Patch{Description: &text})
			changed <- err
		}()
		if err := s.ctl.Remove(t.Context(), "a", true, time.Minute); err != nil {
			t.Fatal(err)
		}
		err := <-changed
		if got := s.kept(); len(got) != 0 {
			t.Fatalf("round %d: kept after it was removed: %q (the change ended with %v)", round, got, err)
		}
	}
	s.stop()
}

// TestExportThatLeavesIsNotChanged: who asks for that is told at once, and not
// when the last client has left.
func TestExportThatLeavesIsNotChanged(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	held := config.Fault{Ops: []string{"flush"}, Delay: config.Duration(limits.InjectDelay)}
	s.keep("a", held)
	removed := make(chan error, 1)
	go func() {
		removed <- control.Dial(filepath.Join(s.dir, "control")).Remove(t.Context(), "a", true, time.Minute)
	}()
	s.await("the export leaves", func() bool { return slices.Equal(s.states(), []string{"a draining"}) })
	text := "changed"
	_, err := s.ctl.Patch(t.Context(), "a", api.Patch{Description: &text})
	wantCode(t, "change", err, api.CodeInUse)
	_, err = s.ctl.Resize(t.Context(), "a", api.Resize{Size: 2 << 20})
	wantCode(t, "resize", err, api.CodeInUse)
	_, err = s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: filepath.Join(s.dir, "o")})
	wantCode(t, "snapshot", err, api.CodeInUse)
	wantCode(t, "pause", s.ctl.Pause(t.Context(), "a", 0), api.CodeInUse)
	select {
	case err := <-removed:
		t.Errorf("the removal did not last as long as this test needs it: %v", err)
	default:
	}
}

// TestRemovalThatIsInterruptedLeavesTheExport: when nobody waits any more for its clients
// it can be opened and changed, and it is kept.
func TestRemovalThatIsInterruptedLeavesTheExport(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("b")
	s.hang("b")
	s.leave(func(ctx context.Context) error { return s.ctl.Remove(ctx, "b", true, time.Minute) })
	s.await("b is ready", func() bool { return slices.Equal(s.states(), []string{"b ready"}) })
	s.setRate("b", config.Rate{})
	s.open("b").reads(1)
	if got := s.kept(); !slices.Equal(got, []string{"b.json"}) {
		t.Errorf("kept are %q, want b.json", got)
	}
	if err := s.ctl.Remove(t.Context(), "b", true, time.Minute); err != nil {
		t.Errorf("a removal by who stays: %v", err)
	}
	s.stop()
}

// TestExportIsForgottenAlthoughItsFlushFails: the failure is told, once, and the
// export does not come back.
func TestExportIsForgottenAlthoughItsFlushFails(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("a", config.Fault{Ops: []string{"flush"}, Error: "EIO"})
	err := s.ctl.Remove(t.Context(), "a", true, time.Minute)
	if wantCode(t, "removal", err, api.CodeFailed); err != nil && !strings.Contains(err.Error(), "is removed, but") {
		t.Errorf("removal: got %v, want it to say that the export is removed", err)
	}
	if got := s.kept(); len(got) != 0 {
		t.Errorf("kept after it was removed: got %q, want nothing", got)
	}
	wantCode(t, "a second removal", s.ctl.Remove(t.Context(), "a", true, time.Minute), api.CodeNotFound)
	s.stop()
}

// TestExportThatCannotBeForgottenStays, and its clients too.
func TestExportThatCannotBeForgottenStays(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("a")
	k := s.open("a")
	state := filepath.Join(s.dir, "state")
	s.rename(state, state+"2")
	if err := s.ctl.Remove(t.Context(), "a", true, time.Minute); err == nil {
		t.Error("removal without the folder of its file: no error")
	}
	s.wantExports("afterwards", "a ready state")
	k.reads(1)
	s.rename(state+"2", state)
	if err := s.ctl.Remove(t.Context(), "a", true, time.Minute); err != nil {
		t.Error(err)
	}
	if got, files := s.states(), s.kept(); len(got)+len(files) != 0 {
		t.Errorf("after the next: got %q and %q, want nothing", got, files)
	}
	s.stop()
}

func (s *testService) rename(from, to string) {
	s.Helper()
	if err := os.Rename(from, to); err != nil {
		s.Fatal(err)
	}
}

// TestExportThatCannotBeForgottenIsShown, where that could be foreseen by nobody: until
// it can be. It is closed.
func TestExportThatCannotBeForgottenIsShown(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("a")
	s.hang("a")
	first := make(chan error, 1)
	go func() {
		first <- control.Dial(filepath.Join(s.dir, "control")).Remove(t.Context(), "a", true, time.Minute)
	}()
	s.await("the export leaves", func() bool { return slices.Equal(s.states(), []string{"a draining"}) })
	state := filepath.Join(s.dir, "state")
	s.rename(state, state+"2")
	s.letGo("a")
	for _, remove := range []func() error{
		func() error { return <-first },
		func() error { return s.ctl.Remove(t.Context(), "a", true, time.Minute) },
	} {
		if err := remove(); err == nil {
			t.Error("removal without the folder of its file: no error")
		}
		if got := s.states(); !slices.Equal(got, []string{"a failed"}) {
			t.Errorf("afterwards: got %q, want it failed", got)
		}
	}
	if got := s.size(s.uri("a")); got != "" {
		t.Errorf("its size: got %q, want that it is not served", got)
	}
	s.rename(state+"2", state)
	if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
		t.Error(err)
	}
	if got, files := s.states(), s.kept(); len(got)+len(files) != 0 {
		t.Errorf("after the next: got %q and %q, want nothing", got, files)
	}
	s.stop()
}

// TestTwoExportsOfOneNameServeNeither: one of the configuration, and one that was
// kept before. A guest that connects again never gets the disk of another, and the
// empty name neither; when one of the two goes, the other can be served.
func TestTwoExportsOfOneNameServeNeither(t *testing.T) {
	t.Parallel()
	for _, goes := range []string{"the one that was kept", "the one of the configuration"} {
		s := newService(t, exportB)
		kept := config.Export{Name: "a", Image: filepath.Join(s.dir, "c.img")}
		if err := os.WriteFile(kept.Image, make([]byte, 2<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: kept, Persist: true}); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "a reload to two of one name", s.reload(exportB+exportA), api.CodeExists)
		_, err := s.ctl.Reload(t.Context(), true)
		wantCode(t, "what it would do", err, api.CodeExists)
		s.stop()
		s.configure(exportA + "default = true\n" + exportB)
		s.start()
		s.wantExports("with both", "a failed state", "b ready config")
		for _, name := range []string{"a", ""} {
			if got := s.size(s.uri(name)); got != "" {
				t.Errorf("with both, name %q: got a disk of %s bytes, want none", name, got)
			}
		}
		x, err := s.ctl.Status(t.Context())
		for _, image := range []string{"a.img", "c.img"} {
			if why := x.Notes["export a"]; err != nil || !strings.Contains(why, filepath.Join(s.dir, image)) {
				t.Errorf("status: got %q, %v, want the name of %s", why, err, image)
			}
		}
		if got := s.metric(`export_info{export="a",state="failed"}`); got != 1 {
			t.Errorf("metrics: a failed: got %v, want 1", got)
		}
		if r, err := s.ctl.Reload(t.Context(), false); err != nil || len(r.Changes) > 0 {
			t.Errorf("reload with both: got %q, %v, want no changes", r.Changes, err)
		}
		want := "1048576"
		if goes == "the one that was kept" {
			if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
				t.Error(err)
			}
			s.wantExports("without the file", "a failed config", "b ready config")
		} else {
			s.configure(exportB)
			want = "2097152"
		}
		r, err := s.ctl.Reload(t.Context(), false)
		if err != nil || !slices.Contains(r.Changes, `export "a" is open`) {
			t.Errorf("reload without %s: got %q, %v, want a tried again", goes, r.Changes, err)
		}
		if got := s.size(s.uri("a")); got != want {
			t.Errorf("without %s: got a disk of %q bytes, want %s", goes, got, want)
		}
		s.stop()
	}
}

// TestNameOfTheConfigurationIsNotKept: neither by adding another export of that
// name, nor by a snapshot of one.
func TestNameOfTheConfigurationIsNotKept(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
		t.Fatal(err)
	}
	add := func(persist bool) error {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "a", Image: filepath.Join(s.dir, "b.img")}, Persist: persist})
		return err
	}
	wantCode(t, "add to be kept", add(true), api.CodeExists)
	if err := add(false); err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(s.dir, "top.qcow2")
	_, err := s.ctl.Snapshot(t.Context(), "a", api.Snapshot{Overlay: overlay})
	wantCode(t, "snapshot", err, api.CodeExists)
	if got := s.kept(); len(got) != 0 || exists(overlay) {
		t.Errorf("kept: got %q, overlay %t, want neither", got, exists(overlay))
	}
	s.stop()
}

// TestFailedExportKeepsItsName: until it is removed, or another is kept in its
// place. Nothing that is not served comes back with the next start.
func TestFailedExportKeepsItsName(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	image, away := filepath.Join(s.dir, "a.img"), filepath.Join(s.dir, "away")
	add := func(image string, persist bool) error {
		_, err := s.ctl.Add(t.Context(), api.AddExport{Export: config.Export{Name: "a", Image: image}, Persist: persist})
		return err
	}
	if err := add(image, true); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if err := os.Rename(image, away); err != nil {
		t.Fatal(err)
	}
	s.start()
	other, nothing := filepath.Join(s.dir, "b.img"), filepath.Join(s.dir, "nothing")
	wantCode(t, "another that is not kept", add(other, false), api.CodeExists)
	wantCode(t, "another that cannot be opened", add(nothing, true), api.CodeInvalid)
	x, err := s.ctl.Export(t.Context(), "a")
	if err != nil || x.State != "failed" || x.Image != image {
		t.Errorf("after both: got %+v, %v, want the first one, failed", x, err)
	}
	if err := add(other, true); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.start()
	if x, err := s.ctl.Export(t.Context(), "a"); err != nil || x.State != "ready" || x.Image != other {
		t.Errorf("kept in its place: got %+v, %v, want %s", x, err, other)
	}
	if err := s.ctl.Remove(t.Context(), "a", false, 0); err != nil {
		t.Error(err)
	}
	if got := s.kept(); len(got) != 0 {
		t.Errorf("kept after it was removed: got %q, want nothing", got)
	}
	s.stop()
}

// TestDamagedFileHoldsUpNoOther: the service starts without it, says so, and
// removes it when it is told to.
func TestDamagedFileHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	s.keep("b")
	s.stop()
	damaged := filepath.Join(s.dir, "state", "zz.json")
	if err := os.WriteFile(damaged, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	if got := s.states(); !slices.Equal(got, []string{"a ready", "b ready"}) {
		t.Errorf("got %q, want a and b", got)
	}
	x, err := s.ctl.Status(t.Context())
	if err != nil || !strings.Contains(x.Notes["state"], damaged) {
		t.Errorf("status: got notes %q, %v, want that they name %s", x.Notes, err, damaged)
	}
	s.wantLogged(damaged)
	if err := s.ctl.Remove(t.Context(), "zz", false, 0); err != nil {
		t.Error(err)
	}
	if got := s.kept(); !slices.Equal(got, []string{"b.json"}) {
		t.Errorf("kept after the damaged one was removed: got %q, want b.json", got)
	}
	s.stop()
}

// TestChangeThatCannotBeKeptIsNone: as a whole or not at all.
func TestChangeThatCannotBeKeptIsNone(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("a")
	before, err := s.ctl.Export(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(s.dir, "state")
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	yes, text := true, "changed"
	p := api.Patch{ReadOnly: &yes, Description: &text, LogRequests: &yes, Rate: &config.Rate{Ops: 1}, Faults: &[]config.Fault{{Ops: []string{"read"}, Error: "EIO"}}}
	if _, err := s.ctl.Patch(t.Context(), "a", p); err == nil {
		t.Error("a change without the folder of its file: no error")
	}
	after, err := s.ctl.Export(t.Context(), "a")
	if err != nil || !reflect.DeepEqual(before, after) {
		t.Errorf("afterwards: got %+v, %v, want %+v", after, err, before)
	}
	// Twice, so that one of them would have waited for the rate.
	for range 2 {
		if out, err := tool(t, s.dir, "qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", "-c", "read -P 5 0 4k", s.uri("a")); err != nil || strings.Contains(out, "failed") {
			t.Errorf("write and read: %v: %s", err, out)
		}
	}
	s.stop()
}

// TestStateIsForOneService: another would remove what the first has kept.
func TestStateIsForOneService(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	s.keep("a")
	b, err := os.ReadFile(filepath.Join(s.dir, "conf"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := strings.NewReplacer(s.dir+"/control", dir+"/control", s.dir+"/nbd", dir+"/nbd").Replace(string(b))
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, confine := range []string{"auto", "off"} {
		fails(t, program("--config", conf, "--confine="+confine), "another daemon keeps its exports there")
	}
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != 1 {
		t.Errorf("files of the second: got %v, %v, want its configuration alone", all, err)
	}
	s.stop()
	s.start()
	if got := s.states(); !slices.Equal(got, []string{"a ready"}) {
		t.Errorf("the first again: got %q, want a", got)
	}
	s.stop()
}

// TestExportThatCannotBeKeptIsNotAdded: and can be added when it can.
func TestExportThatCannotBeKeptIsNotAdded(t *testing.T) {
	t.Parallel()
	s := newService(t, "")
	state := filepath.Join(s.dir, "state")
	if err := os.Rename(state, state+"2"); err != nil {
		t.Fatal(err)
	}
	x := config.Export{Name: "a", Format: "mem", Image: "1M"}
	if _, err := s.ctl.Add(t.Context(), api.AddExport{Export: x, Persist: true}); err == nil {
		t.Error("add without the folder of its file: no error")
	}
	if got := s.states(); len(got) != 0 {
		t.Errorf("afterwards: got %q, want nothing", got)
	}
	if err := os.Rename(state+"2", state); err != nil {
		t.Fatal(err)
	}
	s.keep("a")
	s.stop()
}

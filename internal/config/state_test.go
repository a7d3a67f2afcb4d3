package config_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// stateDir is a folder for exports, whatever the umask is.
func stateDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// keep writes an export that is expected to be kept.
func keep(t *testing.T, dir string, e config.Export) {
	t.Helper()
	if err := config.WriteExport(dir, e, nil, 0); err != nil {
		t.Fatal(err)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range list {
		names = append(names, f.Name())
	}
	return names
}

func TestAnyNameIsKeptInTheFolder(t *testing.T) {
	dir := stateDir(t)
	names := []string{
		"a", "A", ".", "..", "../../etc/passwd", "/", "-rf", "a b", "a\nb", `q"'`, "%2E", "~", ".json", ".a.json.new", "ü",
		strings.Repeat("/", 66), strings.Repeat("/", 67), strings.Repeat("a", 200), strings.Repeat("a", 201), strings.Repeat("a", limits.MaxString),
		strings.Repeat("a", limits.MaxString-1) + "b",
	}
	for _, name := range names {
		keep(t, dir, config.Export{Name: name, Image: "/" + name})
	}
	if got := files(t, dir); len(got) != len(names) {
		t.Errorf("%d names have %d files: %q", len(names), len(got), got)
	}
	list, _, err := config.ReadExports(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, e := range list {
		got[e.Name] = e.Image == "/"+e.Name
	}
	for _, name := range names {
		if !got[name] {
			t.Errorf("%.50q did not come back", name)
		}
		if !config.HasExport(dir, name) {
			t.Errorf("%.50q is said not to be kept", name)
		}
		if err := config.RemoveExport(dir, name); err != nil {
			t.Error(err)
		}
	}
	if got := files(t, dir); got != nil {
		t.Errorf("left: %q", got)
	}
	if err := config.RemoveExport(dir, "a"); err != nil || config.HasExport(dir, "a") {
		t.Errorf("removed twice: %v, or it is kept all the same", err)
	}
}

func TestKeptExportsComeBackWhole(t *testing.T) {
	dir := stateDir(t)
	c := parsed(t, whole)
	for _, e := range c.Exports {
		keep(t, dir, e)
	}
	changed := c.Exports[1]
	changed.Description = "changed"
	keep(t, dir, changed)
	list, _, err := config.ReadExports(dir)
	if err != nil || len(list) != 2 || !sameJSON(t, list[0], c.Exports[0]) || !sameJSON(t, list[1], changed) {
		t.Errorf("got %+v, %v", list, err)
	}
	i, err := os.Stat(filepath.Join(dir, "a.json"))
	if err != nil || i.Mode() != 0o600 {
		t.Errorf("mode %v, %v", i.Mode(), err)
	}
	large := config.Export{Name: "large", Image: "/l", Protect: many(limits.ProtectRanges, config.Range{Offset: 1 << 50, Length: 1 << 50})}
	keep(t, dir, large)
	if list, _, err = config.ReadExports(dir); err != nil || len(list) != 3 || len(list[2].Protect) != limits.ProtectRanges {
		t.Errorf("a large export: %v", err)
	}
}

// TestKeptExportsComeInTheirOrder, however often they are written; those without one
// come first, by their names.
func TestKeptExportsComeInTheirOrder(t *testing.T) {
	dir := stateDir(t)
	write := func(name string, order int) {
		t.Helper()
		if err := config.WriteExport(dir, config.Export{Name: name, Image: "/" + name}, nil, order); err != nil {
			t.Fatal(err)
		}
	}
	in := func(when string, wantLast int, want ...string) {
		t.Helper()
		var got []string
		list, last, err := config.ReadExports(dir)
		for _, e := range list {
			got = append(got, e.Name)
		}
		if err != nil || last != wantLast || !slices.Equal(got, want) {
			t.Errorf("%s: got %q, the last %d, %v, want %q, %d", when, got, last, err, want, wantLast)
		}
	}
	in("none", 0)
	for order, name := range []string{"y", "b", "d", "a"} {
		write(name, order)
	}
	keep(t, dir, config.Export{Name: "x", Image: "/x"})
	in("written", 3, "x", "y", "b", "d", "a")
	write("b", 7)
	write("x", 8)
	in("written again", 3, "x", "y", "b", "d", "a")
	if err := config.RemoveExport(dir, "b"); err != nil {
		t.Fatal(err)
	}
	write("b", 4)
	in("removed and made again", 4, "x", "y", "d", "a", "b")
	if b, err := os.ReadFile(filepath.Join(dir, "x.json")); err != nil || strings.Contains(string(b), "order") {
		t.Errorf("without an order the file is %q, %v", b, err)
	}
}

func TestWhatCannotComeBackIsNotKept(t *testing.T) {
	dir := stateDir(t)
	keep(t, dir, config.Export{Name: "a", Image: "/a"})
	for name, e := range map[string]config.Export{
		"descriptor":         {Name: "a", Image: "fd:0"},
		"backing descriptor": {Name: "a", Image: "/a", BackingFiles: []string{"fd:1:qcow2"}},
		"no name":            {Image: "/a"},
		"name":               {Name: "a\xff", Image: "/a"},
		"text":               {Name: "a", Image: "/a\xff"},
		"size":               {Name: "a", Image: "/a", Description: strings.Repeat("a", limits.StateFile)},
		"negative":           {Name: "a", Image: "/a", Overlay: &config.Overlay{Quota: -1}},
	} {
		if err := config.WriteExport(dir, e, nil, 0); err == nil {
			t.Errorf("%s: kept", name)
		}
	}
	list, _, err := config.ReadExports(dir)
	if err != nil || len(list) != 1 || list[0].Image != "/a" || len(files(t, dir)) != 1 {
		t.Errorf("got %+v, %v, files %q", list, err, files(t, dir))
	}
}

func TestBadFilesDoNotHideTheOthers(t *testing.T) {
	dir := stateDir(t)
	keep(t, dir, config.Export{Name: "a", Image: "/a"})
	keep(t, dir, config.Export{Name: "z", Image: "/z"})
	for name, text := range map[string]string{
		"empty.json": "", "cut.json": `{"name":"cut"`, "other.json": `{"name":"a","image":"/b"}`,
		"stray": "x", "twice.json": `{"name":"twice","name":"twice"}`, ".b.json.new": `{"name":"b"`,
		"size.json": strings.Repeat(" ", limits.StateFile+2),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	outside := filepath.Join(t.TempDir(), "link.json")
	if err := os.WriteFile(outside, []byte(`{"name":"link"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "link.json")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	list, _, err := config.ReadExports(dir)
	if len(list) != 2 || list[0].Name != "a" || list[1].Name != "z" {
		t.Errorf("got %+v", list)
	}
	for _, name := range []string{"empty", "cut", "other", "stray", "twice", "size", "link", "fifo"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in: %v", name, err)
		}
	}
}

func TestFolderOfOthersIsRefused(t *testing.T) {
	dir := stateDir(t)
	keep(t, dir, config.Export{Name: "a", Image: "/a"})
	refused := func(what, dir string) {
		t.Helper()
		if err := config.WriteExport(dir, config.Export{Name: "b", Image: "/b"}, nil, 0); err == nil {
			t.Errorf("%s: kept", what)
		}
		if list, _, err := config.ReadExports(dir); err == nil || list != nil {
			t.Errorf("%s: read %+v", what, list)
		}
		if err := config.MayRemoveExport(dir, "a"); err == nil {
			t.Errorf("%s: may be removed", what)
		}
		if err := config.RemoveExport(dir, "a"); err == nil {
			t.Errorf("%s: removed", what)
		}
	}
	for _, mode := range []os.FileMode{0o777, 0o770, 0o702} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		refused(mode.String(), dir)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	refused("a file", filepath.Join(dir, "a.json"))
	if os.Geteuid() == 0 { // only root gives folders away
		if err := os.Chown(dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		refused("of nobody", dir)
		if err := os.Chown(dir, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if list, _, err := config.ReadExports(dir); err != nil || len(list) != 1 {
		t.Errorf("got %+v, %v", list, err)
	}
}

// TestRemovalIsTried and leaves the folder as it was.
func TestRemovalIsTried(t *testing.T) {
	dir := stateDir(t)
	keep(t, dir, config.Export{Name: "a", Image: "/a"})
	if err := config.MayRemoveExport(dir, "a"); err != nil {
		t.Error(err)
	}
	if got := files(t, dir); !slices.Equal(got, []string{"a.json"}) {
		t.Errorf("afterwards: got %q, want a.json", got)
	}
	for _, dir := range []string{filepath.Join(dir, "gone"), "/proc/self/fdinfo"} { // where nobody can make files
		if err := config.MayRemoveExport(dir, "a"); err == nil {
			t.Errorf("%s: no error", dir)
		}
	}
}

// What stood under the name is there until the new file is complete, and a
// link in the place of the new file is not followed.
func TestWriteIsAtomic(t *testing.T) {
	dir := stateDir(t)
	keep(t, dir, config.Export{Name: "a", Image: "/old"})
	outside := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(outside, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(dir, ".a.json.new")
	if err := os.Symlink(outside, temp); err != nil {
		t.Fatal(err)
	}
	if err := config.WriteExport(dir, config.Export{Name: "a", Image: "/new"}, nil, 0); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("wrote through a link: %v", err)
	}
	if b, err := os.ReadFile(outside); err != nil || string(b) != "mine" {
		t.Errorf("the file behind the link: %q, %v", b, err)
	}
	if list, _, err := config.ReadExports(dir); err != nil || list[0].Image != "/old" {
		t.Errorf("got %+v, %v", list, err)
	}
	// An interrupted write is no obstacle.
	if err := os.WriteFile(temp, []byte(strings.Repeat("x", 10000)), 0o600); err != nil {
		t.Fatal(err)
	}
	keep(t, dir, config.Export{Name: "a", Image: "/new"})
	if list, _, err := config.ReadExports(dir); err != nil || len(list) != 1 || list[0].Image != "/new" || len(files(t, dir)) != 1 {
		t.Errorf("got %+v, %v, files %q", list, err, files(t, dir))
	}
	gone := filepath.Join(dir, "gone")
	if err := config.WriteExport(gone, config.Export{Name: "a"}, nil, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if _, _, err := config.ReadExports(gone); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if err := config.RemoveExport(gone, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

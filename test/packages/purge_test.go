package packages_test

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// purge runs the script that dpkg runs at last, for the tree beneath root.
func purge(t *testing.T, root string) {
	t.Helper()
	cmd := exec.Command("sh", filepath.Join(testenv.Root(), "packaging", "scripts", "postremove.sh"), "purge")
	cmd.Env = append(os.Environ(), "DPKG_ROOT="+root)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("purge: %v\n%s", err, out)
	}
}

// keep makes what a daemon keeps in a folder: an export, an overlay, its lock, and
// what it leaves if it ends in the middle of a write.
func keep(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", ".%2F", "~"} {
		x := config.Export{Name: name, Image: "/a.img"}
		if err := config.WriteExport(dir, x, nil, 1); err != nil {
			t.Fatal(err)
		}
		if err := config.WriteInstead(dir, config.Instead{Of: x, Serve: x}); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := config.LockState(dir)
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
	touch(t, filepath.Join(dir, ".a.json.new"), filepath.Join(dir, "..overlay=a.json.new"), filepath.Join(dir, ".a.json.try"))
}

func touch(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// files are those beneath a folder, which may be absent, and the links.
func files(t *testing.T, dir string) []string {
	t.Helper()
	all := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			all[path] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(all))
}

// TestPurgeLeavesImages, wherever the folders of the service have them, and what
// links in its folders point to.
func TestPurgeLeavesImages(t *testing.T) {
	root := t.TempDir()
	lib, other := filepath.Join(root, "var/lib/vmdiskd"), filepath.Join(root, "srv")
	keep(t, filepath.Join(lib, "exports"))
	keep(t, filepath.Join(lib, "vm/x"))
	keep(t, filepath.Join(lib, "vm/y y"))
	keep(t, filepath.Join(other, "linked"))
	if err := os.Symlink(filepath.Join(other, "linked"), filepath.Join(lib, "vm/z")); err != nil {
		t.Fatal(err)
	}
	touch(t, filepath.Join(lib, "images/a.img"), filepath.Join(lib, "exports/b.qcow2"), filepath.Join(lib, "vm/x/.overlay=a"),
		filepath.Join(lib, "vm/x/disk.img"), filepath.Join(lib, "vm/x/below/c.json"), filepath.Join(lib, "vm/d.json"))
	want := append(files(t, other), filepath.Join(lib, "vm/z"), filepath.Join(lib, "images/a.img"), filepath.Join(lib, "exports/b.qcow2"),
		filepath.Join(lib, "vm/x/.overlay=a"), filepath.Join(lib, "vm/x/disk.img"), filepath.Join(lib, "vm/x/below/c.json"),
		filepath.Join(lib, "vm/d.json"))
	slices.Sort(want)
	purge(t, root)
	if got := files(t, root); !slices.Equal(got, want) {
		t.Errorf("a purge leaves\n%q, want\n%q", got, want)
	}
	if _, err := os.Lstat(filepath.Join(lib, "vm/y y")); err == nil {
		t.Error("a purge leaves the empty folder of an instance")
	}
}

// TestPurgeLeavesWhatAFolderIsALinkTo: the user of the service can make one.
func TestPurgeLeavesWhatAFolderIsALinkTo(t *testing.T) {
	for _, folder := range []string{"exports", "vm"} {
		t.Run(folder, func(t *testing.T) {
			root := t.TempDir()
			lib, other := filepath.Join(root, "var/lib/vmdiskd"), filepath.Join(root, "srv")
			keep(t, other)
			keep(t, filepath.Join(other, "x"))
			if err := os.MkdirAll(filepath.Join(other, "empty"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(lib, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(other, filepath.Join(lib, folder)); err != nil {
				t.Fatal(err)
			}
			want := files(t, other)
			purge(t, root)
			if got := files(t, other); !slices.Equal(got, want) {
				t.Errorf("a purge leaves\n%q, want\n%q", got, want)
			}
			if _, err := os.Stat(filepath.Join(other, "empty")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPurgeLeavesNothingOfTheService where there are no images.
func TestPurgeLeavesNothingOfTheService(t *testing.T) {
	root := t.TempDir()
	purge(t, root) // where nothing is
	lib := filepath.Join(root, "var/lib/vmdiskd")
	keep(t, filepath.Join(lib, "exports"))
	keep(t, filepath.Join(lib, "vm/x"))
	for _, dir := range []string{filepath.Join(lib, "images"), filepath.Join(root, "etc/vmdiskd/vm"), filepath.Join(root, "etc/vmdiskd/swap")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	touch(t, filepath.Join(root, "run/vmdiskd/x/control.sock"))
	purge(t, root)
	for _, dir := range []string{lib, filepath.Join(root, "etc/vmdiskd"), filepath.Join(root, "run/vmdiskd")} {
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("a purge leaves %q", dir)
		}
	}
}

package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// TestBaseIsFoundByItsPathOrItsNumbers: numbers alone are another file's after a
// restart, unless that was made at the same time.
func TestBaseIsFoundByItsPathOrItsNumbers(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	below := []config.File{{Path: "/i/base", Dev: 1, Ino: 2, Born: 3}, {Path: "/dev/mapper/base"}, {Dev: 4, Ino: 5}}
	if err := config.WriteExport(dir, config.Export{Name: "a", Image: "/i/top", Format: "qcow2"}, below, 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what string
		f    config.File
		want bool
	}{
		{"the file itself", below[0], true},
		{"another at its path", config.File{Path: "/i//base", Dev: 1, Ino: 9, Born: 9}, true},
		{"the file at another path", config.File{Path: "/j/base", Dev: 1, Ino: 2, Born: 3}, true},
		{"a later file with its number", config.File{Path: "/j/base", Dev: 1, Ino: 2, Born: 4}, false},
		{"a file with its number elsewhere", config.File{Path: "/j/base", Dev: 9, Ino: 2, Born: 3}, false},
		{"a device by its name", config.File{Path: "/dev/mapper/base", Dev: 7, Ino: 7, Born: 7}, true},
		{"another device", config.File{Path: "/dev/mapper/other"}, false},
		{"a file without a time", config.File{Path: "/j/base", Dev: 4, Ino: 5}, true},
		{"the overlay", config.File{Path: "/i/top"}, false},
		{"nothing that is known", config.File{}, false},
	} {
		var b bases
		base, found, err := b.find(dir, tt.f)
		if err != nil || found != tt.want || found && (base.Export != "a" || base.Overlay != "/i/top") {
			t.Errorf("%s: got %+v, %v, %v, want found %v", tt.what, base, found, err, tt.want)
		}
	}
}

// TestFileIsTheSameByAllItsNames, and by what a descriptor is called.
func TestFileIsTheSameByAllItsNames(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.WriteFile(at("a"), nil, 0o600), os.WriteFile(at("b"), nil, 0o600), os.Link(at("a"), at("hard")), os.Symlink("a", at("soft"))); err != nil {
		t.Fatal(err)
	}
	of := func(name, called string) config.File {
		fd, err := unix.Open(at(name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), called)
		defer f.Close()
		x := fileOf(f)
		if x.Ino == 0 || x.Path != at(name) && name != "soft" {
			t.Errorf("%s: got %+v", name, x)
		}
		return x
	}
	a, hard, b := of("a", "fd:0"), of("hard", at("hard")), of("b", at("b"))
	if soft := of("soft", at("soft")); soft != a {
		t.Errorf("by a symbolic link: got %+v, want %+v", soft, a)
	}
	if hard.Path = a.Path; hard != a {
		t.Errorf("by another name: got %+v, want %+v", hard, a)
	}
	if b.Path = a.Path; b == a {
		t.Errorf("another file: got the same, %+v", b)
	}
}

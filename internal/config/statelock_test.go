package config_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

func TestStateIsForOne(t *testing.T) {
	dir := stateDir(t)
	if config.StateInUse(dir) || files(t, dir) != nil {
		t.Errorf("a new folder: in use, or it has files %q", files(t, dir))
	}
	f, err := config.LockState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.LockState(dir); !errors.Is(err, config.ErrStateInUse) || !config.StateInUse(dir) {
		t.Errorf("a second: got %v, want %v", err, config.ErrStateInUse)
	}
	keep(t, dir, config.Export{Name: "a", Image: "/a"})
	if list, _, err := config.ReadExports(dir); err != nil || len(list) != 1 {
		t.Errorf("exports beside the lock: got %+v, %v, want one", list, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = config.LockState(dir); err != nil || f == nil {
		t.Fatalf("after the first: got %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestStateThatCannotBeLocked(t *testing.T) {
	dir := stateDir(t)
	if _, err := config.LockState(filepath.Join(dir, "nothing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: got %v, want %v", err, fs.ErrNotExist)
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, ".lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := config.LockState(dir); err == nil || config.StateInUse(dir) {
		t.Errorf("a link: got %v, want an error, and not that it is in use", err)
	}
}

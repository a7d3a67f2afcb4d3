package open_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
)

// TestGatheredFilesReplacePaths opens a chain twice: when its files are there,
// and after they have gone.
func TestGatheredFilesReplacePaths(t *testing.T) {
	for _, policy := range []open.Policy{
		{Mode: open.SameDir},
		{Mode: open.Explicit, Files: []open.File{{Path: "DIR/base.qcow2", Format: "qcow2"}}},
	} {
		for _, roots := range []bool{false, true} {
			t.Run(string(policy.Mode), func(t *testing.T) {
				dir := t.TempDir()
				chainIn(t, dir)
				s := chainSpec(t, filepath.Join(dir, "top.qcow2"), policy)
				if len(policy.Files) > 0 {
					s.Backing.Files = []open.File{{Path: filepath.Join(dir, "base.qcow2"), Format: "qcow2"}}
				}
				if roots {
					s.Roots = []string{dir}
				}
				table, err := open.Gather(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				files, dirs := table.Contents()
				if len(files) != 2 {
					t.Fatalf("gathered %v", files)
				}
				if err := os.Rename(dir, dir+".gone"); err != nil {
					t.Fatal(err)
				}
				s.Table = open.NewTable(files, dirs)
				d, err := open.Open(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				if got := make([]byte, 512); d.ReadAt(t.Context(), got, 0) != nil {
					t.Error("it cannot be read")
				}
				if len(files) != 0 {
					t.Errorf("not taken: %v", files)
				}
				s.Table.Close()
				if _, err := open.Open(t.Context(), s); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("opened a second time: %v", err)
				}
			})
		}
	}
}

// chainIn makes top.qcow2 above base.qcow2.
func chainIn(t *testing.T, dir string) {
	t.Helper()
	base := filepath.Join(dir, "base.qcow2")
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
	overlay(t, dir, "top.qcow2", "base.qcow2", "qcow2")
}

// TestGatherRefusesWhatOpenRefuses, and leaves nothing open or locked.
func TestGatherRefusesWhatOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	chainIn(t, dir)
	s := chainSpec(t, filepath.Join(dir, "top.qcow2"), open.Policy{})
	if _, err := open.Gather(t.Context(), s); !errors.Is(err, open.ErrDenied) {
		t.Errorf("a backing file by no policy: %v", err)
	}
	s.Backing = open.Policy{Mode: open.SameDir}
	table, err := open.Gather(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	d, err := open.Open(t.Context(), s) // by its paths
	if err != nil {
		t.Fatalf("what was gathered is locked: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Path, s.Format = fifo, "raw"
	if _, err := open.Gather(t.Context(), s); err == nil {
		t.Error("a FIFO was gathered")
	}
}

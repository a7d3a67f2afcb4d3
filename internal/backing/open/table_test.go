package open_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
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

// TestWrittenIsTheTopOfAChain, and nothing of what is opened read-only.
func TestWrittenIsTheTopOfAChain(t *testing.T) {
	dir := t.TempDir()
	chainIn(t, dir)
	top := filepath.Join(dir, "top.qcow2")
	var st unix.Stat_t
	if err := unix.Stat(top, &st); err != nil {
		t.Fatal(err)
	}
	for readOnly, want := range map[bool][]raw.ID{false: {raw.IDIn(&st)}, true: nil} {
		s := chainSpec(t, top, open.Policy{Mode: open.SameDir})
		s.ReadOnly = readOnly
		table, err := open.Gather(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := table.Written(); err != nil || !slices.Equal(got, want) {
			t.Errorf("read-only %t: got %v, %v, want %v", readOnly, got, err, want)
		}
		table.Close()
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

// asNobody runs f on a thread that has no more rights to files than others have.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		f()
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends
		if err := unix.Setfsuid(65534); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

// TestKnownFileStandsForItsPath puts an overlay above an image that is open, and
// may not be opened again.
func TestKnownFileStandsForItsPath(t *testing.T) {
	for _, roots := range []bool{false, true} {
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.img")
		err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755), os.WriteFile(path, make([]byte, 1<<20), 0o600))
		if err != nil {
			t.Fatal(err)
		}
		var files []*os.File
		s, _ := newSpec(t)
		s.Path, s.Format, s.Opened = path, "raw", func(f *os.File, _ bool) { files = append(files, f) }
		if roots {
			s.Roots = []string{dir}
		}
		d := mustOpen(t, s)
		if err := d.WriteAt(t.Context(), []byte("before"), 0, 0); err != nil || len(files) != 1 {
			t.Fatalf("write: %v, files %v", err, files)
		}
		next := s
		next.Path, next.Format, next.Opened = filepath.Join(dir, "top.qcow2"), "qcow2", nil
		next.Backing = open.Policy{Mode: open.Explicit, Files: []open.File{{Path: path, Format: "raw"}}}
		err = errors.Join(open.CreateOverlay(t.Context(), next, 1<<20, "disk.img", "raw"),
			os.Chmod(path, 0), os.Chmod(next.Path, 0o666))
		if err != nil {
			t.Fatal(err)
		}
		asNobody(t, func() {
			if table, err := open.Gather(t.Context(), next); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("gathered without the right to: %v, %v", table, err)
			}
			next.Known, s.Known = files, files
			for _, x := range []open.Spec{next, s} {
				table, err := open.Gather(t.Context(), x)
				if err != nil {
					t.Errorf("%s: %v", x.Path, err)
					continue
				}
				if got := table.Others(files); x.Path == path && len(got) != 0 || x.Path != path && !slices.Equal(got, []string{next.Path}) {
					t.Errorf("other files of %s: %q", x.Path, got)
				}
				if x.Path == next.Path {
					next.Table = table
				} else {
					table.Close()
				}
			}
		})
		if next.Table == nil {
			continue
		}
		if _, err := open.Open(t.Context(), next); !errors.Is(err, backing.ErrLocked) {
			t.Errorf("overlay above an image in use: %v, want %v", err, backing.ErrLocked)
		}
		asNobody(t, func() { next.Table, err = open.Gather(t.Context(), next) })
		if err := errors.Join(err, d.Close()); err != nil {
			t.Fatal(err)
		}
		above := mustOpen(t, next)
		p := make([]byte, 6)
		if err := above.ReadAt(t.Context(), p, 0); err != nil || string(p) != "before" {
			t.Errorf("read: %q, %v", p, err)
		}
		next.Table.Close()
	}
}

// TestFileInTheWayIsNotKnown: another file at the path of one that is open is
// neither it, nor opened in its place.
func TestFileInTheWayIsNotKnown(t *testing.T) {
	path := image(t, 4096)
	var files []*os.File
	s, _ := newSpec(t)
	s.Path, s.Format, s.Opened = path, "raw", func(f *os.File, _ bool) { files = append(files, f) }
	mustOpen(t, s)
	if err := errors.Join(os.Rename(path, path+".moved"), os.WriteFile(path, make([]byte, 4096), 0o600)); err != nil {
		t.Fatal(err)
	}
	s.Known, s.Opened = files, nil
	table, err := open.Gather(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if got := table.Others(files); !slices.Equal(got, []string{path}) {
		t.Errorf("other files: got %q, want the image", got)
	}
	table.Close()
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	asNobody(t, func() {
		if table, err := open.Gather(t.Context(), s); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("gathered another file's: %v, %v", table, err)
		}
	})
}

// TestMemoryIsOpenedAgain with the size that it had, when it was closed.
func TestMemoryIsOpenedAgain(t *testing.T) {
	d := mustOpen(t, open.Spec{Format: "mem", Path: "1M"})
	want := []byte("before")
	if err := d.WriteAt(t.Context(), want, 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, next := range []struct {
		size string
		want []byte
	}{{"1M", want}, {"1024K", want}, {"2M", make([]byte, len(want))}} {
		table, err := open.Again(d, nil, nil)
		if err := errors.Join(err, d.Close()); err != nil {
			t.Fatal(err)
		}
		d = mustOpen(t, open.Spec{Format: "mem", Path: next.size, Table: table})
		table.Close()
		got := make([]byte, len(want))
		if err := d.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, next.want) {
			t.Errorf("with %s: got %q, %v, want %q", next.size, got, err, next.want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestImageIsOpenedAgainWhateverIsAtItsPaths: nothing, or files that are no images,
// also when it was closed meanwhile. A file that was not open is not opened.
func TestImageIsOpenedAgainWhateverIsAtItsPaths(t *testing.T) {
	for _, policy := range []open.Mode{open.SameDir, open.Explicit} {
		for _, roots := range []bool{false, true} {
			for _, others := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, roots %t, others %t", policy, roots, others), func(t *testing.T) {
					dir := t.TempDir()
					chainIn(t, dir)
					top, base := filepath.Join(dir, "top.qcow2"), filepath.Join(dir, "base.qcow2")
					s := chainSpec(t, top, open.Policy{Mode: policy})
					s.ReadOnly, s.Cache = false, open.CacheWritethrough
					if policy == open.Explicit {
						s.Backing.Files = []open.File{{Path: base, Format: "qcow2"}}
					}
					if roots {
						s.Roots = []string{dir}
					}
					var err error
					if s.Table, err = open.Gather(t.Context(), s); err != nil {
						t.Fatal(err)
					}
					_, dirs := s.Table.Contents()
					files := map[open.Request]*os.File{}
					s.Opened = func(f *os.File, below bool) { files[s.Asked(f, below)] = f }
					d, err := open.Open(t.Context(), s)
					if err != nil {
						t.Fatal(err)
					}
					want := []byte("before")
					if err := errors.Join(d.WriteAt(t.Context(), want, 0, 0), os.Rename(dir, dir+".gone")); err != nil {
						t.Fatal(err)
					}
					if others {
						if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(top, nil, 0o600), os.WriteFile(base, nil, 0o600)); err != nil {
							t.Fatal(err)
						}
					}
					again := s
					again.Opened = nil
					if again.Table, err = open.Again(d, files, dirs); err != nil {
						t.Fatal(err)
					}
					defer again.Table.Close()
					delete(files, open.Request{Path: base, ReadOnly: true})
					less, err := open.Again(d, files, dirs)
					if err != nil || len(files) != 1 {
						t.Fatalf("without the base: %v, %v", files, err)
					}
					defer less.Close()
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					if table, err := open.Again(d, files, dirs); err == nil {
						table.Close()
						t.Error("files were taken up that are closed")
					}
					d = mustOpen(t, again)
					wantContents(t, d, append(want, make([]byte, 1<<20-len(want))...))
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					s.Table = less
					if d, err := open.Open(t.Context(), s); err == nil {
						t.Errorf("opened a file that was not open: %v", d.Close())
					} else if !strings.Contains(err.Error(), base) {
						t.Errorf("got %q, want %s named", err, base)
					}
				})
			}
		}
	}
}

// TestTableNeedsNoFurtherDescriptor: who has gathered a table, and then closed
// something, can open it whatever became of the descriptor.
func TestTableNeedsNoFurtherDescriptor(t *testing.T) {
	dir := t.TempDir()
	chainIn(t, dir)
	for _, roots := range [][]string{nil, {dir}} {
		for _, format := range []string{"qcow2", "raw"} {
			s := chainSpec(t, filepath.Join(dir, "top.qcow2"), open.Policy{})
			s.Format = format
			if format == "qcow2" {
				s.Backing.Mode = open.SameDir
			}
			s.Roots = roots
			table, err := open.Gather(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			var lim unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
				t.Fatal(err)
			}
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: lim.Max}); err != nil {
				t.Fatal(err)
			}
			s.Table = table
			d, err := open.Open(t.Context(), s)
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
				t.Fatal(err)
			}
			if err != nil {
				t.Errorf("%s, roots %q: %v", format, roots, err)
			} else if err := d.Close(); err != nil {
				t.Error(err)
			}
			table.Close()
		}
	}
}

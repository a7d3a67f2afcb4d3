package open_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

func TestImagesLieBeneathTheRoots(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"in/sub", "out"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"in/a", "in/sub/b", "out/c"} {
		if err := os.WriteFile(filepath.Join(dir, f), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("../out/c", filepath.Join(dir, "in/link")), os.Symlink("in", filepath.Join(dir, "root"))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		ok         bool
	}{
		{"in the folder", "root/a", true},
		{"by the real name of the folder", "in/a", true},
		{"deeper", "root/sub/b", true},
		{"up and down", "root/sub/../a", true},
		{"outside", "out/c", false},
		{"out by dots", "root/../out/c", false},
		{"out by a link", "root/link", false},
		{"the folder itself", "root", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := newSpec(t)
			s.Format, s.Path, s.Roots = "raw", dir+"/"+tt.path, []string{dir + "/root"}
			d, err := open.Open(t.Context(), s)
			if err == nil {
				_ = d.Close()
			}
			if (err == nil) != tt.ok {
				t.Errorf("got %v, want it opened: %v", err, tt.ok)
			}
		})
	}
	s, _ := newSpec(t)
	s.Format, s.Path, s.Roots = "raw", "a", []string{dir}
	if _, err := open.Open(t.Context(), s); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("relative path: got %v, want %v", err, backing.ErrInvalid)
	}
	s.Path, s.Roots = dir+"/in/a", []string{}
	if _, err := open.Open(t.Context(), s); !errors.Is(err, open.ErrDenied) {
		t.Errorf("no folder at all: got %v, want %v", err, open.ErrDenied)
	}
}

// TestFolderThatIsNotThereHidesNoOther: the folder of images of another program
// is often named before that program is installed.
func TestFolderThatIsNotThereHidesNoOther(t *testing.T) {
	path := image(t, 4096)
	missing := filepath.Join(filepath.Dir(path), "missing")
	s, _ := newSpec(t)
	s.Format, s.Path, s.Roots = "raw", path, []string{missing, filepath.Dir(path)}
	d, err := open.Open(t.Context(), s)
	if err != nil {
		t.Fatalf("an image in the second folder: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	s.Path = filepath.Join(missing, "a")
	if _, err := open.Open(t.Context(), s); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an image in the folder that is not there: got %v, want %v", err, os.ErrNotExist)
	}
	s.Path, s.Roots = path, []string{missing}
	if _, err := open.Open(t.Context(), s); !errors.Is(err, open.ErrDenied) {
		t.Errorf("an image elsewhere: got %v, want %v", err, open.ErrDenied)
	}
}

func TestDescriptorStandsForAPath(t *testing.T) {
	path := image(t, 4096)
	for _, tt := range []struct {
		name     string
		flags    int
		readOnly bool
		ok       bool
	}{
		{"for writing", unix.O_RDWR, false, true},
		{"for reading", unix.O_RDONLY, true, true},
		{"more than is needed", unix.O_RDWR, true, true},
		{"for reading only", unix.O_RDONLY, false, false},
		{"for writing only", unix.O_WRONLY, false, false},
		{"only a place", unix.O_PATH, true, false},
		{"appending", unix.O_RDWR | unix.O_APPEND, false, false},
		{"past the page cache", unix.O_RDWR | unix.O_DIRECT, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fd, err := unix.Open(path, tt.flags|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fd), "given")
			defer f.Close()
			s, _ := newSpec(t)
			s.Format, s.Path, s.ReadOnly = "raw", "fd:0", tt.readOnly
			s.Files, s.Roots = map[string]*os.File{"fd:0": f}, []string{}
			d, err := open.Open(t.Context(), s)
			if (err == nil) != tt.ok {
				t.Fatalf("got %v, want it opened: %v", err, tt.ok)
			}
			if err == nil {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	s, _ := newSpec(t)
	s.Format, s.Path, s.ReadOnly, s.Files = "raw", "fd:0", true, map[string]*os.File{"fd:0": r}
	if _, err := open.Open(t.Context(), s); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("pipe: got %v, want %v", err, backing.ErrInvalid)
	}
}

func TestDescriptorHasNoFolder(t *testing.T) {
	f, err := os.Open(image(t, 4096))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, _ := newSpec(t)
	s.Format, s.Path, s.ReadOnly, s.Files = "qcow2", "fd:0", true, map[string]*os.File{"fd:0": f}
	s.Backing = open.Policy{Mode: open.SameDir}
	if _, err := open.Open(t.Context(), s); !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("got %v, want %v", err, backing.ErrInvalid)
	}
}

// TestErrorNamesTheDescriptor, and no file of that name in the working directory.
func TestErrorNamesTheDescriptor(t *testing.T) {
	f, err := os.Open(image(t, 4096))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, _ := newSpec(t)
	s.Format, s.Path, s.ReadOnly, s.Files = "qcow2", "fd:0", true, map[string]*os.File{"fd:0": f}
	_, err = open.Open(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), `"fd:0"`) {
		t.Errorf("what is no qcow2 image: got %v, want an error of \"fd:0\"", err)
	}
}

func TestOverlayIsMadeBeneathTheRoots(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(base, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ := newSpec(t)
	s.Path, s.Roots = filepath.Join(dir, "top"), []string{dir}
	if err := open.CreateOverlay(t.Context(), s, 64<<10, "base", "raw"); err != nil {
		t.Fatal(err)
	}
	if err := open.CreateOverlay(t.Context(), s, 64<<10, "base", "raw"); !errors.Is(err, os.ErrExist) {
		t.Errorf("a second time: got %v, want %v", err, os.ErrExist)
	}
	qemu(t, dir, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "top", "base")
	s.Format, s.Backing = "qcow2", open.Policy{Mode: open.SameDir}
	wantContents(t, mustOpen(t, s), make([]byte, 64<<10))
	s.Path = filepath.Join(t.TempDir(), "top")
	if err := open.CreateOverlay(t.Context(), s, 64<<10, "base", "raw"); !errors.Is(err, open.ErrDenied) {
		t.Errorf("elsewhere: got %v, want %v", err, open.ErrDenied)
	}
}

// TestClaimedDeviceIsNotOpenedForWriting: what is mounted, or otherwise in use by
// the kernel, has no byte lock. Whatever opens it, and whoever is to serve it.
func TestClaimedDeviceIsNotOpenedForWriting(t *testing.T) {
	node := backingtest.Loop(t, image(t, 1<<20), 512)
	handed, err := os.OpenFile(node, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer handed.Close()
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+node, "over", "1M")
	for _, tt := range []struct {
		name string
		set  func(s *open.Spec)
		free bool // is opened all the same
	}{
		{"raw", func(s *open.Spec) { s.Format = "raw" }, false},
		{"of a format that was not said", func(*open.Spec) {}, false},
		{"in a folder of images", func(s *open.Spec) { s.Format, s.Roots = "raw", []string{filepath.Dir(node)} }, false},
		{"as a descriptor", func(s *open.Spec) {
			s.Format, s.Path, s.Files = "raw", "fd:0", map[string]*os.File{"fd:0": handed}
		}, false},
		{"as a data file", func(s *open.Spec) {
			s.Format, s.Path = "qcow2", filepath.Join(dir, "over")
			s.Backing = open.Policy{Mode: open.Explicit, DataFiles: []string{node}}
		}, false},
		{"without locks", func(s *open.Spec) { s.Format, s.Lock = "raw", raw.LockOff }, true},
		{"read-only", func(s *open.Spec) { s.Format, s.ReadOnly = "raw", true }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := newSpec(t)
			s.Path = node
			tt.set(&s)
			free := backingtest.Claim(t, node)
			table, err := open.Gather(t.Context(), s)
			table.Close()
			if tt.free != (err == nil) || err != nil && !errors.Is(err, backing.ErrLocked) {
				t.Errorf("gather: got %v, want it opened: %v", err, tt.free)
			}
			d, err := open.Open(t.Context(), s)
			if tt.free != (err == nil) || err != nil && !errors.Is(err, backing.ErrLocked) {
				t.Errorf("open: got %v, want it opened: %v", err, tt.free)
			}
			if err == nil {
				err = d.Close()
			} else {
				free()
				err = mustOpen(t, s).Close()
			}
			if err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
}

// TestClaimOfAServedDeviceKeepsItServed: whoever opens the image again, with the
// files that are open, takes nothing from who has claimed the device since.
func TestClaimOfAServedDeviceKeepsItServed(t *testing.T) {
	node := backingtest.Loop(t, image(t, 1<<20), 512)
	s, _ := newSpec(t)
	s.Format, s.Path = "raw", node
	served := map[open.Request]*os.File{}
	s.Opened = func(f *os.File, below bool) { served[s.Asked(f, below)] = f }
	d, err := open.Open(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	again, err := open.Again(d, served, nil)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	backingtest.Claim(t, node)
	s.Table = again
	mustOpen(t, s)
}

// TestVolumesAreNamedByLinksOfRoot: udev names volumes by links to their
// devices, which lie elsewhere.
func TestVolumesAreNamedByLinksOfRoot(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := backingtest.Loop(t, file, 512)
	const nobody = 65534
	for _, tt := range []struct {
		name, to string
		owner    int // of the link
		mode     os.FileMode
		folder   int // its owner
		ok       bool
	}{
		{"of root", dev, 0, 0o755, 0, true},
		{"of somebody else", dev, nobody, 0o755, 0, false},
		{"where others write", dev, 0, 0o777, 0, false},
		{"where a group writes", dev, 0, 0o775, 0, false},
		{"in a folder of somebody else", dev, 0, 0o755, nobody, false},
		{"to a file", file, 0, 0o755, 0, false},
		{"to a character device", "/dev/zero", 0, 0o755, 0, false},
		{"to nothing", filepath.Join(dir, "nothing"), 0, 0o755, 0, false},
		{"to memory of a process", "/proc/self/fd/0", 0, 0o755, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "mapper")
			link := filepath.Join(root, "vg-vm1")
			if err := errors.Join(os.Mkdir(root, 0o755), os.Symlink(tt.to, link), os.Lchown(link, tt.owner, 0),
				os.Chmod(root, tt.mode), os.Chown(root, tt.folder, 0)); err != nil {
				t.Fatal(err)
			}
			s, _ := newSpec(t)
			s.Format, s.Path, s.Roots = "raw", link, []string{root}
			d, err := open.Open(t.Context(), s)
			if err == nil {
				if size := d.Info().Size; size != 1<<20 {
					t.Errorf("got a disk of %d bytes", size)
				}
				_ = d.Close()
			}
			if (err == nil) != tt.ok {
				t.Errorf("got %v, want it opened: %v", err, tt.ok)
			}
		})
	}
}

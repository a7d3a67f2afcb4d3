package copier

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// lockByte plays another program: it holds one byte of QEMU's protocol until
// the test ends.
func lockByte(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	must(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: at, Len: 1}))
}

func TestLocksOfOthersAreHeeded(t *testing.T) {
	const usesRead, usesWrite, deniesWrite = 100, 101, 201
	for _, tt := range []struct {
		name                string
		at                  int64
		source, destination bool // may be opened
	}{
		{"is read", usesRead, true, true},
		{"is written", usesWrite, false, false},
		{"must not change", deniesWrite, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := sparse(t)
			lockByte(t, path, tt.at)
			open := map[string]func() (*File, error){
				"source":      func() (*File, error) { return OpenFile(path, raw.LockAuto) },
				"destination": func() (*File, error) { return claim.CreateFile(path, 1) },
			}
			for what, may := range map[string]bool{"source": tt.source, "destination": tt.destination} {
				d, err := open[what]()
				if (err == nil) != may || err != nil && !errors.Is(err, backing.ErrLocked) {
					t.Errorf("open as %s: %v, want success %v", what, err, may)
				}
				if err == nil {
					must(t, d.Close())
				}
			}
		})
	}
}

// TestClaimedDeviceIsNoDestination: one that is mounted, for example. It may be a
// source.
func TestClaimedDeviceIsNoDestination(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	node := backingtest.Loop(t, image, 512)
	free := backingtest.Claim(t, node)
	for _, lock := range []raw.LockMode{raw.LockAuto, raw.LockOn} {
		if _, err := (Claim{Mode: 0o600, Lock: lock}).Open(node); !errors.Is(err, backing.ErrLocked) {
			t.Errorf("open as destination, lock %s: got %v, want %v", lock, err, backing.ErrLocked)
		}
	}
	s, err := OpenFile(node, raw.LockAuto)
	must(t, err)
	must(t, s.Close())
	free()
	d, err := claim.Open(node)
	must(t, err)
	must(t, d.Close())
}

func TestSourceThatIsWrittenCanBeShared(t *testing.T) {
	path := sparse(t)
	d, err := claim.Open(path)
	must(t, err)
	defer d.Close()
	s, err := OpenFile(path, raw.LockOff)
	must(t, err)
	must(t, s.Close())
}

func TestOpenFilesAreLockedUntilTheyAreClosed(t *testing.T) {
	path := sparse(t)
	for _, open := range []func() (*File, error){
		func() (*File, error) { return OpenFile(path, raw.LockAuto) },
		func() (*File, error) { return claim.Open(path) },
	} {
		for range 2 {
			d, err := open()
			must(t, err)
			if _, err := claim.Open(path); !errors.Is(err, backing.ErrLocked) {
				t.Errorf("a second destination: %v, want %v", err, backing.ErrLocked)
			}
			must(t, d.Close())
		}
	}
}

func TestNewFileOfAnotherStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	first, err := claim.CreateFile(path, 1<<20)
	must(t, err)
	defer first.Close()
	if _, err := claim.CreateFile(path, 1<<20); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("a second copy: %v, want %v", err, backing.ErrLocked)
	}
	if _, err := (Claim{Mode: 0o600, New: true}).Open(path); !errors.Is(err, ErrRefused) {
		t.Errorf("a second maker: %v, want %v", err, ErrRefused)
	}
	if !first.isAt(os.Stat(path)) {
		t.Error("the file of the first is gone")
	}
}

func TestFileOfAnotherAtThePathIsNotDiscarded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	d, err := claim.CreateFile(path, 1)
	must(t, err)
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte("another"), 0o600))
	must(t, d.Discard())
	if got, err := os.ReadFile(path); string(got) != "another" {
		t.Errorf("the other file is %q, %v", got, err)
	}
}

// TestFileThatIsDiscardedMeanwhileIsMadeAnew: what was opened before that has
// no name any more.
func TestFileThatIsDiscardedMeanwhileIsMadeAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	first, err := claim.CreateFile(path, 1<<20)
	must(t, err)
	c := claim
	c.Refuse = func(*File) error { return first.Discard() }
	second, err := c.CreateFile(path, 1<<10)
	must(t, err)
	defer second.Close()
	if i, err := os.Stat(path); !second.Created() || !second.isAt(i, err) || i.Size() != 1<<10 {
		t.Errorf("created is %v, and at the path is %v, %v", second.Created(), i, err)
	}
}

func TestLinkToNowhereIsNoDestination(t *testing.T) {
	path := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink("nowhere", path))
	if _, err := claim.Open(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

// TestWhatSucceededIsNotDiscardedByOthers: two fill the file at one path; the
// second fails, whatever it has found or made there, and the first does not.
func TestWhatSucceededIsNotDiscardedByOthers(t *testing.T) {
	dir := t.TempDir()
	for range 100 {
		path := filepath.Join(dir, "new")
		start, done := make(chan struct{}), false
		var both sync.WaitGroup
		both.Go(func() {
			<-start
			d, err := claim.Open(path)
			if err != nil {
				return
			}
			err = d.WriteAt(t.Context(), []byte("whole"), 0)
			done = errors.Join(err, d.Close()) == nil
		})
		both.Go(func() {
			<-start
			if d, err := claim.Open(path); err == nil {
				_ = d.Discard() // is to fail
			}
		})
		close(start)
		both.Wait()
		if got, err := os.ReadFile(path); done && string(got) != "whole" {
			t.Fatalf("the first has succeeded, and the file is %q, %v", got, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// TestFlushMakesTheNameDurable of a file that a Claim has made: it asks for the folder,
// which it cannot find where that was moved.
func TestFlushMakesTheNameDurable(t *testing.T) {
	for _, made := range []bool{true, false} {
		folder := filepath.Join(t.TempDir(), "folder")
		path := filepath.Join(folder, "disk")
		must(t, os.Mkdir(folder, 0o700))
		if !made {
			must(t, os.WriteFile(path, make([]byte, 512), 0o600))
		}
		d, err := claim.CreateFile(path, 512)
		must(t, err)
		must(t, d.Flush(t.Context()))
		must(t, os.Rename(folder, folder+"2"))
		if err := d.Flush(t.Context()); errors.Is(err, os.ErrNotExist) != made {
			t.Errorf("made %v: flush without the folder: %v", made, err)
		}
		must(t, d.Close())
	}
}

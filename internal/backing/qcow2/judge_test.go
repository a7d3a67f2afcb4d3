package qcow2_test

import (
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/disktest"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/storetest"
)

// judge has qemu-img check images: each that is new to it, for those that are
// the same have the same verdict. Safe for concurrent use.
type judge struct {
	dir  string // with the files that the images name
	seed maphash.Seed

	mu     sync.Mutex
	images int              // guarded by mu: that it was shown
	known  map[uint64]error // guarded by mu: verdicts, by sum of the image
	idle   []*imageFile     // guarded by mu
}

// imageFile is a file that holds an image that was judged: the next differs
// little from it.
type imageFile struct {
	path string
	has  *storetest.Mem
}

func newJudge(dir string) *judge {
	return &judge{dir: dir, seed: maphash.MakeSeed(), known: map[uint64]error{}}
}

// judged has qemu-img check the image of a state; leaks are no error.
func (s *specimen) judged(f disktest.Files) error { return s.judge.image(f.Image.(*storetest.Mem)) }

func (j *judge) image(m *storetest.Mem) error {
	sum := m.Sum(j.seed)
	f, verdict := j.take(sum)
	if f == nil {
		return verdict
	}
	err := f.hold(m)
	if err == nil {
		_, err = qemuJudges(j.dir, f.path)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.known[sum] = err
	j.idle = append(j.idle, f)
	return err
}

// take takes a file for an image that is not known, else f is nil.
func (j *judge) take(sum uint64) (f *imageFile, verdict error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.images++
	if err, known := j.known[sum]; known {
		return nil, err
	}
	if last := len(j.idle) - 1; last >= 0 {
		f, j.idle = j.idle[last], j.idle[:last]
		return f, nil
	}
	return &imageFile{path: filepath.Join(j.dir, fmt.Sprintf("judged.%p.%d", j, j.images))}, nil
}

// hold makes the file hold m.
func (f *imageFile) hold(m *storetest.Mem) error {
	file, err := os.OpenFile(f.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	err = m.Update(file, f.has)
	f.has = m
	return errors.Join(err, file.Close())
}

// judged has qemu-img check an image and says whether it leaks. Leaks are no
// error.
func judged(dir string, image []byte) (leaks bool, err error) {
	path := filepath.Join(dir, "judged.qcow2")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		return false, err
	}
	return qemuJudges(dir, path)
}

// qemuJudges has qemu-img check the image at path. The name of a data file is
// relative to dir.
func qemuJudges(dir, path string) (leaks bool, err error) {
	c := exec.Command("qemu-img", "check", "-f", "qcow2", path)
	c.Dir = dir
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("qemu-img check: %w\n%s", err, out)
	}
	return false, nil
}

// TestJudgeTellsImagesApart: a verdict is that of the image that was shown, also
// when it was shown before and when another has been in the file.
func TestJudgeTellsImagesApart(t *testing.T) {
	good := storetest.New(made(t, "cluster_size=512", "1M", "write -P 1 0 64k"))
	bad, cut := good.Clone(), good.Clone()
	bad.Patch(0, make([]byte, 8))
	cut.Cut(2048)
	j := newJudge(t.TempDir())
	for i, m := range []*storetest.Mem{good, bad, good, cut, bad.Clone(), good.Clone(), cut} {
		if err := j.image(m); (err == nil) != (i == 0 || i == 2 || i == 5) {
			t.Errorf("image %d: %v", i, err)
		}
	}
	if len(j.known) != 3 || j.images != 7 {
		t.Errorf("%d of %d images are distinct, want 3 of 7", len(j.known), j.images)
	}
}

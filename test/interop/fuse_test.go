package interop

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// mount shows the export as a file through nbdfuse and returns its path.
func mount(t *testing.T, uri string) string {
	t.Helper()
	testenv.Require(t, "nbdfuse", "fusermount3", "/dev/fuse")
	dir := testenv.TempDir(t)
	cmd := exec.Command(testenv.Path(t, "nbdfuse"), dir, uri)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		testenv.Run(t, "fusermount3", "-u", dir)
		if err := <-ended; err != nil {
			t.Errorf("nbdfuse: %v\n%s", err, log.String())
		}
	})
	file := filepath.Join(dir, "nbd")
	ready := func() bool { _, err := os.Stat(file); return err == nil }
	if err := testenv.Await(testenv.Context(t), ready); err != nil {
		t.Fatalf("no file appears: %v\n%s", err, log.String())
	}
	return file
}

// TestKernelFileOperationsAgreeWithAModel exercises the disk as a file, the
// way fsx does: the kernel's page cache and FUSE stand between.
func TestKernelFileOperationsAgreeWithAModel(t *testing.T) {
	checkFileOperations(t, serve(t, testenv.Options{}), 5000)
}

// checkFileOperations does random operations on a disk of the pattern.
func checkFileOperations(t *testing.T, s *testenv.Server, ops int) {
	t.Helper()
	f, err := os.OpenFile(mount(t, s.URI), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 4 << 20
	model := make([]byte, size)
	testenv.PatternAt(model, 0)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for step := range ops {
		off := rng.IntN(size)
		n := 1 + rng.IntN(min(size-off, 1<<(1+rng.IntN(17))))
		if err := fsxStep(f, rng, model, off, n); err != nil {
			t.Fatalf("seed %d, step %d, %d bytes at %d: %v", seed, step, n, off, err)
		}
	}
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Fatalf("seed %d: the file differs at the end (%v)", seed, err)
	}
}

// fsxStep does one random operation on the file and on the model.
func fsxStep(f *os.File, rng *rand.Rand, model []byte, off, n int) error {
	switch rng.IntN(8) {
	case 0:
		return f.Sync()
	case 1:
		// The pages are dropped: what follows is read from the server.
		if err := f.Sync(); err != nil {
			return err
		}
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	case 2, 3, 4:
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		copy(model[off:], p)
		_, err := f.WriteAt(p, int64(off))
		return err
	default:
		p := make([]byte, n)
		if _, err := f.ReadAt(p, int64(off)); err != nil {
			return err
		}
		if !bytes.Equal(p, model[off:off+n]) {
			return errDiffers
		}
		return nil
	}
}

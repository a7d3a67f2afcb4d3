package copier

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// claim is how copy claims a raw destination.
var claim = Claim{Mode: 0o644}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sparse makes a file of 3 MiB whose middle is a hole.
func sparse(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(3<<20))
	for _, off := range []int64{0, 2 << 20} {
		_, err := f.WriteAt(bytes.Repeat([]byte{7}, 1<<20), off)
		must(t, err)
	}
	return path
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Blocks * 512
}

func TestHolesOfAFileAreItsZeroExtents(t *testing.T) {
	d, err := OpenFile(sparse(t), raw.LockAuto)
	must(t, err)
	defer d.Close()
	var got []Extent
	must(t, d.Extents(t.Context(), func(e Extent) bool { got = append(got, e); return true }))
	if want := []Extent{{0, 1 << 20, false}, {1 << 20, 1 << 20, true}, {2 << 20, 1 << 20, false}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	n := 0
	must(t, d.Extents(t.Context(), func(Extent) bool { n++; return false }))
	if n != 1 {
		t.Errorf("yield was called %d times after it returned false", n)
	}
}

func TestHoleAtTheEndIsAnExtent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hole")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, 12345))
	d, err := OpenFile(path, raw.LockAuto)
	must(t, err)
	defer d.Close()
	var got []Extent
	must(t, d.Extents(t.Context(), func(e Extent) bool { got = append(got, e); return true }))
	if !slices.Equal(got, []Extent{{0, 12345, true}}) {
		t.Errorf("got %v", got)
	}
}

func TestNewFileIsSparseAndGoesWhenDiscarded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	d, err := claim.CreateFile(path, 1<<30)
	must(t, err)
	if !d.Created() || d.Size() != 1<<30 || blocks(t, path) != 0 {
		t.Errorf("created %v, %d bytes, %d allocated", d.Created(), d.Size(), blocks(t, path))
	}
	must(t, d.Discard())
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

func TestFileThatExistsStaysWhenDiscarded(t *testing.T) {
	path := sparse(t)
	d, err := claim.CreateFile(path, 1)
	must(t, err)
	if d.Created() || d.Size() != 3<<20 {
		t.Errorf("created %v, %d bytes", d.Created(), d.Size())
	}
	must(t, d.Discard())
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestZeroMakesHolesOrAllocates(t *testing.T) {
	path := sparse(t)
	d, err := claim.CreateFile(path, 0)
	must(t, err)
	defer d.Close()
	must(t, d.Zero(t.Context(), 0, 1<<20, false))
	if n := blocks(t, path); n > 1<<20+65536 {
		t.Errorf("%d bytes are allocated after a hole was made", n)
	}
	must(t, d.Zero(t.Context(), 0, 3<<20, true))
	if n := blocks(t, path); n < 3<<20 {
		t.Errorf("%d bytes are allocated, want all", n)
	}
	got := make([]byte, 3<<20)
	must(t, d.ReadAt(t.Context(), got, 0))
	if !bytes.Equal(got, make([]byte, 3<<20)) {
		t.Error("not all is zero")
	}
}

func TestZeroesAreWrittenWhereThereIsNoCommand(t *testing.T) {
	m := random(3<<20 + 512)
	m.shape.Align, m.shape.MaxIO = 512, 100*512
	must(t, writeZeroes(t.Context(), m, 512, 3<<20))
	if !bytes.Equal(m.p[512:512+3<<20], make([]byte, 3<<20)) || m.p[0] == 0 || m.wrong != nil {
		t.Errorf("zeroes are missing or too many: %v", m.wrong)
	}
}

func TestWhatIsNoDiskIsNotOpened(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	for _, path := range []string{dir, fifo, "/dev/null", filepath.Join(dir, "missing")} {
		if d, err := OpenFile(path, raw.LockAuto); err == nil {
			d.Close()
			t.Errorf("%s was opened as a source", path)
		}
	}
	for _, path := range []string{dir, fifo, "/dev/null"} {
		if d, err := claim.CreateFile(path, 1); err == nil {
			d.Close()
			t.Errorf("%s was opened as a destination", path)
		}
	}
}

func TestLinkToTheSourceIsTheSource(t *testing.T) {
	path := sparse(t)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(path, link))
	a, err := OpenFile(path, raw.LockAuto)
	must(t, err)
	defer a.Close()
	same := errors.New("same")
	c := Claim{Refuse: func(b *File) error {
		if ok, err := a.Same(b); err != nil || !ok {
			return err
		}
		return same
	}}
	if _, err := c.Open(link); !errors.Is(err, same) {
		t.Errorf("two names of one file are taken for two files: %v", err)
	}
}

// TestSecondNodeIsNoOtherFile: whatever is locked, and whether anything is.
func TestSecondNodeIsNoOtherFile(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	node := backingtest.Loop(t, image, 512)
	a, err := OpenFile(node, raw.LockOff)
	must(t, err)
	defer a.Close()
	for path, want := range map[string]bool{backingtest.SecondNode(t, node): true, image: false} {
		b, err := OpenFile(path, raw.LockOff)
		must(t, err)
		if got, err := a.Same(b); got != want || err != nil {
			t.Errorf("%s and %s are one: got %v, %v, want %v", node, path, got, err, want)
		}
		must(t, b.Close())
	}
}

func TestFileThatShrinksIsAnError(t *testing.T) {
	path := sparse(t)
	d, err := OpenFile(path, raw.LockAuto)
	must(t, err)
	defer d.Close()
	must(t, os.Truncate(path, 1<<20))
	if err := d.ReadAt(t.Context(), make([]byte, 4096), 1<<20-1); err == nil {
		t.Error("a read behind the end succeeded")
	}
}

// TestCopyOfAFileThatShrinksFails: what is missing at its end, within data, at the
// end of data or within a hole, is no hole.
func TestCopyOfAFileThatShrinksFails(t *testing.T) {
	for _, size := range []int64{0, 1<<20 - 4096, 1 << 20, 3 << 19, 2 << 20} {
		path := sparse(t)
		src, err := OpenFile(path, raw.LockAuto)
		must(t, err)
		defer src.Close()
		must(t, os.Truncate(path, size))
		for _, zero := range []bool{true, false} {
			o := whole
			o.DestinationIsZero, o.Verify = zero, false
			if err := Copy(t.Context(), src, random(3<<20), o); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%d bytes are left: got %v, want %v", size, err, io.ErrUnexpectedEOF)
			}
		}
	}
}

func TestFilesAreCopiedWithTheirHoles(t *testing.T) {
	path := sparse(t)
	src, err := OpenFile(path, raw.LockAuto)
	must(t, err)
	defer src.Close()
	to := filepath.Join(t.TempDir(), "copy")
	dst, err := claim.CreateFile(to, src.Size())
	must(t, err)
	defer dst.Close()
	o := whole
	o.DestinationIsZero = true
	must(t, Copy(t.Context(), src, dst, o))
	a, err := os.ReadFile(path)
	must(t, err)
	b, err := os.ReadFile(to)
	must(t, err)
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
	if blocks(t, to) > blocks(t, path)+65536 {
		t.Errorf("the copy takes %d bytes, the source %d", blocks(t, to), blocks(t, path))
	}
}

// TestFolderNeedNotBeReadable: who may make a file in a folder may have no right to
// list it.
func TestFolderNeedNotBeReadable(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o711))
	must(t, os.Chmod(dir, 0o1733))
	err := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread is nobody's from here on
		const nobody = 65534
		if e := unix.Setfsuid(nobody); e != nil {
			err <- e
			return
		}
		d, e := claim.CreateFile(filepath.Join(dir, "disk"), 1<<20)
		if e == nil {
			e = errors.Join(d.Flush(t.Context()), d.Close())
		}
		err <- e
	}()
	must(t, <-err)
}

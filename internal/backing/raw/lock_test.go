package raw_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// tool finds a program, or skips and says which package has it.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s (package %s)", name, pkg)
	}
	return path
}

// output runs a program that is expected to fail and returns what it says.
func output(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	b, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	return string(b), err
}

// TestSecondOpenerInOneProcess is told who has the image, and for what.
func TestSecondOpenerInOneProcess(t *testing.T) {
	const writing, reading = `export "a" has it open for writing`, `export "a" has it open for reading`
	for _, tt := range []struct {
		name          string
		first, second raw.Options
		want          string // "" for an image that can be opened
	}{
		{"two writers", raw.Options{}, raw.Options{}, writing},
		{"reader after writer", raw.Options{}, raw.Options{ReadOnly: true}, writing},
		{"writer after reader", raw.Options{ReadOnly: true}, raw.Options{}, reading},
		{"two readers", raw.Options{ReadOnly: true}, raw.Options{ReadOnly: true}, ""},
		{"unlocked writer", raw.Options{}, raw.Options{Lock: raw.LockOff}, ""},
		{"writer after unlocked writer", raw.Options{Lock: raw.LockOff}, raw.Options{}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := newEngine(t, "pool")
			path := tempImage(t, 1<<20)
			tt.first.For, tt.second.For = `export "a"`, `export "b"`
			closeAfter(t, openRaw(t, path, e, false, tt.first))
			d, err := tryRaw(t, path, e, false, tt.second)
			if err == nil {
				closeAfter(t, d)
			}
			if errors.Is(err, backing.ErrLocked) != (tt.want != "") {
				t.Fatalf("second open: got %v, want %q", err, tt.want)
			}
			if tt.want != "" && !(strings.Contains(err.Error(), path) && strings.HasSuffix(err.Error(), tt.want)) {
				t.Errorf("error text %q: want the path %q and %q in it", err, path, tt.want)
			}
		})
	}
}

// TestLastUserIsToldOf: who has left is not named.
func TestLastUserIsToldOf(t *testing.T) {
	e := newEngine(t, "pool")
	path := tempImage(t, 1<<20)
	a := openRaw(t, path, e, false, raw.Options{ReadOnly: true, For: "a"})
	closeAfter(t, openRaw(t, path, e, false, raw.Options{ReadOnly: true, For: "b"}))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := tryRaw(t, path, e, false, raw.Options{For: "c"})
	if err == nil || !strings.HasSuffix(err.Error(), "b has it open for reading") {
		t.Errorf("open for writing: got %v, want that b reads", err)
	}
}

func TestHardLinkIsTheSameImage(t *testing.T) {
	e := newEngine(t, "pool")
	path := tempImage(t, 1<<20)
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.Link(path, other); err != nil {
		t.Fatal(err)
	}
	closeAfter(t, openRaw(t, path, e, false, raw.Options{}))
	if _, err := tryRaw(t, other, e, false, raw.Options{}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("open by a second name: got %v, want %v", err, backing.ErrLocked)
	}
}

func TestCloseAndFailedOpenUnlock(t *testing.T) {
	e := newEngine(t, "pool")
	path := tempImage(t, 1<<20)
	for range 3 {
		d := openRaw(t, path, e, false, raw.Options{})
		if _, err := tryRaw(t, path, e, false, raw.Options{}); !errors.Is(err, backing.ErrLocked) {
			t.Fatalf("second open: got %v, want %v", err, backing.ErrLocked)
		}
		if err := d.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
}

// TestByteLocksOfOthers plays another program, byte by byte.
func TestByteLocksOfOthers(t *testing.T) {
	for _, tt := range []struct {
		name           string
		at             int64
		reader, writer bool // may open
	}{
		{"uses consistent read", 100, true, true},
		{"uses write", 101, false, false},
		{"uses write unchanged", 102, true, true},
		{"uses resize", 103, true, false},
		{"keeps others from reading it", 200, false, false},
		{"keeps others from writing to it", 201, true, false},
		{"keeps others from changing its size", 203, true, true},
		{"unrelated byte", 99, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := newEngine(t, "pool")
			path := tempImage(t, 1<<20)
			f := openFile(t, path, unix.O_RDWR)
			defer f.Close()
			l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: tt.at, Len: 1}
			if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
				t.Fatal(err)
			}
			checkOpens(t, path, e, raw.Options{}, tt.reader, tt.writer)
			checkOpens(t, path, e, raw.Options{Container: true}, tt.reader && tt.at != 103, tt.writer && tt.at != 203)
		})
	}
}

// checkOpens opens an image that somebody else has locked, read-only and then
// writable, and expects each to succeed as said or to find it locked.
func checkOpens(t *testing.T, path string, e engine.Engine, o raw.Options, reader, writer bool) {
	t.Helper()
	for _, readOnly := range []bool{true, false} {
		o.ReadOnly = readOnly
		d, err := tryRaw(t, path, e, false, o)
		want := writer
		if readOnly {
			want = reader
		}
		if want != (err == nil) || err != nil && !errors.Is(err, backing.ErrLocked) {
			t.Errorf("open with %+v: got %v, want success %v", o, err, want)
		}
		if err == nil {
			_ = d.Close()
		}
	}
}

// TestBytesThatAreHeld reads the locks as another program sees them.
func TestBytesThatAreHeld(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    raw.Options
		want []int64
	}{
		{"reader", raw.Options{ReadOnly: true}, []int64{100, 201}},
		{"writer", raw.Options{}, []int64{100, 101, 201, 203}},
		{"reader of a container", raw.Options{ReadOnly: true, Container: true}, []int64{100, 201, 203}},
		{"writer of a container", raw.Options{Container: true}, []int64{100, 101, 103, 201, 203}},
		{"nobody who locks", raw.Options{Lock: raw.LockOff}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := tempImage(t, 1<<20)
			closeAfter(t, openRaw(t, path, newEngine(t, "pool"), false, tt.o))
			f := openFile(t, path, unix.O_RDWR)
			defer f.Close()
			var got []int64
			for at := range int64(400) {
				l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
				if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
					t.Fatal(err)
				}
				if l.Type != unix.F_UNLCK {
					got = append(got, at)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("locked bytes: got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestPOSIXLockOfAnotherProcessIsNamed(t *testing.T) {
	python := tool(t, "/usr/bin/python3", "python3")
	path := tempImage(t, 1<<20)
	// sys.stdin ends the helper with the test.
	cmd := exec.CommandContext(t.Context(), python, "-c", `
import fcntl, sys
f = open(sys.argv[1], "r+b")
fcntl.lockf(f, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()`, path)
	in, out := backingtest.Converse(t, cmd)
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	if line, err := out.ReadString('\n'); err != nil {
		t.Fatalf("python3: %q, %v", line, err)
	}
	if _, err := tryRaw(t, path, newEngine(t, "pool"), false, raw.Options{}); !errors.Is(err, backing.ErrLocked) {
		t.Errorf("open of a file locked as a whole: got %v, want %v", err, backing.ErrLocked)
	}
}

func TestQEMUStaysAwayFromWhatWeServe(t *testing.T) {
	qemuIO, qemuImg := tool(t, "qemu-io", "qemu-utils"), tool(t, "qemu-img", "qemu-utils")
	const writeLock = `Failed to get "write" lock`
	qemu := tool(t, "qemu-system-x86_64", "qemu-system-x86")
	qcow2Info := []string{qemuImg, "info", "-f", "qcow2"}
	const sharedWriteLock = `Failed to get shared "write" lock`
	for _, tt := range []struct {
		name string
		ours raw.Options
		cmd  []string
		want string // in the output, or "" for success
	}{
		{"writer beside writer", raw.Options{}, []string{qemuIO, "-f", "raw", "-c", "write 0 512"}, writeLock},
		{"writer beside reader", raw.Options{ReadOnly: true}, []string{qemuIO, "-f", "raw", "-c", "write 0 512"}, writeLock},
		{"virtual machine beside writer", raw.Options{}, []string{qemu, "-nodefaults", "-display", "none", "-S", "-hda"}, writeLock},
		// QEMU's raw format shares writes when it only reads, its qcow2
		// format does not: the same happens beside a running QEMU.
		{"reader beside writer", raw.Options{}, []string{qemuIO, "-f", "raw", "-r", "-c", "read 0 512"}, ""},
		{"reader beside reader", raw.Options{ReadOnly: true}, []string{qemuIO, "-f", "raw", "-r", "-c", "read 0 512"}, ""},
		{"qcow2 info beside writer", raw.Options{}, qcow2Info, sharedWriteLock},
		{"qcow2 info beside reader", raw.Options{ReadOnly: true}, qcow2Info, ""},
		{"qcow2 info -U beside writer", raw.Options{}, append(qcow2Info, "-U"), ""},
		{"writer beside unlocked writer", raw.Options{Lock: raw.LockOff}, []string{qemuIO, "-f", "raw", "-c", "write 0 512"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.img")
			if got, err := output(t, qemuImg, "create", "-f", "qcow2", path, "1M"); err != nil {
				t.Fatalf("qemu-img create: %q, %v", got, err)
			}
			closeAfter(t, openRaw(t, path, newEngine(t, "pool"), false, tt.ours))
			got, err := output(t, tt.cmd[0], append(tt.cmd[1:], path)...)
			if (err == nil) != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%v: got %q, %v, want %q in it", tt.cmd, got, err, tt.want)
			}
		})
	}
}

func TestWeStayAwayFromWhatQEMUHas(t *testing.T) {
	qemuIO := tool(t, "qemu-io", "qemu-utils")
	for _, tt := range []struct {
		name           string
		args           []string
		reader, writer bool // may open
	}{
		{"qemu writes", nil, false, false},
		{"qemu reads and shares writes", []string{"-r"}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := tempImage(t, 1<<20)
			cmd := exec.CommandContext(t.Context(), qemuIO, append(tt.args, "-f", "raw", path)...)
			in, out := backingtest.Converse(t, cmd)
			defer func() { _ = in.Close(); _ = cmd.Wait() }()
			// The answer to a command says that the image is open.
			if _, err := io.WriteString(in, "length\n"); err != nil {
				t.Fatal(err)
			}
			for line := ""; !strings.Contains(line, "MiB"); {
				var err error
				if line, err = out.ReadString('\n'); err != nil {
					t.Fatalf("qemu-io: %q, %v", line, err)
				}
			}
			e := newEngine(t, "pool")
			checkOpens(t, path, e, raw.Options{}, tt.reader, tt.writer)
			if tt.writer {
				return
			}
			const want = "(a running guest?) has it open for writing"
			if _, err := tryRaw(t, path, e, false, raw.Options{}); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
		})
	}
}

func TestUnknownLockModeIsRefused(t *testing.T) {
	_, err := tryRaw(t, tempImage(t, 512), newEngine(t, "pool"), false, raw.Options{Lock: "maybe"})
	if !errors.Is(err, backing.ErrInvalid) {
		t.Errorf("open: got %v, want %v", err, backing.ErrInvalid)
	}
}

package open_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// qemu runs a program of qemu-utils in dir.
func qemu(t testing.TB, dir, program string, args ...string) {
	t.Helper()
	if out, err := tryQEMU(t, dir, program, args...); err != nil {
		t.Fatalf("%s %q: %v: %s", program, args, err, out)
	}
}

func tryQEMU(t testing.TB, dir, program string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("needs %s (package qemu-utils)", program)
	}
	return string(out), err
}

// overlay makes an image above another without looking at that.
func overlay(t *testing.T, dir, name, base, format string) {
	t.Helper()
	qemu(t, dir, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", base, name, "1M")
}

const diskSize = 1 << 20

// newChain makes top.qcow2 above mid.qcow2 above base.raw, each with data of
// its own, and returns the directory and what the disk holds.
func newChain(t *testing.T) (string, []byte) {
	t.Helper()
	dir := t.TempDir()
	p := make([]byte, diskSize)
	for i := range p {
		p[i] = byte(i >> 9)
	}
	if err := os.WriteFile(filepath.Join(dir, "base.raw"), p, 0o600); err != nil {
		t.Fatal(err)
	}
	overlay(t, dir, "mid.qcow2", "base.raw", "raw")
	overlay(t, dir, "top.qcow2", "mid.qcow2", "qcow2")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 0xaa 64k 256k", "mid.qcow2")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 0xbb 128k 64k", "-c", "write -z 512k 64k", "top.qcow2")
	qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "want")
	want, err := os.ReadFile(filepath.Join(dir, "want"))
	if err != nil {
		t.Fatal(err)
	}
	return dir, want
}

func chainSpec(t *testing.T, path string, p open.Policy) open.Spec {
	t.Helper()
	s, _ := newSpec(t)
	s.Format, s.Path, s.ReadOnly, s.Backing = "qcow2", path, true, p
	return s
}

func wantContents(t *testing.T, d backing.Device, want []byte) {
	t.Helper()
	got := make([]byte, d.Info().Size)
	if err := d.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatalf("read: %v", err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("read: %d bytes differ from the %d that QEMU reads", len(got), len(want))
	}
}

func TestChainReadsAsQEMUReadsIt(t *testing.T) {
	dir, want := newChain(t)
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	overlay(t, sub, "up.qcow2", "../top.qcow2", "qcow2")
	overlay(t, dir, "lost.qcow2", "/nowhere/top.qcow2", "qcow2")
	at := func(name string) string { return filepath.Join(dir, name) }
	all := []open.File{{Path: at("top.qcow2")}, {Path: at("mid.qcow2"), Format: "qcow2"}, {Path: at("base.raw"), Format: "raw"}}
	for _, tt := range []struct {
		name, image string
		policy      open.Policy
		cache       string
	}{
		{"same directory", "top.qcow2", open.Policy{Mode: open.SameDir}, ""},
		{"same directory, direct", "top.qcow2", open.Policy{Mode: open.SameDir}, open.CacheNone},
		{"beneath", "sub/up.qcow2", open.Policy{Mode: open.Beneath, Root: dir}, ""},
		{"explicit", "top.qcow2", open.Policy{Mode: open.Explicit, Files: all[1:]}, ""},
		{"explicit, instead of a name that leads nowhere", "lost.qcow2", open.Policy{Mode: open.Explicit, Files: all}, open.CacheDirectSync},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := chainSpec(t, at(tt.image), tt.policy)
			s.Cache = tt.cache
			d := mustOpen(t, s)
			wantContents(t, d, want)
			if d.Info().Caps.Has(backing.CanWrite) {
				t.Error("caps: a read-only image can write")
			}
		})
	}
}

func TestChainBehindALinkIsThatOfItsFolder(t *testing.T) {
	dir, want := newChain(t)
	beside := t.TempDir()
	link := filepath.Join(beside, "link")
	for _, err := range []error{os.Mkdir(filepath.Join(dir, "sub"), 0o700), os.Symlink(filepath.Join(dir, "sub"), link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	overlay(t, dir, "sub/up.qcow2", "../top.qcow2", "qcow2")
	for _, name := range []string{"top.qcow2", "mid.qcow2"} { // others, of the same names
		overlay(t, beside, name, "/nowhere/base.raw", "raw")
	}
	t.Chdir(link)
	for _, tt := range []struct {
		name, image string
		policy      open.Policy
	}{
		{"same directory", link + "/../top.qcow2", open.Policy{Mode: open.SameDir}},
		{"same directory, relative", "../top.qcow2", open.Policy{Mode: open.SameDir}},
		{"beneath", link + "/../top.qcow2", open.Policy{Mode: open.Beneath, Root: link + "/.."}},
		{"beneath, relative", "../top.qcow2", open.Policy{Mode: open.Beneath, Root: ".."}},
		{"of a name that goes up", "up.qcow2", open.Policy{Mode: open.Beneath, Root: dir}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := chainSpec(t, tt.image, tt.policy)
			wantContents(t, mustOpen(t, s), want)
			tab, err := open.Gather(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			defer tab.Close()
			s.Table = tab
			wantContents(t, mustOpen(t, s), want)
		})
	}
}

func TestChainIsRefused(t *testing.T) {
	dir, _ := newChain(t)
	overlay(t, dir, "self.qcow2", "./self.qcow2", "qcow2")
	overlay(t, dir, "a.qcow2", "b.qcow2", "qcow2")
	overlay(t, dir, "b.qcow2", "./a.qcow2", "qcow2")
	overlay(t, dir, "hard.qcow2", "name.qcow2", "qcow2")
	overlay(t, dir, "above-none.qcow2", "none.raw", "raw")
	overlay(t, dir, "above-raw.qcow2", "base.raw", "qcow2")
	overlay(t, dir, "above-fifo.qcow2", "fifo", "raw")
	overlay(t, dir, "above-nbd.qcow2", "nbd://127.0.0.1:1/x", "raw")
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.Link(at("hard.qcow2"), at("name.qcow2")), unix.Mkfifo(at("fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	// E5: the magic of the format extension becomes another.
	patched(t, at("top.qcow2"), at("E5.qcow2"), "\xe2\x79\x2a\xca", "\xe2\x79\x2a\xcb")
	// E6: a NUL inside the name.
	patched(t, at("top.qcow2"), at("E6.qcow2"), "mid.qcow2", "mid.q\x00ow2")
	sameDir := open.Policy{Mode: open.SameDir}
	for _, tt := range []struct {
		name, image string
		policy      open.Policy
		want        error
		text        string
	}{
		{"E1 by default", "top.qcow2", open.Policy{}, open.ErrDenied, "--backing=deny"},
		{"E2 FIFO", "above-fifo.qcow2", sameDir, open.ErrDenied, "FIFO"},
		{"E4 protocol", "above-nbd.qcow2", sameDir, open.ErrDenied, `"nbd"`},
		{"E5 format not said", "E5.qcow2", sameDir, open.ErrDenied, "never guessed"},
		{"E6 NUL in the name", "E6.qcow2", sameDir, backing.ErrInvalid, "E6.qcow2"},
		{"E7 itself", "self.qcow2", sameDir, backing.ErrInvalid, "loop"},
		{"E7 each other", "a.qcow2", sameDir, backing.ErrInvalid, "loop"},
		{"E7 itself by another name", "hard.qcow2", sameDir, backing.ErrInvalid, "loop"},
		{"E11 raw image called qcow2", "above-raw.qcow2", sameDir, backing.ErrInvalid, "base.raw"},
		{"not there", "above-none.qcow2", sameDir, os.ErrNotExist, "none.raw"},
		{"too few files", "top.qcow2", open.Policy{Mode: open.Explicit, Files: []open.File{{Path: at("mid.qcow2")}}}, open.ErrDenied, "--backing-file"},
		{"too many files", "mid.qcow2", open.Policy{Mode: open.Explicit, Files: []open.File{{Path: at("base.raw")}, {Path: at("want")}}}, backing.ErrInvalid, "not needed"},
		{"data file that no image has", "mid.qcow2", open.Policy{Mode: open.Explicit, Files: []open.File{{Path: at("base.raw")}}, DataFiles: []string{at("want")}}, backing.ErrInvalid, "not needed"},
		{"directory that is not there", "top.qcow2", open.Policy{Mode: open.Beneath, Root: at("none")}, os.ErrNotExist, "none"},
		{"unknown policy", "top.qcow2", open.Policy{Mode: "allow"}, backing.ErrInvalid, `"allow"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := chainSpec(t, at(tt.image), tt.policy)
			before := descriptors(t)
			failed := make(chan error, 1)
			go func() {
				d, err := open.Open(t.Context(), s)
				if err == nil {
					_ = d.Close()
				}
				failed <- err
			}()
			select {
			case err := <-failed:
				if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("open: got %v, want %v with %q in it", err, tt.want, tt.text)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the open hangs")
			}
			if got := descriptors(t); got != before {
				t.Errorf("descriptors after the refusal: got %d, want %d", got, before)
			}
		})
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// patched copies an image with one string in it replaced.
func patched(t *testing.T, from, to, old, replacement string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b[:65536], []byte(old)); n != 1 || len(old) != len(replacement) {
		t.Fatalf("patch of %q: %q is there %d times", from, old, n)
	}
	copy(b[bytes.Index(b, []byte(old)):], replacement)
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDepthOfAChainIsBounded(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "1"), make([]byte, diskSize), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay(t, dir, "2", "01", "raw")
	template := filepath.Join(dir, "2")
	format := "raw"
	for i := 2; i <= limits.ChainDepth+1; i++ {
		// The name of what is below has two digits.
		name := filepath.Join(dir, fmt.Sprintf("%02d", i))
		if i == 3 {
			overlay(t, dir, "3", "02", "qcow2")
			template, format = filepath.Join(dir, "3"), "qcow2"
		}
		below := map[string]string{"raw": "01", "qcow2": "02"}[format]
		b, err := os.ReadFile(template)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.LastIndex(b[:65536], []byte(below))
		copy(b[at:], fmt.Sprintf("%02d", i-1))
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(filepath.Join(dir, "1"), filepath.Join(dir, "01")); err != nil {
		t.Fatal(err)
	}
	policy := open.Policy{Mode: open.SameDir}
	s := chainSpec(t, filepath.Join(dir, fmt.Sprintf("%02d", limits.ChainDepth)), policy)
	wantContents(t, mustOpen(t, s), make([]byte, diskSize))
	s.Path = filepath.Join(dir, fmt.Sprintf("%02d", limits.ChainDepth+1))
	if _, err := open.Open(t.Context(), s); !errors.Is(err, open.ErrDenied) || !strings.Contains(err.Error(), fmt.Sprint(limits.ChainDepth)) {
		t.Errorf("open of %d images: got %v, want %v", limits.ChainDepth+1, err, open.ErrDenied)
	}
}

// TestEveryLayerIsLocked is E12 too: the chain stays what it was when it was
// opened.
func TestEveryLayerIsLocked(t *testing.T) {
	dir, want := newChain(t)
	d := mustOpen(t, chainSpec(t, filepath.Join(dir, "top.qcow2"), open.Policy{Mode: open.SameDir}))
	for name, format := range map[string]string{"top.qcow2": "qcow2", "mid.qcow2": "qcow2", "base.raw": "raw"} {
		if out, err := tryQEMU(t, dir, "qemu-io", "-f", format, "-c", "write 0 512", name); err == nil || !strings.Contains(out, `Failed to get "write" lock`) {
			t.Errorf("qemu-io writes to %s: got %q, %v, want it to find the lock", name, out, err)
		}
		if out, err := tryQEMU(t, dir, "qemu-img", "resize", "-f", format, name, "2M"); err == nil || !strings.Contains(out, "lock") {
			t.Errorf("qemu-img resizes %s: got %q, %v, want it to find the lock", name, out, err)
		}
	}
	qemu(t, dir, "qemu-io", "-r", "-f", "qcow2", "-c", "read 0 1M", "top.qcow2")
	qemu(t, dir, "qemu-img", "info", "--backing-chain", "-f", "qcow2", "top.qcow2")
	wantContents(t, mustOpen(t, chainSpec(t, filepath.Join(dir, "mid.qcow2"), open.Policy{Mode: open.SameDir})), readVia(t, dir, "mid.qcow2"))

	other := filepath.Join(dir, "other")
	if err := errors.Join(os.WriteFile(other, make([]byte, diskSize), 0o600), os.Rename(other, filepath.Join(dir, "base.raw"))); err != nil {
		t.Fatal(err)
	}
	wantContents(t, d, want)
}

// readVia is what QEMU reads from an image.
func readVia(t *testing.T, dir, image string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestChainThatQEMUWritesToIsNotOpened(t *testing.T) {
	dir, want := newChain(t)
	for _, tt := range []struct {
		image, format string
		args          []string
		locked        bool
	}{
		{"top.qcow2", "qcow2", nil, true},
		{"mid.qcow2", "qcow2", nil, true},
		{"base.raw", "raw", nil, true},
		{"top.qcow2", "qcow2", []string{"-r"}, false},
	} {
		t.Run(fmt.Sprint(tt.image, tt.args), func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "qemu-io", append(slices.Clone(tt.args), "-f", tt.format, tt.image)...)
			cmd.Dir = dir
			in, out := backingtest.Converse(t, cmd)
			defer func() { _ = in.Close(); _ = cmd.Wait() }()
			if _, err := io.WriteString(in, "length\n"); err != nil {
				t.Fatal(err)
			}
			// The answer says that the image is open.
			for line := ""; !strings.Contains(line, "MiB"); {
				var err error
				if line, err = out.ReadString('\n'); err != nil {
					t.Fatalf("qemu-io: %q, %v", line, err)
				}
			}
			s := chainSpec(t, filepath.Join(dir, "top.qcow2"), open.Policy{Mode: open.SameDir})
			d, err := open.Open(t.Context(), s)
			if errors.Is(err, backing.ErrLocked) != tt.locked || (err == nil) == tt.locked {
				t.Fatalf("open: got %v, want locked %v", err, tt.locked)
			}
			if err == nil {
				wantContents(t, d, want)
				if err := d.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}
		})
	}
}

func TestDataFileIsOpenedThroughTheGate(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	// E9, CVE-2024-32498: a name that leads elsewhere, of the same length.
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	data := strings.Repeat("d", len(secret))
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+data, "image.qcow2", "1M")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 0xcc 128k 64k", "image.qcow2")
	want := readVia(t, dir, "image.qcow2")
	patched(t, at("image.qcow2"), at("E9.qcow2"), data, secret)
	patched(t, at("image.qcow2"), at("E9-json.qcow2"), data, "json:{}"+data[7:])
	for _, tt := range []struct {
		name, image string
		policy      open.Policy
		text        string // in a refusal
	}{
		{"beside the image", "image.qcow2", open.Policy{Mode: open.SameDir}, ""},
		{"by the operator", "E9.qcow2", open.Policy{Mode: open.Explicit, DataFiles: []string{at(data)}}, ""},
		{"by default", "image.qcow2", open.Policy{}, "--backing=deny"},
		{"E9 absolute name", "E9.qcow2", open.Policy{Mode: open.SameDir}, "--backing=same-dir"},
		{"E9 JSON", "E9-json.qcow2", open.Policy{Mode: open.SameDir}, `"json"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := open.Open(t.Context(), chainSpec(t, at(tt.image), tt.policy))
			if err != nil {
				if tt.text == "" || !errors.Is(err, open.ErrDenied) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("open: got %v, want %q in it", err, tt.text)
				}
				return
			}
			defer func() {
				if err := d.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}()
			if tt.text != "" {
				t.Fatalf("open: got no error, want %q in one", tt.text)
			}
			wantContents(t, d, want)
			if out, err := tryQEMU(t, dir, "qemu-io", "-f", "raw", "-c", "write 0 512", data); err == nil || !strings.Contains(out, "lock") {
				t.Errorf("qemu-io writes to the data file: got %q, %v, want it to find the lock", out, err)
			}
		})
	}
}

// TestOnlyWhatIsWrittenToIsAskedFor: the image and its data file, not what is below.
// A refusal leaves nothing open.
func TestOnlyWhatIsWrittenToIsAskedFor(t *testing.T) {
	dir, _ := newChain(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "-F", "raw", "-b", "base.raw", "own.qcow2", "1M")
	refused := errors.New("refused")
	for _, tt := range []struct {
		image, format string
		readOnly      bool
		asked, below  []string
	}{
		{"base.raw", "raw", false, []string{"base.raw"}, nil},
		{"base.raw", "raw", true, nil, nil},
		{"top.qcow2", "qcow2", false, []string{"top.qcow2"}, []string{"mid.qcow2", "base.raw"}},
		{"top.qcow2", "qcow2", true, nil, []string{"mid.qcow2", "base.raw"}},
		{"own.qcow2", "qcow2", false, []string{"own.qcow2", "data"}, []string{"base.raw"}},
	} {
		var asked, below []string
		s := chainSpec(t, at(tt.image), open.Policy{Mode: open.SameDir})
		s.Format, s.ReadOnly = tt.format, tt.readOnly
		s.Opened = func(f *os.File, is bool) {
			if is {
				below = append(below, filepath.Base(f.Name()))
			}
		}
		for i := 0; i <= len(tt.asked); i++ { // the last is allowed all
			before := descriptors(t)
			asked, below = nil, nil
			s.Writes = func(f *os.File) error {
				if asked = append(asked, filepath.Base(f.Name())); len(asked) == i+1 {
					return refused
				}
				return nil
			}
			d, err := open.Open(t.Context(), s)
			if i < len(tt.asked) != errors.Is(err, refused) || (err == nil) != (d != nil) {
				t.Fatalf("%s, refusal %d: got %v", tt.image, i, err)
			}
			if d != nil {
				err = d.Close()
			}
			if got := descriptors(t); got != before || d != nil && err != nil {
				t.Errorf("%s, refusal %d: %d descriptors are left, %v", tt.image, i, got-before, err)
			}
		}
		if !slices.Equal(asked, tt.asked) || !slices.Equal(below, tt.below) {
			t.Errorf("%s, read-only %v: asked for %q, below %q, want %q, %q", tt.image, tt.readOnly, asked, below, tt.asked, tt.below)
		}
	}
}

func TestSnapshotIsServedByIDOrName(t *testing.T) {
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "image.qcow2", "1M")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 64k", "image.qcow2")
	qemu(t, dir, "qemu-img", "snapshot", "-c", "before", "image.qcow2")
	qemu(t, dir, "qemu-io", "-f", "qcow2", "-c", "write -P 0x22 0 64k", "image.qcow2")
	for snapshot, want := range map[string]byte{"": 0x22, "1": 0x11, "before": 0x11} {
		s := chainSpec(t, filepath.Join(dir, "image.qcow2"), open.Policy{})
		s.Snapshot = snapshot
		p := make([]byte, 512)
		if err := mustOpen(t, s).ReadAt(t.Context(), p, 0); err != nil || p[0] != want {
			t.Errorf("snapshot %q: got %#x, %v, want %#x", snapshot, p[0], err, want)
		}
	}
	s := chainSpec(t, filepath.Join(dir, "image.qcow2"), open.Policy{})
	s.Snapshot = "after"
	if _, err := open.Open(t.Context(), s); err == nil || !strings.Contains(err.Error(), "after") {
		t.Errorf("snapshot that is not there: got %v, want its name in an error", err)
	}
}

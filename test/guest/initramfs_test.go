package guest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestBusyboxUnpacksWhatTheArchiveHolds(t *testing.T) {
	testenv.Require(t, "busybox")
	var archive bytes.Buffer
	c := &cpioWriter{w: &archive}
	c.dir("a")
	c.file("a/empty", 0o600, nil)
	c.file("a/five", 0o755, []byte("12345"))
	c.file("a/four", 0o644, []byte("1234"))
	c.symlink("a/link", "five")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(testenv.Path(t, "busybox"), "cpio", "-i", "-d")
	cmd.Dir, cmd.Stdin = dir, &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]struct {
		text string
		perm os.FileMode
	}{"empty": {"", 0o600}, "five": {"12345", 0o755}, "four": {"1234", 0o644}} {
		path := filepath.Join(dir, "a", name)
		text, err := os.ReadFile(path)
		if err != nil || string(text) != want.text {
			t.Errorf("%s holds %q, %v; want %q", name, text, err, want.text)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want.perm {
			t.Errorf("%s: %v, %v; want mode %v", name, st, err, want.perm)
		}
	}
	if target, err := os.Readlink(filepath.Join(dir, "a/link")); err != nil || target != "five" {
		t.Errorf("the link leads to %q, %v", target, err)
	}
}

func TestArchiveIsAlignedAndEnds(t *testing.T) {
	var archive bytes.Buffer
	c := &cpioWriter{w: &archive}
	c.char("console", 5, 1)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	text := archive.String()
	// Field 2 is the mode, fields 10 and 11 are the device's numbers.
	if len(text)%4 != 0 || text[14:22] != "00002180" || text[78:94] != "0000000500000001" {
		t.Errorf("got %q", text)
	}
	if !strings.Contains(text, "TRAILER!!!") {
		t.Error("the archive has no end")
	}
}

type failing struct{ after int }

var errFull = errors.New("no space")

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestArchiveReturnsItsFirstError(t *testing.T) {
	for after := range 200 {
		c := &cpioWriter{w: &failing{after}}
		c.file("a", 0o644, make([]byte, 100))
		if err := c.Close(); !errors.Is(err, errFull) {
			t.Fatalf("%d bytes fit, and Close returns %v", after, err)
		}
	}
}

func TestModulesAreLoadedAfterWhatTheyNeed(t *testing.T) {
	const deps = `kernel/net/vsock.ko:
kernel/net/virtio-common.ko.xz: kernel/net/vsock.ko
kernel/net/vsock-loopback.ko.xz: kernel/net/virtio-common.ko.xz kernel/net/vsock.ko
`
	const builtin = "kernel/fs/ext4/ext4.ko\n"
	for _, tt := range []struct {
		name string
		want []string
	}{
		{"vsock", []string{"kernel/net/vsock.ko"}},
		{"vsock_loopback", []string{"kernel/net/vsock.ko", "kernel/net/virtio-common.ko.xz", "kernel/net/vsock-loopback.ko.xz"}},
		{"ext4", nil},
	} {
		got, err := loadOrder(deps, builtin, tt.name)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, %v; want %q", tt.name, got, err, tt.want)
		}
	}
	if _, err := loadOrder(deps, builtin, "nbd"); err == nil || !strings.Contains(err.Error(), "nbd") {
		t.Errorf("a missing module is answered %v", err)
	}
}

func TestLibrariesAreFoundInWhatLddPrints(t *testing.T) {
	const out = `	linux-vdso.so.1 (0x00007ffd)
	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)
	/lib64/ld-linux-x86-64.so.2 (0x00007f)
`
	var got []string
	for _, m := range library.FindAllStringSubmatch(out, -1) {
		got = append(got, m[1])
	}
	want := []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestFoldersComeBeforeWhatIsInThem(t *testing.T) {
	in := &initramfs{files: map[string]contents{}}
	in.addFile("/usr/lib/x/libc.so", 0o644, nil)
	in.addFile("init", 0o755, nil)
	in.addDir("usr/lib")
	if want := []string{"usr", "usr/lib", "usr/lib/x"}; !slices.Equal(in.dirs, want) {
		t.Errorf("got %q, want %q", in.dirs, want)
	}
}

func TestFailedScenarioIsReportedWithItsConsole(t *testing.T) {
	requireGuest(t)
	in, err := newInitramfs(testenv.Context(t), testenv.CloudKernel(t, stableKernel), "echo about to fail\nfalse\necho not reached\n")
	if err != nil {
		t.Fatal(err)
	}
	console, code, err := boot(t.Context(), in, 256)
	if err != nil || code != 1 || !strings.Contains(console, "about to fail") || strings.Contains(console, "not reached") {
		t.Errorf("status %d, %v; console:\n%s", code, err, console)
	}
}

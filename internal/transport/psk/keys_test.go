package psk

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport/stamp/stamptest"
)

// hexKey is a key of n bytes, in digits.
func hexKey(n int, b byte) string { return fmt.Sprintf("%x", bytes.Repeat([]byte{b}, n)) }

// keyFile writes a file of the mode and returns its path.
func keyFile(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.psk")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeyFileIsReadAsPsktoolWritesIt(t *testing.T) {
	text := "vm1:" + hexKey(32, 1) + "\n\nvm 2,\"<x>:" + strings.ToUpper(hexKey(16, 0xab)) + "\r\nvm1:" + hexKey(64, 2)
	k, err := Load(keyFile(t, text, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	name, keys := k.find([]byte("vm1"))
	if name != "vm1" || len(keys[0]) != 32 || len(keys[1]) != 64 {
		t.Errorf("vm1: got %q with keys of %d and %d bytes, want 32 and 64", name, len(keys[0]), len(keys[1]))
	}
	if name, _ := k.find([]byte(`vm 2,"<x>`)); name != `vm 2,"<x>` {
		t.Errorf("a name with punctuation: got %q", name)
	}
	if short := k.Short(); len(short) != 1 || short[0] != `vm 2,"<x>` {
		t.Errorf("short keys: got %q, want the second identity", short)
	}
}

func TestUnknownIdentityHasKeysThatNobodyKnows(t *testing.T) {
	k, err := Load(keyFile(t, "vm1:"+hexKey(32, 1), 0o400))
	if err != nil {
		t.Fatal(err)
	}
	name, a := k.find([]byte("vm2"))
	_, again := k.find([]byte("vm2"))
	_, b := k.find([]byte("vm3"))
	if name != "" || len(a[0]) == 0 || len(a[1]) == 0 {
		t.Fatalf("got name %q and keys of %d and %d bytes", name, len(a[0]), len(a[1]))
	}
	if bytes.Equal(a[0], a[1]) || bytes.Equal(a[0], b[0]) || !bytes.Equal(a[0], again[0]) {
		t.Error("made up keys are not one for each identity and place")
	}
}

func TestKeyFileWithMistakesIsRefused(t *testing.T) {
	many := strings.Builder{}
	for i := range limits.PSKIdentities + 1 {
		fmt.Fprintf(&many, "vm%d:%064x\n", i, i+1)
	}
	good := hexKey(32, 1)
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", "no key"},
		{"no colon", "vm1" + good, "line 1: want IDENTITY:KEY"},
		{"no identity", ":" + good, "identity is empty"},
		{"digits for an identity", "#766d31:" + good, "begins with #"},
		{"control character", "vm\x07:" + good, "has the character"},
		{"not utf-8", "vm\xff:" + good, "not UTF-8"},
		{"long identity", strings.Repeat("x", limits.PSKIdentity+1) + ":" + good, "129 bytes"},
		{"short key", "vm1:" + hexKey(15, 1), "15 bytes"},
		{"long key", "vm1:" + hexKey(65, 1), "65 bytes"},
		{"odd digits", "vm1:" + good + "0", "hexadecimal"},
		{"no digits", "vm1:" + strings.Repeat("g", 64), "hexadecimal"},
		{"one key for two", "vm1:" + good + "\nvm2:" + good, "line 2: \"vm2\" has a key that \"vm1\" has"},
		{"one key twice", "vm1:" + good + "\nvm1:" + good, "line 2"},
		{"three keys", "vm1:" + good + "\nvm1:" + hexKey(32, 2) + "\nvm1:" + hexKey(32, 3), "line 3"},
		{"too many", many.String(), "more than 1024 identities"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(keyFile(t, tt.text, 0o600))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), good[:16]) {
				t.Errorf("the error shows a key: %v", err)
			}
		})
	}
}

func TestKeyFileThatOthersReachIsRefused(t *testing.T) {
	good := "vm1:" + hexKey(32, 1) + "\n"
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o620, 0o602, 0o610} {
		if _, err := Load(keyFile(t, good, mode)); err == nil || !strings.Contains(err.Error(), "keys.psk") {
			t.Errorf("mode %#o: got %v, want a refusal with the name of the file", mode, err)
		}
	}
	dir := t.TempDir()
	link, pipe := filepath.Join(dir, "link"), filepath.Join(dir, "pipe")
	if err := os.Symlink(keyFile(t, good, 0o600), link); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	big := keyFile(t, strings.Repeat("\n", limits.PSKFile+1), 0o600)
	for path, want := range map[string]string{
		link: "symbolic link", pipe: "no regular file", dir: "no regular file", big: "more than", filepath.Join(dir, "none"): "no such file",
	} {
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}

// TestSwappedKeyFileIsNotFollowed is CF-08: the file is exchanged for a link to
// another one, and back, while it is read.
func TestSwappedKeyFileIsNotFollowed(t *testing.T) {
	path := keyFile(t, "vm1:"+hexKey(32, 1)+"\n", 0o600)
	other := keyFile(t, "vm2:"+hexKey(32, 2)+"\n", 0o600)
	kept, link := path+".kept", path+".link"
	if err := errors.Join(os.Link(path, kept), os.Symlink(other, link)); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan bool), make(chan error)
	go func() {
		next := path + ".next"
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := errors.Join(os.Symlink(other, next), os.Rename(next, path), os.Link(kept, next), os.Rename(next, path)); err != nil {
				done <- err
				return
			}
		}
	}()
	k, err := Load(kept)
	if err != nil {
		t.Fatal(err)
	}
	k.path = path
	var links, files int
	for n := 0; links == 0 || files < 100; n++ {
		if n == 1<<20 {
			t.Fatalf("met the link %d times, the file %d times", links, files)
		}
		switch _, err := k.Reload(); {
		case err == nil:
			files++
		case strings.Contains(err.Error(), "symbolic link"):
			links++
		default:
			t.Fatal(err)
		}
		if name, _ := k.find([]byte("vm2")); name != "" {
			t.Fatal("the keys are those of the file that the link names")
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReloadThatFailsChangesNothing(t *testing.T) {
	path := keyFile(t, "vm1:"+hexKey(32, 1)+"\n", 0o600)
	k, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if changed, err := k.Reload(); changed || err != nil {
		t.Errorf("the same file: got %t, %v", changed, err)
	}
	write("vm1:broken\n")
	if _, err := k.Reload(); err == nil {
		t.Error("a broken file was taken")
	}
	if name, _ := k.find([]byte("vm1")); name != "vm1" {
		t.Error("the keys are gone after a broken reload")
	}
	write("vm2:" + hexKey(32, 2) + "\n")
	changed, take, err := k.Check()
	if !changed || err != nil {
		t.Fatalf("check of another file: got %t, %v", changed, err)
	}
	if name, _ := k.find([]byte("vm1")); name != "vm1" {
		t.Error("a check has changed the keys")
	}
	write("vm3:" + hexKey(32, 3) + "\n")
	take()
	if name, _ := k.find([]byte("vm2")); name != "vm2" || k.Len() != 1 {
		t.Error("the keys are not those that the check has read")
	}
	if changed, err := k.Reload(); !changed || err != nil {
		t.Fatalf("another file: got %t, %v", changed, err)
	}
	if name, _ := k.find([]byte("vm1")); name != "" || k.Len() != 1 {
		t.Error("an identity that the file has no more is still there")
	}
}

// TestKeysThatCannotBeReadAgain is what a server has that was started by root and
// has changed its user: they count until the file changes.
func TestKeysThatCannotBeReadAgain(t *testing.T) {
	dir, err := os.MkdirTemp("", "psk")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "keys.psk")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, []byte("vm1:"+hexKey(32, 1)+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	k, err := LoadFrom(f, path)
	if err != nil {
		t.Fatal(err)
	}
	check := func() (bool, error) {
		changed, _, err := k.Check()
		return changed, err
	}
	for name, look := range map[string]func() (bool, error){"check": check, "reload": k.Reload} {
		if changed, err := stamptest.AsNobody(t, look); changed || err != nil {
			t.Errorf("%s of the same file: got %t, %v; want no change", name, changed, err)
		}
	}
	next := path + ".next"
	if err := errors.Join(os.WriteFile(next, []byte("vm1:"+hexKey(32, 2)+"\n"), 0), os.Rename(next, path)); err != nil {
		t.Fatal(err)
	}
	for name, look := range map[string]func() (bool, error){"check": check, "reload": k.Reload} {
		if changed, err := stamptest.AsNobody(t, look); changed || !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s of a file that has changed: got %t, %v; want that it cannot be read", name, changed, err)
		}
	}
	if name, _ := k.find([]byte("vm1")); name != "vm1" {
		t.Error("the keys are gone")
	}
}

// TestKeysInAClosedFolder are looked at by the file that they were loaded from.
func TestKeysInAClosedFolder(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(path string) error // nil: nothing
		kept   bool
	}{
		{"nothing", nil, true},
		{"nothing, and nothing to look at", nil, false},
		{"written", func(path string) error {
			return os.WriteFile(path, []byte("vm2:"+hexKey(32, 2)+"\n"), 0o600)
		}, true},
		{"replaced", func(path string) error { return Add(path, "vm2", 32, false) }, true},
		{"removed", os.Remove, true},
		{"moved", func(path string) error { return os.Rename(path, path+".old") }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := keyFile(t, "vm1:"+hexKey(32, 1)+"\n", 0o600)
			f, err := Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			k, err := LoadFrom(f, path)
			if err != nil {
				t.Fatal(err)
			}
			within := stamptest.CloseFolder(t, filepath.Dir(path))
			if tt.kept {
				k.Keep(f)
			}
			if tt.change != nil {
				within(func() error { return tt.change(path) })
			}
			same := tt.kept && tt.change == nil
			changed, err := stamptest.AsNobody(t, k.Reload)
			if changed || same != (err == nil) || err != nil && !errors.Is(err, fs.ErrPermission) {
				t.Errorf("reload: got %t, %v; want no change, and that it cannot be read: %t", changed, err, !same)
			}
			if _, err := stamptest.AsNobody(t, func() (bool, error) { return false, k.Unseen() }); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("unseen: got %v, want that the folder is closed", err)
			}
		})
	}
}

func FuzzKeyFile(f *testing.F) {
	f.Add([]byte("vm1:" + hexKey(32, 1) + "\nvm1:" + hexKey(16, 2)))
	f.Add([]byte(":\n#:\nvm:zz"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parse(data)
		if err != nil {
			return
		}
		for _, id := range list {
			if CheckIdentity(id.name) != nil || len(id.keys) == 0 || len(id.keys) > limits.PSKKeys {
				t.Errorf("accepted %q with %d keys", id.name, len(id.keys))
			}
		}
	})
}

package psk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestAddedKeysAreInTheFileAndPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.psk")
	add := func(name string, only bool) error { return Add(path, name, 32, only) }
	if err := errors.Join(add("vm0", false), add("vm1", false), add("vm2", false)); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(path)
	if err := errors.Join(err, add("vm1", false)); err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(first), "\n")
	if both, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(both), lines[0]+"vm1:") || !strings.HasSuffix(string(both), lines[1]+lines[2]) {
		t.Errorf("the new key does not stand before the old one: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v; want mode 0600", fi.Mode(), err)
	}
	k, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	_, before := k.find([]byte("vm1"))
	if err := add("vm1", false); err == nil || !strings.Contains(err.Error(), "vm1 has 2 keys already; --only replaces them") {
		t.Errorf("a third key: got %v", err)
	}
	if err := add("vm1", true); err != nil {
		t.Fatal(err)
	}
	list, err := List(path)
	if err != nil || len(list) != 3 || len(list[1].Bytes) != 1 || list[1].Identity != "vm1" || list[1].Bytes[0] != 32 {
		t.Errorf("got %+v, %v; want vm1 between the others, with one key", list, err)
	}
	if _, err := k.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, after := k.find([]byte("vm1")); string(after[0]) == string(before[0]) || string(after[0]) == string(before[1]) {
		t.Error("the key is not a new one")
	}
}

// TestKeysAddedAtOnceAreAllThere holds it for a new file and for one that is there.
func TestKeysAddedAtOnceAreAllThere(t *testing.T) {
	for _, there := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "keys.psk")
		if there {
			path = keyFile(t, "old:"+hexKey(32, 1), 0o600)
		}
		var all sync.WaitGroup
		const n = 16
		for i := range n {
			all.Go(func() {
				if err := Add(path, fmt.Sprintf("vm%d", i), 32, false); err != nil {
					t.Errorf("vm%d: %v", i, err)
				}
			})
		}
		all.Wait()
		list, err := List(path)
		names := map[string]bool{}
		for _, l := range list {
			names[l.Identity] = true
		}
		for i := range n {
			if name := fmt.Sprintf("vm%d", i); !names[name] {
				t.Errorf("file there before: %t: %s has no key", there, name)
			}
		}
		if err != nil || names["old"] != there {
			t.Errorf("file there before: %t: got %v, %v", there, list, err)
		}
		if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) != 1 {
			t.Errorf("the folder has %v, %v", files, err)
		}
	}
}

// TestAddLeavesALockedFile holds that who has the file locked is not overwritten.
func TestAddLeavesALockedFile(t *testing.T) {
	path := keyFile(t, "vm1:"+hexKey(32, 1), 0o600)
	now := time.Now()
	f, err := lockFile(path, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockFile(path, now); err == nil || !strings.Contains(err.Error(), "locked by another process") {
		t.Errorf("got %v", err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if isAt(f, path) {
		t.Error("a file that was moved is still taken for the one at its path")
	}
	if g, err := lockFile(path, now); g != nil || err != nil {
		t.Errorf("no file: got %v, %v", g, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAddRefusesAndChangesNothing(t *testing.T) {
	open := keyFile(t, "vm1:"+hexKey(32, 1), 0o644)
	broken := keyFile(t, "vm1", 0o600)
	for _, tt := range []struct {
		name, path, identity string
		bytes                int
	}{
		{"file of mode 0644", open, "vm2", 32},
		{"broken file", broken, "vm2", 32},
		{"no identity", filepath.Join(t.TempDir(), "x"), "", 32},
		{"colon", filepath.Join(t.TempDir(), "x"), "a:b", 32},
		{"newline", filepath.Join(t.TempDir(), "x"), "a\nb", 32},
		{"short", filepath.Join(t.TempDir(), "x"), "vm", 15},
		{"long", filepath.Join(t.TempDir(), "x"), "vm", 65},
	} {
		before, _ := os.ReadFile(tt.path)
		if err := Add(tt.path, tt.identity, tt.bytes, false); err == nil {
			t.Errorf("%s: no error", tt.name)
		}
		if after, _ := os.ReadFile(tt.path); string(after) != string(before) {
			t.Errorf("%s: the file has changed", tt.name)
		}
	}
}

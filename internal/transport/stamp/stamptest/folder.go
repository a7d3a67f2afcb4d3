// Package stamptest has what tests of files in closed folders need.
package stamptest

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// nobody is a user to whom no file belongs.
const nobody = 65534

// CloseFolder closes a folder to everybody but root until the test ends. within does
// something in it.
func CloseFolder(t *testing.T, dir string) (within func(do func() error)) {
	t.Helper()
	chmod := func(mode os.FileMode) {
		if err := os.Chmod(dir, mode); err != nil {
			t.Error(err)
		}
	}
	chmod(0)
	t.Cleanup(func() { chmod(0o700) })
	return func(do func() error) {
		if os.Getuid() != 0 {
			chmod(0o700)
			defer chmod(0)
		}
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
}

// AsNobody calls look as a user to whom no file belongs.
func AsNobody(t *testing.T, look func() (bool, error)) (changed bool, err error) {
	t.Helper()
	if os.Getuid() != 0 {
		return look()
	}
	runtime.LockOSThread() // whose user for files it is
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setfsuid(0); err != nil {
			t.Error(err)
		}
	}()
	return look()
}

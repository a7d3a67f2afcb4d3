package raw

import (
	"testing"

	"golang.org/x/sys/unix"
)

// ErrClaimed is the kernel's answer.
var ErrClaimed = errClaimed

// TellLate has the file system at path be one of lateErrors until the test ends.
func TellLate(t *testing.T, path string) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	before := lateErrors
	t.Cleanup(func() { lateErrors = before })
	lateErrors = append(before[:len(before):len(before)], int64(uint32(st.Type)))
}

package bufpool

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resident is how many bytes of mem are backed by pages.
func resident(t *testing.T, mem []byte) int64 {
	t.Helper()
	page := os.Getpagesize()
	vec := make([]byte, len(mem)/page)
	_, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(mem))),
		uintptr(len(mem)), uintptr(unsafe.Pointer(unsafe.SliceData(vec))))
	if e != 0 {
		t.Fatalf("mincore: %v", e)
	}
	var n int64
	for _, v := range vec {
		n += int64(v&1) * int64(page)
	}
	return n
}

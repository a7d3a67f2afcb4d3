package engine

import (
	"os"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/sysio"
)

// WriteCached copies p into the page cache, as write(2) does, and returns how
// much of it. It may wait: the kernel slows writers down when too much is
// dirty. The error is a syscall.Errno. It is not for direct files.
func (f *File) WriteCached(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, e := sysio.Pwrite(f.FD(), p[done:], off+int64(done))
		switch {
		case e == syscall.EINTR || e == syscall.EAGAIN:
		case e != 0:
			return done, e
		case n == 0:
			return done, syscall.EIO
		default:
			done += n
		}
	}
	return done, nil
}

// pageSize is the unit of the page cache.
var pageSize = int64(os.Getpagesize())

// Cached reports whether the page cache holds all of [off, off+n). It is
// false for direct files, and where the kernel cannot tell (before 6.5).
func (f *File) Cached(off, n int64) bool {
	if f.Direct || n <= 0 {
		return false
	}
	pages, e := sysio.TryCached(f.FD(), off, n)
	return e == 0 && pages >= (off+n-1)/pageSize-off/pageSize+1
}

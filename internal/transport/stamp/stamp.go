// Package stamp tells whether a file is still the one that was read, without
// opening it.
package stamp

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

// Stamp tells the versions of a file apart: two of them are compared by ==. An
// absent file has the zero Stamp, one that cannot be looked at has the reason.
type Stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
	reason       string
}

// OfOpen is the Stamp of an open file, for who may not look at its path. As long as it
// stays the same the file has the names that it had: the file systems of Linux set the
// ctime at link(2), unlink(2) and rename(2). A file without a name has none that another
// can have.
func OfOpen(f *os.File) Stamp {
	fi, err := f.Stat()
	if err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
			return Stamp{reason: "removed"}
		}
	}
	return Of(fi, err)
}

// Of is the Stamp of what Stat and its like have returned.
func Of(fi fs.FileInfo, err error) Stamp {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Stamp{}
	case err != nil:
		return Stamp{reason: err.Error()}
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Stamp{reason: "no stat"}
	}
	return Stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

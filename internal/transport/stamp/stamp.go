// Package stamp tells whether a file is still the one that was read, without
// opening it.
package stamp

import (
	"errors"
	"io/fs"
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

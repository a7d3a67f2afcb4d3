package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrStateInUse is that another daemon has the folder of kept exports.
var ErrStateInUse = errors.New("another daemon keeps its exports there")

// stateLock is the file that is locked for as long as a daemon uses the folder.
// Locking the folder itself would let all who may look at it do the same.
const stateLock = ".lock"

// LockState takes the folder dir for this process alone, until the file is
// closed or the process ends. Of a folder that cannot be written to it is nil:
// nobody keeps anything there.
func LockState(dir string) (*os.File, error) {
	d, err := openState(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, err := lockState(dir, os.O_CREATE)
	if _, none := os.Lstat(filepath.Join(dir, stateLock)); errors.Is(none, fs.ErrNotExist) &&
		(errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission)) {
		return nil, nil
	}
	return f, err
}

// StateInUse tells whether another process has taken the folder dir. It makes no
// file there.
func StateInUse(dir string) bool {
	f, err := lockState(dir, 0)
	if err == nil {
		_ = f.Close() // nothing was written by it
	}
	return errors.Is(err, ErrStateInUse)
}

// lockState opens the lock of dir and takes it.
func lockState(dir string, flags int) (*os.File, error) {
	path := filepath.Join(dir, stateLock)
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|flags, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK):
		err = fmt.Errorf("%q: %w", dir, ErrStateInUse)
	case err != nil:
		err = &fs.PathError{Op: "lock", Path: path, Err: err}
	default:
		return f, nil
	}
	return nil, errors.Join(err, f.Close())
}

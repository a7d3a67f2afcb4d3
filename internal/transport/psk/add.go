package psk

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Listed is what may be told of an identity.
type Listed struct {
	Identity string `json:"identity"`
	Bytes    []int  `json:"key-bytes"` // length of each key, in the order of the file
}

// List describes the identities of a key file, in its order.
func List(path string) ([]Listed, error) {
	data, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	ids, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("key file %q: %w", path, err)
	}
	list := make([]Listed, len(ids))
	for i, id := range ids {
		list[i].Identity = id.name
		for _, key := range id.keys {
			list[i].Bytes = append(list[i].Bytes, len(key))
		}
	}
	return list, nil
}

// Add puts a new random key of n bytes for an identity into a key file, which
// is made with mode 0600 if it is not there, and replaced as a whole. Several at a
// time wait for each other. Without only the key that the identity has stays behind
// the new one, which clients take; an identity with limits.PSKKeys keys gets no more.
func Add(path, name string, n int, only bool) error {
	if err := CheckIdentity(name); err != nil {
		return err
	}
	if n < limits.MinPSK || n > limits.MaxPSK {
		return fmt.Errorf("a key of %d bytes: allowed are %d to %d", n, limits.MinPSK, limits.MaxPSK)
	}
	until := time.Now().Add(limits.PSKLock)
	for {
		f, err := lockFile(path, until)
		if err != nil {
			return err
		}
		err = addLocked(f, path, name, n, only)
		if f != nil {
			_ = f.Close() // nothing was written by it
			return err
		}
		// Who has made the file meanwhile has put another key into it.
		if !errors.Is(err, fs.ErrExist) || time.Now().After(until) {
			return err
		}
	}
}

// lockFile opens the key file and locks it (flock(2)) against other commands that
// replace it, until it is closed. It returns nil if there is no file.
func lockFile(path string, until time.Time) (*os.File, error) {
	for {
		f, err := Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && isAt(f, path) {
			return f, nil
		}
		_ = f.Close() // nothing was written by it
		switch {
		case err != nil && !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR):
			return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
		case time.Now().After(until):
			return nil, fmt.Errorf("key file %q is locked by another process", path)
		}
		time.Sleep(lockBackoff)
	}
}

// lockBackoff is the wait between two attempts to lock a key file.
const lockBackoff = 5 * time.Millisecond

// isAt tells whether f is still the file at path: who had the lock before has put
// another one there.
func isAt(f *os.File, path string) bool {
	was, err := f.Stat()
	if err != nil {
		return false
	}
	is, err := os.Lstat(path)
	return err == nil && os.SameFile(was, is)
}

// addLocked is Add for a file that lockFile has locked, or nil for a new one; it
// is fs.ErrExist if somebody else has made that.
func addLocked(f *os.File, path, name string, n int, only bool) error {
	var old []byte
	if f != nil {
		var err error
		if old, err = readAll(f, path); err != nil {
			return err
		}
	}
	defer clear(old)
	key := make([]byte, n)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	ids, _ := parse(old) // an error of what was there is one of the whole too
	for _, id := range ids {
		if id.name == name && len(id.keys) >= limits.PSKKeys && !only {
			return fmt.Errorf("%s has %d keys already; --only replaces them", name, len(id.keys))
		}
	}
	text := with(old, name, key, only)
	defer clear(text)
	if _, err := parse(text); err != nil {
		return fmt.Errorf("key file %q would be wrong: %w", path, err)
	}
	return replace(f, path, text)
}

// with is the text of a key file with one line more, before those of its
// identity; only takes those away.
func with(old []byte, name string, key []byte, only bool) []byte {
	text := make([]byte, 0, len(old)+len(name)+2*len(key)+3)
	added := false
	add := func() {
		if !added {
			text = fmt.Appendf(text, "%s:%x\n", name, key)
		}
		added = true
	}
	for line := range bytes.Lines(old) {
		user, _, _ := bytes.Cut(line, []byte{':'})
		if string(user) == name {
			add()
		}
		if string(user) != name || !only {
			text = append(text, line...)
		}
	}
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	add()
	return text
}

// replace puts a file in place of was in one step and durably, with its owner; if
// that is nil, only where there is none.
func replace(was *os.File, path string, text []byte) error {
	folder, name := filepath.Split(path) // not cleaned: ".." may stand behind a symbolic link
	folder = cmp.Or(folder, ".")
	dir, err := os.Open(folder)
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := os.CreateTemp(folder, "."+name+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if was != nil {
		err = sameOwner(was, f)
	}
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if was == nil {
		err = os.Link(f.Name(), path)
	} else {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("key file %q has the key, but may not be on stable storage: %w", path, err)
	}
	return nil
}

func sameOwner(was, f *os.File) error {
	fi, err := was.Stat()
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) == os.Geteuid() && int(st.Gid) == os.Getegid() {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}

package psk

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

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
// is made with mode 0600 if it is not there, and replaced as a whole. Without
// only the key that the identity has stays behind the new one, which clients
// take; an identity with limits.PSKKeys keys gets no more.
func Add(path, name string, n int, only bool) error {
	if err := CheckIdentity(name); err != nil {
		return err
	}
	if n < limits.MinPSK || n > limits.MaxPSK {
		return fmt.Errorf("a key of %d bytes: allowed are %d to %d", n, limits.MinPSK, limits.MaxPSK)
	}
	old, err := readSecret(path)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err != nil && !fresh {
		return err
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
	return replace(path, text, fresh)
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

// replace writes a file in one step. It keeps its owner.
func replace(path string, text []byte, fresh bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if !fresh {
		err = sameOwner(path, f)
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
	if fresh {
		return os.Link(f.Name(), path) // not over what somebody else has made meanwhile
	}
	return os.Rename(f.Name(), path)
}

func sameOwner(path string, f *os.File) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) == os.Geteuid() && int(st.Gid) == os.Getegid() {
		return nil
	}
	return f.Chown(int(st.Uid), int(st.Gid))
}

// Package psk lets crypto/tls accept external pre-shared keys over TLS 1.3, as
// libnbd and QEMU offer them (RFC 8446, section 2.2; RFC 9257).
//
// crypto/tls has such keys for resumption only, and derives the key that
// proves them with a label of its own ("res binder", RFC 8446, section 7.1).
// A build in which that label is "ext binder" accepts external keys as
// sessions to resume. Supported says whether this is such a build.
package psk

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport/stamp"
)

// Keys are the identities of a key file and their keys. Safe for concurrent
// use.
type Keys struct {
	path  string
	decoy []byte // secret of this process

	mu   sync.RWMutex
	list []identity  // guarded by mu; what it holds never changes
	from stamp.Stamp // of the file that list is from; guarded by mu

	file *os.File // see Keep; nil: there is none
}

// identity has one key, or two while one is replaced.
type identity struct {
	name string
	hash [sha256.Size]byte // of the name
	keys [][]byte
}

// Load reads a key file as psktool and `vmdiskctl psk new` write it: lines of
// an identity, a colon and the key in hexadecimal digits. An identity may
// stand there twice, with its old and its new key. A file that others may
// read or write, a symbolic link and a key below limits.MinPSK are refused.
func Load(path string) (*Keys, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return LoadFrom(f, path)
}

// LoadFrom is Load for a file that Open has opened, perhaps with rights that
// are gone. It reads from the beginning and leaves f open. Reload goes by path.
func LoadFrom(f *os.File, path string) (*Keys, error) {
	k := &Keys{path: path, decoy: make([]byte, sha256.Size)}
	if _, err := rand.Read(k.decoy); err != nil {
		return nil, err
	}
	var err error
	if k.list, k.from, err = read(f, path); err != nil {
		return nil, err
	}
	return k, nil
}

// Keep has Check and Reload look at f, from which k was loaded, while the folder of the
// file is closed to the process. It stays open. Keep comes before they are called.
func (k *Keys) Keep(f *os.File) { k.file = f }

// Unseen is why the file cannot be looked at by its path, nil if it can. Then what
// becomes of the file itself is noticed all the same, but not that a folder above it is
// another one.
func (k *Keys) Unseen() error {
	if _, err := os.Lstat(k.path); errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

// Reload reads the file again, and tells whether it has other keys. On an error they
// stay what they are. That a file which has not changed cannot be opened is none: the
// process may have lost the right to. Connections that are open stay as well.
func (k *Keys) Reload() (changed bool, err error) {
	changed, take, err := k.Check()
	if err == nil {
		take()
	}
	return changed, err
}

// Check tells what Reload would, and changes nothing before take is called, if there is
// no error: that takes the keys that were read here.
func (k *Keys) Check() (changed bool, take func(), err error) {
	list, from, err := k.readAgain()
	k.mu.RLock()
	defer k.mu.RUnlock()
	switch {
	case err != nil && from == k.from:
		return false, func() {}, nil
	case err != nil:
		return false, nil, err
	}
	return !slices.EqualFunc(k.list, list, identity.is), func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.list, k.from = list, from
	}, nil
}

// readAgain is read for a file that may not be readable.
func (k *Keys) readAgain() ([]identity, stamp.Stamp, error) {
	f, err := Open(k.path)
	switch {
	case err == nil:
		defer f.Close()
		return read(f, k.path)
	case k.file != nil && k.Unseen() != nil:
		return nil, stamp.OfOpen(k.file), err
	}
	return nil, stamp.Of(os.Lstat(k.path)), err
}

// read returns what is in a key file, and which one it is.
func read(f *os.File, path string) ([]identity, stamp.Stamp, error) {
	from := stamp.Of(f.Stat())
	data, err := readAll(f, path)
	if err != nil {
		return nil, from, err
	}
	list, err := parse(data)
	clear(data)
	if err != nil {
		err = fmt.Errorf("key file %q: %w", path, err)
	}
	return list, from, err
}

// is tells whether j is the same identity with the same keys.
func (i identity) is(j identity) bool {
	return i.name == j.name && slices.EqualFunc(i.keys, j.keys, bytes.Equal)
}

// Short names the identities with a key below limits.StrongPSK.
func (k *Keys) Short() (names []string) {
	for _, id := range k.all() {
		for _, key := range id.keys {
			if len(key) < limits.StrongPSK {
				names = append(names, id.name)
				break
			}
		}
	}
	return names
}

// Len is the number of identities.
func (k *Keys) Len() int { return len(k.all()) }

func (k *Keys) all() []identity {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.list
}

// Open opens a key file. One that others may read or write is refused, and so
// is what is no regular file.
func Open(path string) (*os.File, error) {
	// Without O_NONBLOCK a pipe would be waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("key file %q is a symbolic link", path)
	}
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	if err := checkFile(f, path); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func checkFile(f *os.File, path string) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("key file %q is no regular file", path)
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("key file %q has mode %#o: others may read or write it, chmod 600 helps", path, fi.Mode().Perm())
	case fi.Size() > limits.PSKFile:
		return fmt.Errorf("key file %q has %d bytes, which is more than %d", path, fi.Size(), limits.PSKFile)
	}
	return nil
}

// readSecret returns the content of a key file.
func readSecret(path string) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, path)
}

func readAll(f *os.File, path string) ([]byte, error) {
	data, err := io.ReadAll(io.NewSectionReader(f, 0, limits.PSKFile+1))
	if err == nil && len(data) > limits.PSKFile {
		err = fmt.Errorf("key file %q has more than %d bytes", path, limits.PSKFile)
	}
	return data, err
}

// parse reads the lines. Errors name lines, never what a key is.
func parse(data []byte) ([]identity, error) {
	var list []identity
	at := map[string]int{}
	owner := map[string]string{} // of a key
	n := 0
	for line := range bytes.Lines(data) {
		n++
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			continue
		}
		name, key, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if other, ok := owner[string(key)]; ok {
			return nil, fmt.Errorf("line %d: %q has a key that %q has already", n, name, other)
		}
		owner[string(key)] = name
		i, known := at[name]
		if !known {
			if len(list) == limits.PSKIdentities {
				return nil, fmt.Errorf("line %d: there are more than %d identities", n, limits.PSKIdentities)
			}
			i = len(list)
			at[name] = i
			list = append(list, identity{name: name, hash: sha256.Sum256([]byte(name))})
		}
		if list[i].keys = append(list[i].keys, key); len(list[i].keys) > limits.PSKKeys {
			return nil, fmt.Errorf("line %d: %q has more than %d keys", n, name, limits.PSKKeys)
		}
	}
	if len(list) == 0 {
		return nil, errors.New("there is no key in it")
	}
	return list, nil
}

func parseLine(line []byte) (name string, key []byte, err error) {
	user, digits, ok := bytes.Cut(line, []byte{':'})
	if !ok {
		return "", nil, errors.New("want IDENTITY:KEY")
	}
	if err := CheckIdentity(string(user)); err != nil {
		return "", nil, err
	}
	key = make([]byte, hex.DecodedLen(len(digits)))
	if _, err := hex.Decode(key, digits); err != nil {
		return "", nil, errors.New("the key is not made of pairs of hexadecimal digits")
	}
	if len(key) < limits.MinPSK || len(key) > limits.MaxPSK {
		return "", nil, fmt.Errorf("the key has %d bytes, allowed are %d to %d", len(key), limits.MinPSK, limits.MaxPSK)
	}
	return string(user), key, nil
}

// CheckIdentity refuses what cannot be the identity of a key: nothing, more
// than limits.PSKIdentity bytes, colons, what cannot be printed, and a number
// sign in front, by which GnuTLS means digits.
func CheckIdentity(name string) error {
	switch {
	case name == "":
		return errors.New("the identity is empty")
	case len(name) > limits.PSKIdentity:
		return fmt.Errorf("the identity has %d bytes, allowed are %d", len(name), limits.PSKIdentity)
	case !utf8.ValidString(name):
		return errors.New("the identity is not UTF-8")
	case name[0] == '#':
		return fmt.Errorf("identity %q begins with #", name)
	}
	for _, r := range name {
		if r == ':' || !unicode.IsPrint(r) {
			return fmt.Errorf("identity %q has the character %q", name, r)
		}
	}
	return nil
}

// find returns limits.PSKKeys keys for any identity, in the same time: its
// own, and made up ones for those that it does not have. name is "" if there
// is no such identity.
func (k *Keys) find(label []byte) (name string, keys [limits.PSKKeys][]byte) {
	hash := sha256.Sum256(label)
	list := k.all()
	found := -1
	for i := range list {
		same := subtle.ConstantTimeCompare(list[i].hash[:], hash[:])
		found = subtle.ConstantTimeSelect(same, i, found)
	}
	for i := range keys {
		keys[i] = k.madeUp(hash, byte(i))
	}
	if found >= 0 {
		name = list[found].name
		copy(keys[:], list[found].keys)
	}
	return name, keys
}

// madeUp is a key that nobody has.
func (k *Keys) madeUp(hash [sha256.Size]byte, i byte) []byte {
	key := sha256.Sum256(append(append(hash[:len(hash):len(hash)], i), k.decoy...))
	return key[:]
}

package copier

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// Claim says how a file is opened that is to be filled, or made for that.
type Claim struct {
	Mode      fs.FileMode // of a file that is made
	New       bool        // refuse one that is there
	Container bool        // as in raw.Options
	Lock      raw.LockMode

	// Refuse, if not nil, is asked about a file that is there, before it is
	// locked: a lock of this process looks like any other.
	Refuse func(*File) error
}

// claimTries bounds how often Open begins anew because the file was taken away
// or filled by somebody else in the moment before it was locked.
const claimTries = 10

// errNotOurs: what was opened is not what is claimed.
var errNotOurs = errors.New("another program makes or removes the file")

// Open opens the file at path for writing, or makes an empty one if there is
// none, and locks it. From then on, it is the one at path, and nobody who
// locks what he fills fills it, or removes it. It counts as created only if
// nobody else has put anything into it between that and the lock.
func (c Claim) Open(path string) (d *File, err error) {
	for range claimTries {
		if d, err = c.try(path); !errors.Is(err, errNotOurs) {
			return d, err
		}
	}
	return nil, err
}

// CreateFile opens the file at path, or makes a sparse one of size bytes.
func (c Claim) CreateFile(path string, size int64) (*File, error) {
	d, err := c.Open(path)
	if err != nil || !d.created {
		return d, err
	}
	if err := d.f.Truncate(size); err != nil {
		return nil, errors.Join(err, d.Discard())
	}
	d.size = size
	return d, nil
}

func (c Claim) try(path string) (*File, error) {
	d, err := c.open(path)
	if err != nil {
		return nil, err
	}
	err = d.lock(raw.Options{Path: path, Container: c.Container, Lock: c.Lock})
	switch {
	case errors.Is(err, backing.ErrLocked):
		d.created = false // it is theirs who were faster
	case err == nil && (!d.isAt(os.Stat(path)) || d.created && d.size > 0):
		d.created, err = false, fmt.Errorf("%q: %w", path, errNotOurs)
	}
	if err != nil {
		return nil, errors.Join(err, d.Discard())
	}
	return d, nil
}

// open makes the file, or opens the one that is there.
func (c Claim) open(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOCTTY, c.Mode)
	switch {
	case err == nil:
		return &File{f: f, created: true}, nil
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	case c.New:
		return nil, fmt.Errorf("%w: %q exists", ErrRefused, path)
	}
	d, err := openFile(path, os.O_RDWR)
	switch {
	case errors.Is(err, fs.ErrNotExist): // a link to nowhere, or gone
		return nil, fmt.Errorf("%w: %w", errNotOurs, err)
	case err != nil:
		return nil, err
	case c.Refuse != nil:
		err = c.Refuse(d)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// isAt reports whether i, what is at a path, is the open file.
func (d *File) isAt(i fs.FileInfo, err error) bool {
	if err != nil {
		return false
	}
	own, err := d.f.Stat()
	return err == nil && os.SameFile(own, i)
}

// Discard closes the file and removes it before if a Claim has made it, unless
// another one is at its path by now. Whoever waits for the lock finds it gone.
func (d *File) Discard() error {
	var err error
	if path := d.f.Name(); d.created && d.isAt(os.Lstat(path)) {
		err = os.Remove(path)
	}
	return errors.Join(err, d.Close())
}

package raw

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// LockMode says whether an image is locked against other users.
type LockMode string

const (
	LockAuto LockMode = "auto" // where the file system can; also the zero value
	LockOn   LockMode = "on"   // or do not open
	LockOff  LockMode = "off"
)

// QEMU's protocol (docs/system/images.rst, "Disk image file locking"): a
// shared lock on byte usesBase+p for each permission p that is used, and on
// byte deniesBase+p for each that others may not use. Whoever finds the
// opposite byte locked by somebody else stays away.
const (
	usesBase   = 100
	deniesBase = 200
	pastLocks  = 300
)

// Permissions of QEMU's block layer, by number.
const (
	permRead   = 0 // consistent read
	permWrite  = 1
	permResize = 3
)

// does is, by the byte that somebody else has locked, what that program does.
var does = map[int64]string{
	usesBase + permWrite:    "has it open for writing",
	usesBase + permResize:   "may change its size",
	deniesBase + permRead:   "keeps others from reading it",
	deniesBase + permWrite:  "keeps others from writing to it",
	deniesBase + permResize: "keeps others from changing its size",
}

// lockBytes are the bytes to hold, and those that nobody else may hold: what is
// done to the image first, since the first that is found is named.
type lockBytes struct{ hold, absent []int64 }

var (
	readOnlyLocks = lockBytes{
		hold:   []int64{usesBase + permRead, deniesBase + permWrite},
		absent: []int64{usesBase + permWrite, deniesBase + permRead},
	}
	writerLocks = lockBytes{
		hold: []int64{usesBase + permRead, usesBase + permWrite,
			deniesBase + permWrite, deniesBase + permResize},
		absent: []int64{usesBase + permWrite, usesBase + permResize,
			deniesBase + permRead, deniesBase + permWrite},
	}

	// The same of containers.
	containerReadOnlyLocks = lockBytes{
		hold:   []int64{usesBase + permRead, deniesBase + permWrite, deniesBase + permResize},
		absent: []int64{usesBase + permWrite, usesBase + permResize, deniesBase + permRead},
	}
	containerWriterLocks = lockBytes{
		hold: []int64{usesBase + permRead, usesBase + permWrite, usesBase + permResize,
			deniesBase + permWrite, deniesBase + permResize},
		absent: []int64{usesBase + permWrite, usesBase + permResize,
			deniesBase + permRead, deniesBase + permWrite, deniesBase + permResize},
	}
)

// locksOf are the bytes for the way in which the file is opened.
func locksOf(o Options) lockBytes {
	switch {
	case o.Container && o.ReadOnly:
		return containerReadOnlyLocks
	case o.Container:
		return containerWriterLocks
	case o.ReadOnly:
		return readOnlyLocks
	}
	return writerLocks
}

// lockBackoff is the wait before an attempt after the first: somebody may
// only be testing.
const lockBackoff = 10 * time.Millisecond

// Lock locks f, a regular file or a block device, as Open does with these
// options, for one who reads or writes it by itself. unlock is called once,
// before f is closed. Errors are those of Open and Unclaimed; f stays the caller's.
func Lock(f *os.File, o Options) (unlock func(), err error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	g, err := survey(f, o)
	if err == nil {
		err = Unclaimed(f, o)
	}
	if err == nil {
		_, unlock, err = lockImage(f, g, o)
	}
	return unlock, backing.WrapIn("lock", o.Path, -1, 0, err)
}

// Unclaimed refuses f if it is a block device that is to be written to, by the
// options, and is mounted, or in use by the kernel for swap, LVM or md: no byte
// lock tells of that. It is for whoever opens an image, before Open, which may have
// no right to ask, and for whoever lets clients write to it again. The device is
// opened once more, with O_EXCL (open(2)), and closed at once. To keep it so would be
// in the way of who opens it again while it is served, as a reload does. Who serves it
// is disturbed even so: while another process has it locked, it is waited for, as by
// Open, and refused in the end, unasked. What cannot be opened again is not refused.
// Error: ErrLocked.
func Unclaimed(f *os.File, o Options) error {
	if o.ReadOnly || o.Lock == LockOff {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return err
	}
	return patiently(func() error {
		if err := locksOf(o).alone(f, o); errors.Is(err, backing.ErrLocked) && !inUse.has(IDIn(&st)) {
			return err
		}
		again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDONLY|unix.O_EXCL, 0)
		switch {
		case errors.Is(err, unix.EBUSY):
			return lockedError(o, errClaimed)
		case err == nil:
			_ = again.Close() // it was only opened
		}
		return nil
	})
}

var errClaimed = errors.New("it is mounted or in use by the kernel, or another program keeps it for itself")

// lockImage locks f. locked says whether others are kept from writing; unlock
// is never nil.
func lockImage(f *os.File, g geometry, o Options) (locked bool, unlock func(), err error) {
	nothing := func() {}
	switch o.Lock {
	case LockOff:
		return false, nothing, nil
	case LockOn, LockAuto, "":
	default:
		return false, nothing, fmt.Errorf("%w: lock mode %q", backing.ErrInvalid, o.Lock)
	}
	u := use{o.For, o.ReadOnly}
	if other, ok := inUse.add(g.id, u); !ok {
		return false, nothing, lockedError(o, other.holds())
	}
	if err := locksOf(o).take(f, o); err != nil {
		if !errors.Is(err, errNoLocks) || o.Lock == LockOn {
			inUse.remove(g.id, u)
			return false, nothing, err
		}
		logOf(o).Warn("image cannot be locked against other programs", "path", o.Path, "error", err)
		return false, func() { inUse.remove(g.id, u) }, nil
	}
	return true, func() {
		_ = setLock(f, unix.F_UNLCK, usesBase, pastLocks-usesBase) // closing unlocks too
		inUse.remove(g.id, u)
	}, nil
}

func logOf(o Options) *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return o.Log
}

func lockedError(o Options, why error) error {
	return &backing.Error{Op: "lock", Path: o.Path, Off: -1, Kind: backing.ErrLocked, Err: why}
}

// errNoLocks: the file system does not know the locks.
var errNoLocks = errors.New("file system has no byte locks")

// patiently calls try until it finds the image in use by nobody else, a few times.
func patiently(try func() error) (err error) {
	for n := range limits.LockRetries {
		if n > 0 {
			time.Sleep(time.Duration(n) * lockBackoff)
		}
		if err = try(); !errors.Is(err, backing.ErrLocked) {
			break
		}
	}
	return err
}

// take holds the bytes and looks for others, a few times.
func (b lockBytes) take(f *os.File, o Options) error {
	return patiently(func() error {
		err := b.tryTake(f, o)
		if err != nil {
			_ = setLock(f, unix.F_UNLCK, usesBase, pastLocks-usesBase) // err matters more
		}
		return err
	})
}

// tryTake takes first and looks then: of two that come together at least one
// sees the other.
func (b lockBytes) tryTake(f *os.File, o Options) error {
	for _, at := range b.hold {
		switch err := setLock(f, unix.F_RDLCK, at, 1); {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return lockedError(o, fmt.Errorf("another program locks it as a whole"))
		case err != nil:
			return noLocks(err)
		}
	}
	return b.alone(f, o)
}

// alone looks for others.
func (b lockBytes) alone(f *os.File, o Options) error {
	for _, at := range b.absent {
		l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
			return noLocks(err)
		}
		if l.Type != unix.F_UNLCK {
			return lockedError(o, holder(at, l.Pid))
		}
	}
	return nil
}

// holder describes who has the byte. Locks of open files, QEMU's among them,
// have no process.
func holder(at int64, pid int32) error {
	who := "another program (a running guest?)"
	if pid > 0 {
		who = fmt.Sprintf("process %d", pid)
	}
	return fmt.Errorf("%s %s", who, does[at])
}

// noLocks tells a file system without locks from other errors.
func noLocks(err error) error {
	for _, e := range []error{unix.ENOLCK, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", errNoLocks, err)
		}
	}
	return err
}

func setLock(f *os.File, typ int16, at, n int64) error {
	l := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: at, Len: n}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
}

// use is one opening of an image by this process.
type use struct {
	by       string // Options.For
	readOnly bool
}

// holds is what is said to who finds u in the way.
func (u use) holds() error {
	by := u.by
	if by == "" {
		by = "this process"
	}
	if u.readOnly {
		return fmt.Errorf("%s has it open for reading", by)
	}
	return fmt.Errorf("%s has it open for writing", by)
}

// useTable is what this process serves. It sees what locks do not: two nodes of
// one block device.
type useTable struct {
	mu   sync.Mutex
	uses map[ID][]use // guarded by mu; one writer, or readers
}

var inUse = useTable{uses: map[ID][]use{}}

// add enters a use, unless it or another one of the image writes: that is other.
func (t *useTable) add(id ID, u use) (other use, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if all := t.uses[id]; len(all) > 0 && !(u.readOnly && all[0].readOnly) {
		return all[0], false
	}
	t.uses[id] = append(t.uses[id], u)
	return use{}, true
}

// has tells whether the image is in use.
func (t *useTable) has(id ID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.uses[id]) > 0
}

// remove takes away a use that add has entered.
func (t *useTable) remove(id ID, u use) {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := t.uses[id]
	i := slices.Index(all, u)
	if t.uses[id] = slices.Delete(all, i, i+1); len(t.uses[id]) == 0 {
		delete(t.uses, id)
	}
}

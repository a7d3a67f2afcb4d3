package open

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// Table holds the files of one image that were opened where there were the
// rights to do so, for an Open that has them no more. It knows each by what
// the gate asked for. It is for one Open at a time.
type Table struct {
	files  map[Request]*os.File
	dirs   map[string]string // folders, and where symbolic links lead
	memory *mem.Disk         // nil: there is none, or it was taken
	filled bool              // it is taken from, not kept in
	whole  bool              // what it lacks is not opened
}

// Request is what the gate wants to open. Path has no symbolic links in it
// where the gate follows none.
type Request struct {
	Path     string
	ReadOnly bool
	Direct   bool
}

// Gather opens all files that Open would, by the same rules and with the same
// errors, but takes no locks and builds nothing. On an error, nothing stays open.
func Gather(ctx context.Context, s Spec) (*Table, error) {
	c, ok := cacheModes[s.Cache]
	if !ok {
		return nil, invalid(s, fmt.Errorf("unknown cache mode %q", s.Cache))
	}
	if err := checkPolicy(s); err != nil {
		return nil, err
	}
	t := &Table{files: map[Request]*os.File{}, dirs: map[string]string{}}
	s.Table, s.gathers = t, true
	var err error
	switch s.Format {
	case "":
		err = s.readAhead(ctx, c)
	case formatRaw:
		var f *os.File
		if f, err = openFile(s, c); err == nil {
			err = f.Close()
		}
	case formatQcow2:
		ch := &chain{spec: s, cache: c, seen: make(map[raw.ID]string)}
		err = ch.open(ctx)
		ch.close()
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	t.filled = true
	return t, nil
}

// readAhead reads of a raw image what Open will, so that storage that hangs
// holds up its Gather, and not the Open of all. What Open makes of it is Open's to
// say.
func (s Spec) readAhead(ctx context.Context, c cacheMode) error {
	s.Log = slog.New(slog.DiscardHandler)
	dev, err := openRaw(ctx, s, c)
	if err != nil {
		return err
	}
	_ = format.Begins(ctx, dev, dev.Info().Size)
	return dev.Close()
}

// NewTable makes a table of what another has Contents of.
func NewTable(files map[Request]*os.File, dirs map[string]string) *Table {
	return &Table{files: files, dirs: dirs, filled: true}
}

// Again makes a table of the files of an image that is open, for who opens it once
// more, whatever is at their paths by now: dev is what Open has made of it, files are
// what Opened was called with, and dirs the folders of the table that the image was
// opened with. The descriptors are others of the same open files; what is not among
// them is not opened. A disk of format "mem" is the same one, if its size is wanted.
func Again(dev backing.Device, files map[Request]*os.File, dirs map[string]string) (*Table, error) {
	return again(files, dirs, memoryOf(dev))
}

// Again makes another table of the same open files, and of the same disk in memory,
// for one more Open. t may be nil, and so is the other then.
func (t *Table) Again() (*Table, error) {
	if t == nil {
		return nil, nil
	}
	m := t.memory
	if m != nil {
		m = m.Hold()
	}
	return again(t.files, t.dirs, m)
}

// InMemory tells whether t has a disk of format "mem".
func (t *Table) InMemory() bool { return t != nil && t.memory != nil }

// Files are those of the table, which stay its own.
func (t *Table) Files() []*os.File {
	if t == nil {
		return nil
	}
	return slices.Collect(maps.Values(t.files))
}

// again takes over m.
func again(files map[Request]*os.File, dirs map[string]string, m *mem.Disk) (*Table, error) {
	t := &Table{files: make(map[Request]*os.File, len(files)), dirs: dirs, memory: m, filled: true, whole: true}
	for r, f := range files {
		other, err := duplicate(f)
		if err != nil {
			t.Close()
			return nil, &fs.PathError{Op: "duplicate", Path: r.Path, Err: err}
		}
		t.files[r] = other
	}
	return t, nil
}

// memoryOf holds the disk in memory that Open has made, nil if it is none.
func memoryOf(dev backing.Device) *mem.Disk {
	if e, ok := dev.(*backing.Emulate); ok {
		if m, ok := e.Next.(*mem.Disk); ok {
			return m.Hold()
		}
	}
	return nil
}

// duplicate is another descriptor of f, which may be closed meanwhile by others.
func duplicate(f *os.File) (*os.File, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var other int
	inner := err
	if err := c.Control(func(fd uintptr) { other, inner = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return nil, err
	}
	if inner != nil {
		return nil, inner
	}
	return os.NewFile(uintptr(other), f.Name()), nil
}

// Asked is what f was opened for, which Opened was called with by an Open of s.
func (s *Spec) Asked(f *os.File, below bool) Request {
	return Request{Path: f.Name(), ReadOnly: below || s.ReadOnly, Direct: cacheModes[s.Cache].direct}
}

// Contents are the files, which stay the table's, and the folders; of no table none.
func (t *Table) Contents() (files map[Request]*os.File, dirs map[string]string) {
	if t == nil {
		return nil, nil
	}
	return t.files, t.dirs
}

// Others are the paths of the files that are none of known.
func (t *Table) Others(known []*os.File) (paths []string) {
	for r, f := range t.files {
		if id, err := raw.Identify(f); err != nil || among(known, id) == nil {
			paths = append(paths, r.Path)
		}
	}
	return paths
}

// Written are the files that are opened for writing.
func (t *Table) Written() (ids []raw.ID, err error) {
	for r, f := range t.files {
		if r.ReadOnly {
			continue
		}
		id, err := raw.Identify(f)
		if err != nil {
			return nil, &fs.PathError{Op: "identify", Path: r.Path, Err: err}
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// Same tells whether the files are those in known, and all of them.
func (t *Table) Same(known []*os.File) bool {
	return len(t.files) == len(known) && len(t.Others(known)) == 0
}

// among is one of files that is the file id, or nil.
func among(files []*os.File, id raw.ID) *os.File {
	for _, f := range files {
		if of, err := raw.Identify(f); err == nil && of == id {
			return f
		}
	}
	return nil
}

// known is what r wants if that is open already, for one who had not the right to
// open it: err is why r could not be opened. The descriptor is another one of the
// same open file.
func known(files []*os.File, r Request, err error) (*os.File, error) {
	var st unix.Stat_t
	if len(files) == 0 || !errors.Is(err, fs.ErrPermission) || unix.Stat(r.Path, &st) != nil {
		return nil, err
	}
	if f := among(files, raw.IDIn(&st)); f != nil {
		return adopt(f, Spec{Path: r.Path, ReadOnly: r.ReadOnly}, cacheMode{direct: r.Direct})
	}
	return nil, err
}

// Close closes what nobody took.
func (t *Table) Close() {
	if t == nil {
		return
	}
	for _, f := range t.files {
		_ = f.Close() // nothing was written by it
	}
	t.files = nil
	if t.memory != nil {
		_ = t.memory.Close() // it cannot fail
		t.memory = nil
	}
}

// full reports whether this is a table to take from.
func (t *Table) full() bool { return t != nil && t.filled }

// take returns the file that r wants, once; nil if it is to be opened.
func (t *Table) take(r Request) (*os.File, error) {
	if !t.full() {
		return nil, nil
	}
	f := t.files[r]
	delete(t.files, r)
	if f == nil && t.whole {
		return nil, &fs.PathError{Op: "open", Path: r.Path, Err: errForeign}
	}
	return f, nil
}

// takeMemory returns the disk in memory, once, if it has size bytes; nil if another
// is to be made.
func (t *Table) takeMemory(size int64) (m *mem.Disk) {
	if !t.full() || t.memory == nil || t.memory.Info().Size != size {
		return nil
	}
	m, t.memory = t.memory, nil
	return m
}

// errForeign is for a file that an image asks for which is opened again, and was not
// one of its files.
var errForeign = errors.New("it is none of the files of the image that was open")

// keep remembers what was opened for r. Both descriptors are of one open file.
func (t *Table) keep(r Request, f *os.File, err error) (*os.File, error) {
	if err != nil || t == nil || t.filled || t.files[r] != nil {
		return f, err
	}
	other, err := duplicate(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	t.files[r] = other
	return f, nil
}

// real is path without symbolic links, as it was when the table was filled.
func (t *Table) real(path string) (string, error) {
	if t.full() {
		if r, ok := t.dirs[path]; ok {
			return r, nil
		}
	}
	r, err := resolve(path)
	if err == nil && t != nil && !t.filled {
		t.dirs[path] = r
	}
	return r, err
}

// resolve is path from the root without symbolic links. The working directory is
// where the kernel has it: $PWD may name links.
func resolve(path string) (string, error) {
	r, err := filepath.EvalSymlinks(path)
	if err != nil || filepath.IsAbs(r) {
		return r, err
	}
	dir, err := unix.Getwd()
	return filepath.Join(dir, r), err
}

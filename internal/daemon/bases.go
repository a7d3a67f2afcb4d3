package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// bases are the files that remembered overlays stand on. They are read anew when
// the folder that remembers has changed.
type bases struct {
	mu     sync.Mutex
	as     time.Time                   // guarded by mu; when the folder had changed last, zero to read it
	byFile map[config.File]config.Base // guarded by mu; each by its path alone, and by its numbers alone
}

// settled is how old the last change of a folder must be for the next one to show
// in its time.
const settled = time.Second

// keysOf are f by its path alone, and by its numbers alone: either may be another's
// by now, or be no more.
func keysOf(f config.File) (keys []config.File) {
	if f.Path != "" {
		keys = append(keys, config.File{Path: filepath.Clean(f.Path)})
	}
	if f.Path = ""; f.Ino != 0 {
		keys = append(keys, f)
	}
	return keys
}

// find is the base in dir that one of files is, by its path or by its numbers.
func (b *bases) find(dir string, files ...config.File) (base config.Base, found bool, err error) {
	st, err := os.Stat(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return base, false, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.as.Equal(st.ModTime()) || b.as.IsZero() {
		if err := b.read(dir, st.ModTime()); err != nil {
			return base, false, err
		}
	}
	for _, f := range files {
		for _, key := range keysOf(f) {
			if base, found = b.byFile[key]; found {
				return base, true, nil
			}
		}
	}
	return base, false, nil
}

// read reads dir, which has changed last at a time. With b.mu.
func (b *bases) read(dir string, changed time.Time) error {
	list, err := config.ReadBases(dir)
	if err != nil {
		return err
	}
	b.byFile, b.as = map[config.File]config.Base{}, time.Time{}
	for _, x := range list {
		for _, key := range keysOf(x.File) {
			b.byFile[key] = x
		}
	}
	if time.Since(changed) > settled {
		b.as = changed
	}
	return nil
}

// fileOf tells which file f is. Path has no symbolic links, but that of a device is
// the name by which it was opened: of the node's, any device may be the next. So it
// is with the numbers, and those of file systems too may be others after a restart:
// what tells them apart is when the file, or the node, was made. Where the file
// system does not tell that a file has the numbers alone, and a device none.
func fileOf(f *os.File) config.File {
	var st unix.Statx_t
	x := config.File{Path: f.Name()}
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_BTIME, &st)
	device := err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
	if !device {
		x.Path = pathOf(f)
	}
	if !utf8.ValidString(x.Path) {
		x.Path = ""
	}
	if err == nil && st.Mask&unix.STATX_BTIME != 0 {
		x.Born = st.Btime.Sec*int64(time.Second) + int64(st.Btime.Nsec)
	}
	if err == nil && (x.Born != 0 || !device) {
		x.Dev, x.Ino = unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino
	}
	return x
}

// pathOf is where f is, without symbolic links, also if it came as a descriptor.
func pathOf(f *os.File) string {
	if path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil {
		return path
	}
	return f.Name()
}

// mayWrite is what refuses an export a file that it would write to, and that a
// remembered overlay stands on: its guest would find a broken disk. The export of the
// overlay may be closed, may have failed or have left the configuration, so that no
// lock tells. No file is looked at but the one that is open: another may hang. nil
// refuses none.
func (d *daemon) mayWrite(x *config.Export) func(f *os.File) error {
	c := d.conf.Load()
	if c == nil || c.Control.State == "" || x.ReadOnly || x.Snapshot != "" || x.Overlay != nil {
		return nil
	}
	return func(f *os.File) error {
		path := pathOf(f)
		b, found, err := d.bases.find(c.Control.State, fileOf(f), config.File{Path: path}, config.File{Path: x.Image})
		if err != nil || !found {
			return err
		}
		return &api.Error{Code: api.CodeForbidden, Text: fmt.Sprintf(
			"overlay %q of export %q stands on image %q: to write there would destroy what its guest has written. Serve the overlay, or have it forgotten (vmdiskctl export forget, or remove)",
			b.Overlay, b.Export, path)}
	}
}

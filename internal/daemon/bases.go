package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// bases are the images that remembered overlays stand on, by their paths. They are
// read anew when the folder that remembers has changed.
type bases struct {
	mu     sync.Mutex
	as     time.Time              // guarded by mu; when the folder had changed last, zero to read it
	byPath map[string]config.Base // guarded by mu
}

// settled is how old the last change of a folder must be for the next one to show
// in its time.
const settled = time.Second

// find is the base of that path in dir.
func (b *bases) find(dir, path string) (base config.Base, found bool, err error) {
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
		list, err := config.ReadBases(dir)
		if err != nil {
			return base, false, err
		}
		b.byPath, b.as = map[string]config.Base{}, time.Time{}
		for _, x := range list {
			b.byPath[filepath.Clean(x.Path)] = x
		}
		if time.Since(st.ModTime()) > settled {
			b.as = st.ModTime()
		}
	}
	base, found = b.byPath[filepath.Clean(path)]
	return base, found, nil
}

// mayWriteTo refuses an export that would write to an image which a remembered
// overlay stands on: its guest would find a broken disk. The export of the overlay
// may be closed, may have failed or have left the configuration, so that no lock
// tells. Images are compared by their paths: to look at one that hangs would hold
// up others.
func (d *daemon) mayWriteTo(x *config.Export, files []*os.File) error {
	c := d.conf.Load()
	if c == nil || c.Control.State == "" || x.ReadOnly || x.Snapshot != "" || x.Overlay != nil {
		return nil
	}
	b, found, err := d.bases.find(c.Control.State, imagePath(x, files))
	if err != nil || !found {
		return err
	}
	return &api.Error{Code: api.CodeForbidden, Text: fmt.Sprintf(
		"overlay %q of export %q stands on image %q: to write there would destroy what its guest has written. Serve the overlay, or have it forgotten (vmdiskctl export forget, or remove)",
		b.Overlay, b.Export, b.Path)}
}

// imagePath is where the image of an export is, also if it came as a descriptor.
func imagePath(x *config.Export, files []*os.File) string {
	if f := given(files)[x.Image]; f != nil {
		if path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil {
			return path
		}
	}
	return x.Image
}

package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
)

// watchRoots remembers the image roots as Landlock knows them. It knows folders,
// not paths: what comes to one of these paths later is closed to the worker.
func (d *daemon) watchRoots() {
	d.rootsThen = map[string]fs.FileInfo{}
	for _, root := range d.roots() {
		fi, err := os.Stat(root)
		d.rootsThen[root] = fi // nil with an error
		if err != nil {
			d.log.Warn("an image root is not there: if it comes, start the daemon again", "root", root, "error", err)
		}
	}
}

// explain says so where an image was refused because its root is another folder
// than at the start.
func (d *daemon) explain(image string, err error) error {
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	for root, then := range d.rootsThen {
		if !open.Within(root, image) {
			continue
		}
		if now, bad := os.Stat(root); bad == nil && (then == nil || !os.SameFile(then, now)) {
			return fmt.Errorf("%w: the image root %q was mounted or made after the daemon had started: start it again", err, root)
		}
	}
	return err
}

package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Instead is what an export of the configuration file serves since a snapshot:
// an overlay in place of the image that the file names, which must not be
// written to any more. Of both only the name and what says how an image is
// opened is set.
type Instead struct {
	Of    Export `json:"of"`
	Serve Export `json:"serve"`
	Below []File `json:"below,omitempty"` // what the overlay stands on
}

// overlayPrefix begins the names of the files of overlays: no export's file
// has a dot there, and no unfinished one a "=".
const overlayPrefix = ".overlay="

// ImageOf is the part of e that Instead holds.
func ImageOf(e Export) Export {
	return Export{Name: e.Name, Image: e.Image, Format: e.Format, Snapshot: e.Snapshot, Discard: e.Discard,
		Backing: e.Backing, BackingFiles: e.BackingFiles, DataFiles: e.DataFiles}
}

// Apply is e with the overlay in place of its image. An export whose image the
// file has changed since to neither is an error: one of the two would lose what
// a guest has written.
func (i *Instead) Apply(e Export) (Export, error) {
	switch {
	case i.IsIn(e):
		return e, nil
	case e.Image != i.Of.Image || e.ImageFormat() != i.Of.ImageFormat() || e.Snapshot != i.Of.Snapshot:
		return e, fmt.Errorf("the guest has written to overlay %q since a snapshot of %q, and the configuration names neither of them as it was", i.Serve.Image, i.Of.Image)
	}
	e.Image, e.Format, e.Snapshot, e.Discard = i.Serve.Image, i.Serve.Format, i.Serve.Snapshot, i.Serve.Discard
	e.Backing, e.BackingFiles, e.DataFiles = i.Serve.Backing, i.Serve.BackingFiles, i.Serve.DataFiles
	e.Snapshots = 1 + slices.Index(e.BackingFiles, i.Of.Image+":"+i.Of.ImageFormat()) // what is below was named
	return e, nil
}

// IsIn tells whether the file by now names the overlay itself: nothing is lost if
// i is forgotten.
func (i *Instead) IsIn(e Export) bool {
	return e.Image == i.Serve.Image && e.Format == i.Serve.Format
}

// WriteInstead keeps i in the folder dir, as WriteExport keeps exports.
func WriteInstead(dir string, i Instead) error {
	b, err := json.Marshal(i)
	var again Instead
	if err == nil {
		err = decodeJSON(b, &again, limits.StateFile)
	}
	if err == nil && (!equal(i, again) || i.Of.Name == "" || i.Of.Name != i.Serve.Name) {
		err = errors.New("it has text that is not UTF-8, or no name")
	}
	if err == nil {
		err = replaceFile(dir, overlayPrefix+stateFile(i.Of.Name), append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("keep the overlay of export %q: %w", cut(i.Of.Name), err)
	}
	return nil
}

// ErrUnsynced is that a file was written, and may be the one before it again
// after a crash.
var ErrUnsynced = errors.New("it may not be on stable storage")

// replaceFile puts a file in place of the one of its name, if there is one,
// atomically and durably. But for ErrUnsynced an error changes nothing.
func replaceFile(dir, name string, b []byte) error {
	d, err := openState(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	temp := filepath.Join(dir, "."+name+".new")
	if err := writeFile(temp, b); err != nil {
		return errors.Join(err, removeFile(temp))
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		return errors.Join(err, removeFile(temp))
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsynced, err)
	}
	return nil
}

// ReadInstead is what WriteInstead has kept of the export called name, or nil.
func ReadInstead(dir, name string) (*Instead, error) {
	d, err := openState(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	path := filepath.Join(dir, overlayPrefix+stateFile(name))
	i, err := readInstead(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case i.Of.Name != name:
		return nil, fmt.Errorf("%q: it is not about export %q", path, cut(name))
	}
	return i, nil
}

// readInstead reads one file.
func readInstead(path string) (*Instead, error) {
	b, err := readFile(path, limits.StateFile+1, syscall.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	i := &Instead{}
	if err := decodeJSON(b, i, limits.StateFile+1); err != nil {
		return nil, fmt.Errorf("%q: %w", path, err)
	}
	if i.Of.Name != i.Serve.Name || i.Serve.Image == "" {
		return nil, fmt.Errorf("%q: it is not about an export", path)
	}
	return i, nil
}

// File is a file that images were opened with. Path is empty if it is not UTF-8.
// The numbers are 0 where they would not tell the file from another after a
// restart.
type File struct {
	Path string `json:"path,omitempty"`
	Dev  uint64 `json:"dev,omitempty"`
	Ino  uint64 `json:"ino,omitempty"`
	Born int64  `json:"born,omitempty"` // nanoseconds since 1970; 0 where the file system does not tell
}

// Base is a file that an overlay stands on which is kept in a folder: whoever
// writes to it destroys what the guest sees of Export.
type Base struct {
	File
	Export  string
	Overlay string
}

// ReadBases are the files that the overlays in dir stand on, of exports of the
// configuration as of those that are kept, as far as both can be read. Of what was
// kept without Below it has the names that the export gives.
func ReadBases(dir string) (list []Base, err error) {
	names, err := stateNames(dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		var over kept
		switch {
		case strings.HasPrefix(name, overlayPrefix):
			i, err := readInstead(filepath.Join(dir, name))
			if err != nil {
				continue
			}
			over = kept{Export: i.Serve, Below: i.Below}
			list = append(list, Base{File{Path: i.Of.Image}, over.Name, over.Image})
		case strings.HasPrefix(name, "."):
			continue
		default:
			if over, err = readExport(dir, name); err != nil {
				continue
			}
		}
		for _, name := range over.BackingFiles {
			list = append(list, Base{File{Path: withoutFormat(name)}, over.Name, over.Image})
		}
		for _, f := range over.Below {
			list = append(list, Base{f, over.Name, over.Image})
		}
	}
	return list, nil
}

// RemoveInstead forgets the overlay of the export called name. That none is
// kept is no error.
func RemoveInstead(dir, name string) error {
	d, err := openState(dir)
	if err == nil {
		defer d.Close()
		err = removeFile(filepath.Join(dir, overlayPrefix+stateFile(name)))
	}
	if err != nil {
		return fmt.Errorf("forget the overlay of export %q: %w", cut(name), err)
	}
	return d.Sync()
}

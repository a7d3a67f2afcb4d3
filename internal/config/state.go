package config

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// stateSuffix ends the name of each kept export's file.
const stateSuffix = ".json"

// stateFile is the name of the file that keeps the export called name. Two
// names never have one file: letters, digits, "-" and "_" stand for themselves,
// other bytes are "%XX", and what is too long for a file system is "~" and a
// hash, which no shorter name has.
func stateFile(name string) string {
	var b strings.Builder
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == '-' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	const most = 200 // of 255 that file systems allow
	if b.Len() > most {
		sum := sha256.Sum256([]byte(name))
		return "~" + hex.EncodeToString(sum[:]) + stateSuffix
	}
	return b.String() + stateSuffix
}

// openState opens the folder of kept exports. Whoever can write there decides
// what is served to whom: so it must belong to root or to this user, and nobody
// else may write to it.
func openState(dir string) (*os.File, error) {
	d, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	i, err := d.Stat()
	if err == nil {
		owner := i.Sys().(*syscall.Stat_t).Uid
		switch {
		case owner != 0 && owner != uint32(os.Geteuid()):
			err = fmt.Errorf("%q belongs to user %d", dir, owner)
		case i.Mode().Perm()&0o022 != 0:
			err = fmt.Errorf("%q can be written to by others than its owner", dir)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// kept is what the file of an export has.
type kept struct {
	Export
	Below []File `json:"below,omitempty"`

	// Snapshots is that of the export; 0 in a file of a version that had none.
	Snapshots int `json:"snapshots,omitempty"`

	// Order is above that of all that were made before; 0, which comes first, in a
	// file of a version that had none.
	Order int `json:"order,omitempty"`
}

// WriteExport keeps e in the folder dir, which exists, and which nobody but root
// and this user can write to; below are the files that its image stands on. It comes
// before those of a greater order; what is kept under its name already stays where it
// is. When it returns without an error, e is on stable storage; with one, what was kept
// under its name before still is, unless the error is ErrUnsynced. Calls for one folder
// exclude each other.
func WriteExport(dir string, e Export, below []File, order int) error {
	if old, err := readExport(dir, stateFile(e.Name)); err == nil {
		order = old.Order
	}
	b, err := encodeState(kept{e, below, e.Snapshots, order})
	if err != nil {
		return fmt.Errorf("keep export %q: %w", cut(e.Name), err)
	}
	if err := replaceFile(dir, stateFile(e.Name), b); err != nil {
		return fmt.Errorf("keep export %q: %w", cut(e.Name), err)
	}
	return nil
}

// encodeState writes e so that it is read as the same again, or not at all.
func encodeState(e kept) ([]byte, error) {
	if e.Descriptors() > 0 {
		return nil, errors.New("its image came as a descriptor, which has no name to open it by again")
	}
	if e.Name == "" {
		return nil, errors.New("it has no name")
	}
	b, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	again, err := decodeKept(b, limits.StateFile)
	if err != nil {
		return nil, err
	}
	if !equal(e, again) {
		return nil, errors.New("it has text that is not UTF-8")
	}
	return append(b, '\n'), nil
}

// decodeKept reads what encodeState wrote, of at most so many bytes.
func decodeKept(b []byte, most int) (e kept, err error) {
	err = decodeJSON(b, &e, most)
	e.Export.Snapshots = e.Snapshots
	return e, err
}

// writeFile makes a file that is on stable storage, but for its name.
func writeFile(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// removeFile removes a file that may be absent.
func removeFile(name string) error {
	if err := os.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// HasExport tells whether dir has a file for the export called name, whatever
// is in it.
func HasExport(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, stateFile(name)))
	return err == nil
}

// RemoveExport forgets the export called name. That none is kept is no error.
func RemoveExport(dir, name string) error {
	d, err := openState(dir)
	if err == nil {
		defer d.Close()
		err = removeFile(filepath.Join(dir, stateFile(name)))
	}
	if err != nil {
		return fmt.Errorf("forget export %q: %w", cut(name), err)
	}
	return d.Sync()
}

// MayRemoveExport is why RemoveExport would fail, as far as a file that is made in
// dir and removed tells: nil where there was no room for one, as none is needed.
func MayRemoveExport(dir, name string) error {
	d, err := openState(dir)
	if err == nil {
		defer d.Close()
		trial := filepath.Join(dir, "."+stateFile(name)+".try")
		if err = writeFile(trial, nil); errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			err = nil
		}
		err = cmp.Or(err, removeFile(trial))
	}
	if err != nil {
		return fmt.Errorf("forget export %q: %w", cut(name), err)
	}
	return nil
}

// FileErrors are errors about single files of a folder of kept exports.
type FileErrors []error

func (e FileErrors) Error() string { return errors.Join(e...).Error() }

// Unwrap makes errors.Is and errors.As find each of them.
func (e FileErrors) Unwrap() []error { return e }

// ReadExports returns what WriteExport kept in dir, at most limits.ConfigExports, in
// their order, and where that is the same by the files' names. last is the greatest
// order. Files that cannot be read do not hide the others: the error, beside the
// exports, is of type FileErrors and names them all.
func ReadExports(dir string) (list []Export, last int, err error) {
	names, err := stateNames(dir)
	if err != nil {
		return nil, 0, err
	}
	var all []kept
	var problems FileErrors
	if len(names) > 4*limits.ConfigExports {
		problems = append(problems, fmt.Errorf("%q has more than %d files: some are not looked at", dir, 4*limits.ConfigExports))
	}
	for _, name := range names {
		if strings.HasPrefix(name, ".") { // of an interrupted write, or of an overlay
			continue
		}
		e, err := readExport(dir, name)
		if err == nil && len(all) == limits.ConfigExports {
			problems = append(problems, fmt.Errorf("%q has more than %d exports: from %q on none is looked at", dir, limits.ConfigExports, name))
			break
		}
		if err != nil {
			problems = append(problems, err)
			continue
		}
		all = append(all, e)
	}
	slices.SortStableFunc(all, func(a, b kept) int { return cmp.Compare(a.Order, b.Order) })
	for _, e := range all {
		list, last = append(list, e.Export), max(last, e.Order)
	}
	if problems != nil {
		return list, last, problems
	}
	return list, last, nil
}

// stateNames are the files of dir in their order, and one more than there can be
// at most: an interrupted write leaves a second file, and an export of the
// configuration may have an overlay's.
func stateNames(dir string) ([]string, error) {
	d, err := openState(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(4*limits.ConfigExports + 1)
	if err != nil && err != io.EOF {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// ReadBelow are the files below the image of the export called name, as WriteExport
// has kept them.
func ReadBelow(dir, name string) ([]File, error) {
	e, err := readExport(dir, stateFile(name))
	return e.Below, err
}

// readExport reads one file of dir, which must be that of its export.
func readExport(dir, name string) (kept, error) {
	path := filepath.Join(dir, name)
	b, err := readFile(path, limits.StateFile+1, syscall.O_NOFOLLOW)
	if err != nil {
		return kept{}, err
	}
	e, err := decodeKept(b, limits.StateFile+1)
	if err != nil {
		return kept{}, fmt.Errorf("%q: %w", path, err)
	}
	if stateFile(e.Name) != name {
		return kept{}, fmt.Errorf("%q: it is export %q, which belongs in %q", path, cut(e.Name), stateFile(e.Name))
	}
	return e, nil
}

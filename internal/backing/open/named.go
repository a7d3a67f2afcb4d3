package open

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// openFile opens the file that s names: one of s.Files, or beneath s.Roots, or
// wherever it is.
func openFile(s Spec, c cacheMode) (*os.File, error) {
	if f := s.Files[s.Path]; f != nil {
		return s.unclaimed(adopt(f, s, c))
	}
	if s.Roots != nil {
		return openInRoots(s, c)
	}
	r := Request{Path: s.Path, ReadOnly: s.ReadOnly, Direct: c.direct}
	f, err := s.Table.take(r)
	if err != nil {
		return nil, err
	}
	if f != nil {
		if err := suits(f, s, c); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
	if f, err = s.unclaimed(openAnywhere(s, c)); err != nil {
		f, err = known(s.Known, r, err)
	}
	return s.Table.keep(r, f, err)
}

// adopt looks at a descriptor that somebody else has opened. The file that it
// returns is another descriptor of the same open file.
func adopt(f *os.File, s Spec, c cacheMode) (*os.File, error) {
	if err := suits(f, s, c); err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return admitted(fd, s.Path, func(mode uint32) error { return checkKind(s, mode) })
}

// suits refuses a descriptor that is not what s would open.
func suits(f *os.File, s Spec, c cacheMode) error {
	var st unix.Stat_t
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil {
		return err
	}
	mode := flags & unix.O_ACCMODE
	switch {
	case flags&unix.O_PATH != 0:
		return invalid(s, errors.New("the descriptor was opened with O_PATH, which allows no I/O"))
	case mode == unix.O_WRONLY, mode == unix.O_RDONLY && !s.ReadOnly:
		return invalid(s, errors.New("the descriptor does not allow what is to be done with the image"))
	case flags&unix.O_APPEND != 0:
		return invalid(s, errors.New("the descriptor was opened with O_APPEND"))
	case (flags&unix.O_DIRECT != 0) != c.direct:
		return invalid(s, errors.New("the descriptor's O_DIRECT is not that of the cache mode"))
	}
	return checkKind(s, st.Mode)
}

// openInRoots opens a file beneath one of the folders that are allowed. No
// symbolic link is followed behind the folder itself.
func openInRoots(s Spec, c cacheMode) (*os.File, error) {
	if !filepath.IsAbs(s.Path) {
		return nil, invalid(s, errors.New("the path of an image must be absolute"))
	}
	w := wish{by: s.Path, what: "image", name: s.Path, readOnly: s.ReadOnly, devices: true}
	return inRoots(s, w, c.direct, func(g *gate, rel string) (*os.File, error) { return g.openBeneath(w, rel) })
}

// inRoots has open open s.Path by the gate of the first of s.Roots that it lies
// beneath, relative to that folder.
func inRoots(s Spec, w wish, direct bool, open func(g *gate, rel string) (*os.File, error)) (*os.File, error) {
	for _, root := range s.Roots {
		g, err := newGate(Policy{Mode: Beneath, Root: root}, s, direct)
		if errors.Is(err, fs.ErrNotExist) && !Within(root, s.Path) {
			continue // nothing lies in a folder that is not there
		}
		if err != nil {
			return nil, err
		}
		rel, err := g.inside(w, s.Path)
		if err != nil {
			g.close()
			continue
		}
		f, err := open(g, rel)
		g.close()
		return f, err
	}
	return nil, w.denied("it lies beneath none of the folders that images may come from")
}

// Within tells whether path is root or begins with it, as they are written.
func Within(root, path string) bool {
	rel, err := filepath.Rel(root, path)
	return err == nil && filepath.IsLocal(rel)
}

// checkPolicy refuses policies that would lead out of what s allows.
func checkPolicy(s Spec) error {
	p := s.Backing
	switch {
	case s.Files[s.Path] != nil && (p.Mode == SameDir || p.Mode == Beneath):
		return invalid(s, fmt.Errorf("an image that came as a descriptor has no folder: its backing file cannot be opened by --backing=%s", p.Mode))
	case s.Roots == nil || p.Mode != Beneath:
		return nil
	}
	real, err := s.Table.real(p.Root)
	if err != nil {
		return err
	}
	for _, root := range s.Roots {
		if root, err = s.Table.real(root); err != nil {
			continue
		}
		if Within(root, real) {
			return nil
		}
	}
	return &backing.Error{Op: "open", Path: s.Path, Off: -1, Kind: backing.ErrInvalid,
		Err: fmt.Errorf("%w: --backing=beneath=%s is beneath none of the folders that images may come from", ErrDenied, p.Root)}
}

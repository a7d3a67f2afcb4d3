package open

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// gate opens the files that the images of one chain name, as far as the
// policy allows. No other code follows a name that was read from an image.
type gate struct {
	policy Policy
	top    Spec
	direct bool

	// SameDir, Beneath: the directory, its path without symbolic links and
	// the one that the operator wrote, both absolute.
	root          *os.File
	shut          error // why root is nil
	real, written string

	// Explicit: what was not used yet.
	files     []File
	dataFiles []string
}

// wish is what an image asks for.
type wish struct {
	by       string // path of the image
	what     string // "backing file" or "data file"
	name     string // as it stands in the image; may be empty
	readOnly bool
	devices  bool // block devices may be opened too
}

// newGate opens the directory that the policy speaks of. top is how the top of
// the chain was to be opened.
func newGate(p Policy, top Spec, direct bool) (*gate, error) {
	g := &gate{policy: p, top: top, direct: direct, files: p.Files, dataFiles: p.DataFiles}
	dir := p.Root
	switch p.Mode {
	case "", Deny, Explicit:
		return g, nil
	case SameDir:
		dir = folderOf(top.Path)
	case Beneath:
	default:
		return nil, fmt.Errorf("unknown backing policy %q", p.Mode)
	}
	var err error
	if ascends(dir) {
		if dir, err = top.Table.real(dir); err != nil {
			return nil, err
		}
	}
	if g.written, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if g.real, err = top.Table.real(g.written); err != nil {
		return nil, err
	}
	if err := g.enter(); err != nil {
		return nil, err
	}
	return g, nil
}

// enter opens the directory. That may be impossible where all that is in it was
// opened before: then nothing else will be.
func (g *gate) enter() error {
	fd, err := openRetrying(g.real, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err == nil {
		g.root = os.NewFile(uintptr(fd), g.real)
		return nil
	}
	g.shut = &fs.PathError{Op: "open", Path: g.real, Err: err}
	if g.top.Table.full() {
		return nil
	}
	return g.shut
}

// close lets go of the directory; files that were opened stay open.
func (g *gate) close() {
	if g.root != nil {
		_ = g.root.Close() // a directory that was only looked into
	}
}

// backing opens what an image names as its backing file, whose format it said.
// It returns the file, its path and its format.
func (g *gate) backing(w wish, said string) (*os.File, string, string, error) {
	if g.policy.Mode == Explicit {
		if len(g.files) == 0 {
			return nil, "", "", w.denied("--backing=explicit and there is no further --backing-file")
		}
		next := g.files[0]
		g.files = g.files[1:]
		if next.Format != "" {
			said = next.Format
		}
		if err := w.checkFormat(said); err != nil {
			return nil, "", "", err
		}
		if err := g.agree(w, next); err != nil {
			return nil, "", "", err
		}
		f, path, err := g.openNamed(next.Path, w)
		return f, path, said, err
	}
	if g.real == "" {
		return nil, "", "", w.deniedByDefault()
	}
	name, fileFormat, err := w.fileName(said)
	if err != nil {
		return nil, "", "", err
	}
	if err := w.checkFormat(fileFormat); err != nil {
		return nil, "", "", err
	}
	f, path, err := g.openAllowed(w, name)
	return f, path, fileFormat, err
}

// agree refuses an image that names another file than f, if that is Named. Paths are
// compared, f's with and without symbolic links to its folder; those in a name that
// an image has are not followed.
func (g *gate) agree(w wish, f File) error {
	if !f.Named {
		return nil
	}
	name, _, err := w.fileName("")
	if err != nil {
		return err
	}
	if !filepath.IsAbs(name) {
		dir, err := g.top.Table.real(filepath.Dir(w.by))
		if err != nil {
			return err
		}
		name = filepath.Join(dir, name)
	}
	if name = filepath.Clean(name); name == filepath.Clean(f.Path) {
		return nil
	}
	if dir, err := g.top.Table.real(filepath.Dir(f.Path)); err == nil && name == filepath.Join(dir, filepath.Base(f.Path)) {
		return nil
	}
	return w.denied(fmt.Sprintf("a snapshot has put image %q above %q, and it was rebased since; rebase it again, or name it and the file below as the image of the export", w.by, f.Path))
}

// data opens what an image names as its data file.
func (g *gate) data(w wish) (*os.File, string, error) {
	if g.policy.Mode == Explicit {
		if len(g.dataFiles) == 0 {
			return nil, "", w.denied("--backing=explicit and there is no further --data-file")
		}
		next := g.dataFiles[0]
		g.dataFiles = g.dataFiles[1:]
		return g.openNamed(next, w)
	}
	if g.real == "" {
		return nil, "", w.deniedByDefault()
	}
	if w.name == "" {
		return nil, "", w.denied("the image does not name it; --data-file would")
	}
	if err := cmp.Or(w.local(w.name), w.plain(w.name)); err != nil {
		return nil, "", err
	}
	return g.openAllowed(w, w.name)
}

// unused complains of files that no image asked for: the operator has another
// chain in mind.
func (g *gate) unused() error {
	switch {
	case len(g.files) > 0:
		return fmt.Errorf("--backing-file %q is not needed: the chain ends above it", g.files[0].Path)
	case len(g.dataFiles) > 0:
		return fmt.Errorf("--data-file %q is not needed: no image of the chain has a further data file", g.dataFiles[0])
	}
	return nil
}

// openNamed opens a file that the operator named, wherever it is.
func (g *gate) openNamed(path string, w wish) (*os.File, string, error) {
	s := Spec{Path: path, ReadOnly: w.readOnly, Lock: g.top.Lock, Files: g.top.Files, Known: g.top.Known, Roots: g.top.Roots, Table: g.top.Table}
	f, err := openFile(s, cacheMode{direct: g.direct})
	return f, path, err
}

// openAllowed opens a file beneath the root.
func (g *gate) openAllowed(w wish, name string) (*os.File, string, error) {
	rel, err := g.inside(w, name)
	if err != nil {
		return nil, "", err
	}
	f, err := g.openBeneath(w, rel)
	if err != nil {
		return nil, "", err
	}
	return f, f.Name(), nil
}

// inside makes name relative to the root. It is relative to the directory of
// the image that contains it, which has no symbolic links in its path.
func (g *gate) inside(w wish, name string) (string, error) {
	path := filepath.Clean(name)
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(w.by), name)
	}
	for _, root := range []string{g.real, g.written} {
		rel, err := filepath.Rel(root, path)
		if err != nil || !filepath.IsLocal(rel) {
			continue
		}
		if g.policy.Mode == SameDir && strings.Contains(rel, "/") {
			continue
		}
		return rel, nil
	}
	if g.policy.Mode == SameDir {
		return "", w.denied(fmt.Sprintf("--backing=same-dir opens files in %q only; --backing=beneath=DIR or naming the file would", g.real))
	}
	return "", w.denied(fmt.Sprintf("--backing=beneath=%s opens files beneath that directory only; naming the file would", g.written))
}

// openBeneath opens a file beneath the root, or takes it from the table.
func (g *gate) openBeneath(w wish, rel string) (*os.File, error) {
	r := Request{Path: filepath.Join(g.real, rel), ReadOnly: w.readOnly, Direct: g.direct}
	f, err := g.top.Table.take(r)
	if err != nil {
		return nil, err
	}
	if f != nil {
		if err := g.recheck(w, f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
	s := Spec{Path: r.Path, ReadOnly: w.readOnly, Lock: g.top.Lock}
	if f, err = s.unclaimed(g.openRel(w, rel)); err != nil {
		f, err = known(g.top.Known, r, err)
	}
	return g.top.Table.keep(r, f, err)
}

// recheck looks at a file that was opened before.
func (g *gate) recheck(w wish, f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	return g.checkKind(w, st.Mode)
}

// openRel looks at a file before it opens it, because opening some kinds has
// effects, and again afterwards.
func (g *gate) openRel(w wish, rel string) (*os.File, error) {
	looked, err := g.openat(w, rel, unix.O_PATH)
	if _, isLink := errors.AsType[linkError](err); isLink && w.devices {
		return g.openVolume(w, rel)
	}
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(looked, &st)
	_ = unix.Close(looked)
	if err == nil {
		err = g.checkKind(w, st.Mode)
	}
	if err != nil {
		return nil, err
	}
	fd, err := g.openat(w, rel, g.flags(w))
	if err != nil {
		return nil, err
	}
	return admitted(fd, filepath.Join(g.real, rel), func(mode uint32) error { return g.checkKind(w, mode) })
}

// flags are how a file is opened for w.
func (g *gate) flags(w wish) uint64 {
	flags := uint64(unix.O_RDONLY)
	if !w.readOnly {
		flags = unix.O_RDWR
	}
	if g.direct {
		flags |= unix.O_DIRECT
	}
	return flags | unix.O_NONBLOCK | unix.O_NOCTTY
}

// openVolume opens the block device that a symbolic link leads to, as the names
// of volumes in /dev/mapper do. Whoever may make links in a folder could name
// any device by one: so the link and its folder are root's, and nobody else may
// write there.
func (g *gate) openVolume(w wish, rel string) (*os.File, error) {
	dir, err := g.openat(w, filepath.Dir(rel), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(dir) }() // it was only looked into
	var folder, link, file unix.Stat_t
	name := filepath.Base(rel)
	if err := errors.Join(unix.Fstat(dir, &folder), unix.Fstatat(dir, name, &link, unix.AT_SYMLINK_NOFOLLOW), unix.Fstatat(dir, name, &file, 0)); err != nil {
		return nil, &fs.PathError{Op: "open " + w.what, Path: filepath.Join(g.real, rel), Err: err}
	}
	if folder.Uid != 0 || folder.Mode&0o022 != 0 || link.Uid != 0 || !isBlock(file.Mode) {
		return nil, w.link(g.option())
	}
	fd, err := openatRetrying(dir, name, &unix.OpenHow{Flags: g.flags(w) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, &fs.PathError{Op: "open " + w.what, Path: filepath.Join(g.real, rel), Err: err}
	}
	return admitted(fd, filepath.Join(g.real, rel), func(mode uint32) error {
		if !isBlock(mode) {
			return w.link(g.option())
		}
		return nil
	})
}

func isBlock(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFBLK }

// openatRetrying is openat2 that neither a signal nor a lease interrupts. It is made
// again as well where the path was renamed meanwhile, of which EAGAIN tells too.
func openatRetrying(dir int, name string, how *unix.OpenHow) (int, error) {
	return raw.PastLease(func() (int, error) { return unix.Openat2(dir, name, how) })
}

func (g *gate) openat(w wish, rel string, flags uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_SYMLINKS}
	if flags&unix.O_CREAT != 0 {
		how.Mode = 0o600
	}
	if g.root == nil {
		return -1, g.shut
	}
	fd, err := openatRetrying(int(g.root.Fd()), rel, &how)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return -1, w.link(g.option())
	case errors.Is(err, unix.ENOSYS):
		return -1, w.denied(fmt.Sprintf("%s needs openat2, that is Linux 5.6; naming the file does not", g.option()))
	}
	return -1, &fs.PathError{Op: "open " + w.what, Path: filepath.Join(g.real, rel), Err: err}
}

// linkError is for a symbolic link where none is followed.
type linkError struct{ error }

func (e linkError) Unwrap() error { return e.error }

// link refuses a symbolic link; option is the policy, for what an image names.
func (w wish) link(option string) error {
	why := option + " follows no symbolic links; naming the file would"
	if w.devices {
		why = "no symbolic links are followed in the folders that images may come from, but root's own to block devices"
	}
	return linkError{w.denied(why)}
}

// checkKind admits regular files, and block devices where they may be.
func (g *gate) checkKind(w wish, mode uint32) error {
	switch m := mode & unix.S_IFMT; m {
	case unix.S_IFREG:
		return nil
	case unix.S_IFBLK:
		if w.devices {
			return nil
		}
		return w.denied(fmt.Sprintf("it is a block device, %s opens regular files only; naming the device would", g.option()))
	default:
		return w.denied(fmt.Sprintf("it is a %s", kinds[m]))
	}
}

// option is the policy as it is written on the command line.
func (g *gate) option() string {
	if g.policy.Mode == Beneath {
		return "--backing=beneath=" + g.written
	}
	return "--backing=" + string(g.policy.Mode)
}

func (w wish) deniedByDefault() error {
	return w.denied("--backing=deny, the default, opens none; " +
		"--backing=same-dir, --backing=beneath=DIR or --backing-file and --data-file would")
}

// denied refuses the wish.
func (w wish) denied(why string) error {
	return &backing.Error{Op: "open", Path: w.by, Off: -1, Kind: backing.ErrInvalid,
		Err: fmt.Errorf("%s %q %w: %s", w.what, w.name, ErrDenied, why)}
}

// layerFormats are the formats that a backing file may have.
var layerFormats = [...]string{formatRaw, formatQcow2}

// checkFormat refuses formats that are not there; none is ever guessed.
func (w wish) checkFormat(name string) error {
	if slices.Contains(layerFormats[:], name) {
		return nil
	}
	if name == "" {
		return w.denied("the image does not say its format, which is never guessed; " +
			"--backing-file=PATH:raw or PATH:qcow2 says it, as does qemu-img rebase -u -F")
	}
	return w.denied(fmt.Sprintf("its format %q is neither raw nor qcow2", name))
}

// fileName is the name of the file that an image means, and its format: name
// may be written as JSON, which says the format too, or begin with "file:". QEMU
// opens such a name as it is, so that only an absolute one is the same file for
// everybody.
func (w wish) fileName(said string) (name, fileFormat string, err error) {
	if strings.HasPrefix(w.name, format.JSONPrefix) {
		inner, name, err := format.ParseJSONFile(w.name)
		if err != nil {
			return "", "", w.denied(err.Error())
		}
		if said != "" && said != inner {
			return "", "", w.denied(fmt.Sprintf("its format is said to be %q and %q", said, inner))
		}
		return name, inner, cmp.Or(w.plain(name), w.absolute(name))
	}
	if name, ok := strings.CutPrefix(w.name, "file:"); ok {
		return name, said, cmp.Or(w.plain(name), w.absolute(name))
	}
	return w.name, said, cmp.Or(w.local(w.name), w.plain(w.name))
}

// local refuses names of protocols.
func (w wish) local(name string) error {
	if protocol, ok := format.Protocol(name); ok {
		return w.denied(fmt.Sprintf("protocols such as %q are never followed", protocol))
	}
	return nil
}

// absolute refuses relative names.
func (w wish) absolute(name string) error {
	if filepath.IsAbs(name) {
		return nil
	}
	return w.denied("a relative name behind \"file:\" or in JSON is in the directory of whoever opens it; " +
		"qemu-img rebase -u without it makes it relative to the image")
}

// plain refuses names that a log or a C program would show differently, and those
// that only the kernel can follow: what ".." is behind a folder, which may be a
// symbolic link, is not told by the text.
func (w wish) plain(name string) error {
	switch {
	case format.HasControl(name):
		return w.denied("its name has control bytes")
	case name == "":
		return w.denied("its name is empty")
	case climbs(name):
		return w.denied("its name has \"..\" behind a folder, which may be a symbolic link")
	}
	return nil
}

// climbs tells whether ".." stands behind anything but "..", "." or the root.
func climbs(name string) bool {
	below := false
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			if below {
				return true
			}
		default:
			below = true
		}
	}
	return false
}

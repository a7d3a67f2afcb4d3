package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// newFiles are the files that one command makes.
type newFiles struct {
	engine *engine.Pool
	opened []newFile
}

type newFile struct {
	file *copier.File
	st   store.Store
}

// open makes a file for length bytes, or opens one that is there when force allows
// it, and locks it as QEMU does.
func (n *newFiles) open(path string, length int64, force bool) (store.Store, error) {
	file, err := copier.Claim{Mode: 0o600, Container: true, New: !force}.Open(path)
	if err != nil {
		return nil, err
	}
	if n.engine == nil {
		n.engine = engine.NewPool(1)
	}
	st, err := storeIn(file, n.engine)
	if err != nil {
		return nil, errors.Join(err, file.Discard())
	}
	n.opened = append(n.opened, newFile{file, st})
	return st, create.Room(st, length)
}

// empty takes away what is in the files. It comes after the last open: a command
// that is refused one of them leaves the others as they are.
func (n *newFiles) empty() error {
	for _, f := range n.opened {
		if f.file.Created() || f.st.Fixed() {
			continue
		}
		if err := f.st.Truncate(0); err != nil {
			return err
		}
	}
	return nil
}

// storeIn is the space in a file that stays open, and locked, for longer.
func storeIn(file *copier.File, e engine.Engine) (store.Store, error) {
	f, err := file.Dup()
	if err != nil {
		return nil, err
	}
	d, err := raw.Open(f, e, raw.Options{Path: f.Name(), Container: true, Lock: raw.LockOff})
	if err != nil {
		return nil, err
	}
	return store.NewFile(d), nil
}

// close closes the files. If err says that the command failed, those that it
// made go; else their names are made durable.
func (n *newFiles) close(err error) error {
	for _, f := range n.opened {
		err = errors.Join(err, f.st.Close())
	}
	for _, f := range n.opened {
		if err == nil && f.file.Created() {
			err = f.file.SyncName()
		}
		if err != nil {
			err = errors.Join(err, f.file.Discard())
		} else {
			err = f.file.Close()
		}
	}
	if n.engine != nil {
		n.engine.Close()
	}
	return err
}

// sameFile reports whether two paths name one file, there or not. Paths are not
// cleaned: what ".." behind a symbolic link is, only the kernel knows.
func sameFile(a, b string) bool {
	is := func(a, b string) (same, there bool) {
		x, noX := os.Stat(a)
		y, noY := os.Stat(b)
		return noX == nil && noY == nil && os.SameFile(x, y), noX == nil || noY == nil
	}
	same, there := is(a, b)
	if there || a == b {
		return same || a == b
	}
	from, name := filepath.Split(a)
	to, other := filepath.Split(b)
	same, _ = is(cmp.Or(from, "."), cmp.Or(to, "."))
	return same && name == other
}

// leadsTo reports whether the chain that begins with an image of a format has a file in
// it. One that cannot be read to its end has what was found: who opens it is told.
func leadsTo(ctx context.Context, image, kind, path string) bool {
	for range limits.ChainDepth {
		if sameFile(image, path) {
			return true
		}
		h, err := headerOf(ctx, image, kind)
		if err != nil || h == nil {
			return false
		}
		if h.DataFile != "" && sameFile(beneath(image, h.DataFile), path) {
			return true
		}
		if h.Backing == "" {
			return false
		}
		image, kind = beneath(image, h.Backing), h.BackingFormat
	}
	return false
}

// headerOf is nil for a raw image. It takes no lock, as imageSize.
func headerOf(ctx context.Context, image, kind string) (*format.Header, error) {
	if kind == formatRaw {
		return nil, nil
	}
	st, done, err := openImage(image, true, raw.LockOff)
	if err != nil {
		return nil, err
	}
	h, err := qcow2.ReadHeader(ctx, st)
	return h, errors.Join(err, done())
}

// imageSize is the size of the disk in an image that the operator named,
// rounded up to sectors. The format is not guessed. It takes no lock: the size
// of an image that is in use does not matter to it.
func imageSize(ctx context.Context, path, kind string) (int64, error) {
	switch kind {
	case formatQcow2, formatRaw:
	case "":
		return 0, usage("--backing-format is missing")
	default:
		return 0, usage("--backing-format is %q, allowed are qcow2 and raw", kind)
	}
	st, done, err := openImage(path, true, raw.LockOff)
	if err != nil {
		return 0, fmt.Errorf("backing file: %w", err)
	}
	n, err := sizeWithin(ctx, st, kind)
	if err = errors.Join(err, done()); err != nil {
		return 0, fmt.Errorf("backing file %q: %w", path, err)
	}
	return wholeSectors(n)
}

func sizeWithin(ctx context.Context, st store.Store, kind string) (int64, error) {
	if kind == formatRaw {
		return st.Size()
	}
	h, err := qcow2.ReadHeader(ctx, st)
	if err != nil {
		return 0, err
	}
	return int64(h.Size), nil
}

// wholeSectors rounds a size up to sectors of 512 bytes.
func wholeSectors(n int64) (int64, error) {
	const sector = 512
	if n > math.MaxInt64-sector {
		return 0, usage("a disk of %d bytes is too large", n)
	}
	return (n + sector - 1) &^ (sector - 1), nil
}

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/cmd/vmdiskctl/internal/copier"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// newFiles are the files that one command makes.
type newFiles struct {
	engine *engine.Pool
	opened []newFile
}

type newFile struct {
	path string
	made bool // was not there before
	st   store.Store
}

// open makes a file, or empties one that is there when force allows it, and
// locks it as QEMU does.
func (n *newFiles) open(path string, force bool) (store.Store, error) {
	made := true
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOCTTY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if !force {
			return nil, fmt.Errorf("%w: %q exists", copier.ErrRefused, path)
		}
		made = false
		f, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, err
	}
	if n.engine == nil {
		n.engine = engine.NewPool(1)
	}
	d, err := raw.Open(f, n.engine, raw.Options{Path: path, Container: true})
	if err != nil {
		if made {
			err = errors.Join(err, os.Remove(path))
		}
		return nil, err
	}
	st := store.NewFile(d)
	n.opened = append(n.opened, newFile{path, made, st})
	if !made && !st.Fixed() {
		return st, st.Truncate(0)
	}
	return st, nil
}

// close closes the files. If err says that the command failed, those that it
// made go; else their names are made durable.
func (n *newFiles) close(err error) error {
	for _, f := range n.opened {
		err = errors.Join(err, f.st.Close())
	}
	for _, f := range n.opened {
		switch {
		case !f.made:
		case err != nil:
			err = errors.Join(err, os.Remove(f.path))
		default:
			err = syncDirectory(filepath.Dir(f.path))
		}
	}
	if n.engine != nil {
		n.engine.Close()
	}
	return err
}

// sameFile reports whether two paths name one file, there or not.
func sameFile(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// imageSize is the size of the disk in an image that the operator named,
// rounded up to sectors. The format is not guessed.
func imageSize(path, kind string) (int64, error) {
	if kind == "" {
		return 0, usage("--backing-format is missing")
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, fmt.Errorf("backing file: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("backing file: %w", err)
	}
	if m := fi.Mode(); !m.IsRegular() && (m&fs.ModeDevice == 0 || m&fs.ModeCharDevice != 0) {
		return 0, fmt.Errorf("backing file %q: neither a regular file nor a block device", path)
	}
	switch kind {
	case "raw":
		n, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return 0, fmt.Errorf("backing file: %w", err)
		}
		const sector = 512
		return (n + sector - 1) / sector * sector, nil
	case "qcow2":
		n, err := qcow2Size(f)
		if err != nil {
			return 0, fmt.Errorf("backing file %q: %w", path, err)
		}
		return n, nil
	}
	return 0, usage("--backing-format is %q, allowed are qcow2 and raw", kind)
}

// qcow2Size reads the header, which lies in the first cluster.
func qcow2Size(f *os.File) (int64, error) {
	p := make([]byte, 24)
	n, err := f.ReadAt(p, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	size, err := format.ClusterSize(p[:n])
	if err != nil {
		return 0, err
	}
	p = make([]byte, size)
	if n, err = f.ReadAt(p, 0); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	h, err := format.ParseHeader(p[:n])
	if err != nil {
		return 0, err
	}
	return int64(h.Size), nil
}

package open

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/create"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// CreateOverlay makes a new qcow2 image at s.Path, which must not exist, of
// size bytes and with a backing file, whose path it names as it is given: a
// relative one is from the folder of s.Path. Of s it heeds Path, Roots, Engine,
// Buffers and Log. What fails leaves no file behind.
func CreateOverlay(ctx context.Context, s Spec, size int64, base, baseFormat string) (err error) {
	f, err := createFile(s)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(s.Path))
		}
	}()
	dev, err := raw.Open(f, s.Engine, raw.Options{
		Path: s.Path, Container: true, Buffers: s.Buffers, Log: s.Log,
	})
	if err != nil {
		return err
	}
	st := store.NewFile(dev)
	err = create.Image(ctx, st, create.Options{Size: size, Backing: format.FileName(base), BackingFormat: baseFormat})
	if err == nil {
		err = raw.SyncName(f)
	}
	return errors.Join(err, st.Close())
}

// createFile makes a file that is not there yet, beneath the roots if there are
// any.
func createFile(s Spec) (*os.File, error) {
	if s.Roots == nil {
		return os.OpenFile(s.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	}
	w := wish{by: s.Path, what: "image", name: s.Path}
	return inRoots(s, w, false, func(g *gate, rel string) (*os.File, error) {
		fd, err := g.openat(w, rel, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), s.Path), nil
	})
}

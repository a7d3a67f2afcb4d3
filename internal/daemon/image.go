package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// roots are the folders that images may come from, nil for everywhere.
func (d *daemon) roots() []string {
	if d.conf.Load() == nil || len(d.conf.Load().Images.Roots) == 0 {
		return nil
	}
	return d.conf.Load().Images.Roots
}

// image is an image that is open.
type image struct {
	dev   backing.Device
	files map[open.Request]*os.File // of the device, which closes them
	dirs  map[string]string         // of the table that they came from
	below []config.File
	file  api.File // of files the top one; that of no file if there are none

	poison *poison // the record of the image
}

// known are the files of an image.
func (i *image) known() []*os.File { return slices.Collect(maps.Values(i.files)) }

// mayWriteAgain refuses, by raw.Unclaimed, an export with these files that clients can
// write to as to says, and could not as from says: the files stayed open for writing.
func mayWriteAgain(from, to *config.Export, files map[open.Request]*os.File) error {
	if !from.ReadOnly || to.ReadOnly {
		return nil
	}
	for r, f := range files {
		err := raw.Unclaimed(f, raw.Options{Path: r.Path, ReadOnly: r.ReadOnly, Lock: raw.LockMode(to.Lock)})
		if err != nil {
			return err
		}
	}
	return nil
}

// openImage opens the image of an export as s says, with what was handed over for it.
// p is its record.
func (d *daemon) openImage(ctx context.Context, x *config.Export, s open.Spec, p *poison) (image, error) {
	if err := d.cfg.Handed.images(x, &s); err != nil {
		return image{}, err
	}
	defer s.Table.Close()
	defer closeFiles(s.Known)
	return d.openSpec(ctx, x.Name, s, p)
}

// openSpec opens the image of an export of that name, of which p is the record: if it
// takes no more writes, it takes none now.
func (d *daemon) openSpec(ctx context.Context, name string, s open.Spec, p *poison) (i image, err error) {
	s.Log, s.Lost, s.Poisoned = d.logs.For("backing"), p.reason(), d.watch(name, p)
	i.files, i.poison = map[open.Request]*os.File{}, p
	if s.Table != nil {
		_, i.dirs = s.Table.Contents()
	}
	s.Opened = func(f *os.File, below bool) {
		i.files[s.Asked(f, below)] = f
		switch {
		case below:
			i.below = append(i.below, fileOf(f))
		case i.file == (api.File{}): // data files come later
			i.file = statOf(f)
		}
	}
	i.dev, err = open.Open(ctx, s)
	if err == nil {
		if p.of, err = open.NewTable(i.files, nil).Written(); err != nil {
			err = errors.Join(err, i.dev.Close())
		}
	}
	if err == nil && s.Lost != nil {
		d.log.Error("export takes no more writes, as before its image was opened again: check the image, and remove the export and add it again, or restart",
			"export", name, "error", s.Lost)
	}
	return i, d.explain(s.Path, err)
}

// statOf tells which file f is; that of no file if nobody knows.
func statOf(f *os.File) api.File {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return api.File{}
	}
	return api.FileOf(&st)
}

// openGathered opens an image whose files are in t, and which th and p are told of.
func (d *daemon) openGathered(ctx context.Context, x *config.Export, t *open.Table, th *raw.Threshold, p *poison) (image, error) {
	s, err := d.imageSpec(x, nil)
	if err != nil {
		return image{}, err
	}
	s.Table, s.Threshold = t, th
	return d.openSpec(ctx, x.Name, s, p)
}

// gather opens the files of an image without locking them, while those in known
// are open that are its too. Storage that hangs is not waited for: errNoAnswer.
func (d *daemon) gather(ctx context.Context, x *config.Export, known []*os.File) (*open.Table, error) {
	s, err := d.imageSpec(x, nil)
	if err != nil {
		return nil, err
	}
	s.Log, s.Known, s.Buffers = d.logs.For("backing"), known, d.asking.memory()
	t, err := d.gatherInTime(ctx, s)
	return t, d.explain(s.Path, err)
}

// imageSpec is how the image of an export is opened.
func (d *daemon) imageSpec(x *config.Export, files []*os.File) (open.Spec, error) {
	policy, err := open.ParsePolicy(x.Backing, x.BackingFiles, x.DataFiles)
	if err != nil {
		return open.Spec{}, err
	}
	for i := range min(x.Snapshots, len(policy.Files)) {
		policy.Files[i].Named = true
	}
	return open.Spec{
		Path:     x.Image,
		Format:   x.Format,
		Files:    given(files),
		Roots:    d.roots(),
		ReadOnly: x.ReadOnly,
		Cache:    x.Cache,
		Lock:     raw.LockMode(x.Lock),
		For:      fmt.Sprintf("export %q", x.Name),
		Backing:  policy,
		Snapshot: x.Snapshot,
		Lenient:  x.Lenient,
		Discard:  x.Discard,
		L2Cache:  int64(x.L2CacheSize),
		Engine:   d.engine,
		Buffers:  d.buffers,
	}, nil
}

// given are files by the words "fd:N" that stand for them.
func given(files []*os.File) map[string]*os.File {
	byWord := make(map[string]*os.File, len(files))
	for i, f := range files {
		byWord[fmt.Sprint(api.FilePrefix, i)] = f
	}
	return byWord
}

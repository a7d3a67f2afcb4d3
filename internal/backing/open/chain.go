package open

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// openQcow2 opens an image and the chain of its backing files. Those are
// opened read-only whatever is to be done with the image.
func openQcow2(ctx context.Context, s Spec, c cacheMode) (backing.Device, error) {
	ch := &chain{spec: s, cache: c, seen: make(map[raw.ID]string)}
	defer ch.close()
	if err := ch.open(ctx); err != nil {
		return nil, err
	}
	dev, err := ch.device(ctx)
	if err == nil && c.through {
		dev = through{backing.Passthrough{Next: dev}}
	}
	return dev, err
}

// chain is a chain that is being opened: from the top downwards the files,
// because each names the next; then from the bottom upwards the layers.
type chain struct {
	spec  Spec
	cache cacheMode
	gate  *gate
	seen  map[raw.ID]string // what is open, and by which path

	links []link // top first; those that were handed on are cut off
	below qcow2.Layer
}

// link is one image of the chain.
type link struct {
	path   string // absolute, and without symbolic links in its directory
	format string
	st     store.Store
	data   store.Store // nil without a data file

	dataPath string // with data

	guest *raw.Device // below that of st and data which has the guest's data
}

// open opens all files and reads the headers that name them. Whatever it has
// opened, close closes.
func (ch *chain) open(ctx context.Context) error {
	path, err := ch.topPath()
	if err != nil {
		return err
	}
	f, err := openFile(ch.spec, ch.cache)
	if err != nil {
		return err
	}
	if err := ch.add(f, path, ch.spec.Format); err != nil {
		return err
	}
	if ch.gate, err = newGate(ch.spec.Backing, ch.spec, ch.cache.direct); err != nil {
		return invalid(ch.spec, err)
	}
	for {
		more, err := ch.descend(ctx)
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	if err := ch.gate.unused(); err != nil {
		return invalid(ch.spec, err)
	}
	return nil
}

// topPath is the path of the image without symbolic links to its folder. A
// descriptor has none: it keeps its name.
func (ch *chain) topPath() (string, error) {
	if ch.spec.Files[ch.spec.Path] != nil {
		return ch.spec.Path, nil
	}
	dir, err := ch.spec.Table.real(folderOf(ch.spec.Path))
	return filepath.Join(dir, filepath.Base(ch.spec.Path)), err
}

// folderOf is the folder of a path. One with ".." is not cleaned: behind a symbolic
// link that leads out of another folder.
func folderOf(path string) string {
	if dir, _ := filepath.Split(path); ascends(dir) {
		return dir
	}
	return filepath.Dir(path)
}

// ascends tells whether a path has "..".
func ascends(path string) bool { return slices.Contains(strings.Split(path, "/"), "..") }

// descend opens what the last image names.
func (ch *chain) descend(ctx context.Context) (more bool, err error) {
	l := &ch.links[len(ch.links)-1]
	if l.format == formatRaw {
		return false, nil
	}
	h, err := qcow2.ReadHeader(ctx, l.st)
	if err != nil {
		return false, inImage(l.path, err)
	}
	names := qcow2.NamesOf(h)
	if names.NeedsDataFile {
		// What the image is opened for concerns its data file too.
		at := len(ch.links) - 1
		w := wish{by: l.path, what: "data file", name: names.DataFile, readOnly: ch.readOnly(at)}
		f, path, err := ch.gate.data(w)
		if err != nil {
			return false, err
		}
		if l.data, l.guest, err = ch.store(f, path, at); err != nil {
			return false, err
		}
		l.dataPath = path
	}
	if names.Backing == "" {
		return false, nil
	}
	w := wish{by: l.path, what: "backing file", name: names.Backing, readOnly: true}
	if len(ch.links) == limits.ChainDepth {
		return false, w.denied(fmt.Sprintf("a chain has %d images at most", limits.ChainDepth))
	}
	f, path, format, err := ch.gate.backing(w, names.BackingFormat)
	if err != nil {
		return false, err
	}
	return true, ch.add(f, path, format)
}

// inImage gives err the path of the image, if nothing below did.
func inImage(path string, err error) error {
	return backing.WithPath(path, backing.Wrap("open", -1, 0, err))
}

// readOnly reports how image i of the chain is opened: only the top may be
// written to.
func (ch *chain) readOnly(i int) bool { return ch.spec.ReadOnly || i > 0 }

// add takes over f as the next image of the chain.
func (ch *chain) add(f *os.File, path, format string) error {
	st, dev, err := ch.store(f, path, len(ch.links))
	if err == nil {
		ch.links = append(ch.links, link{path: path, format: format, st: st, guest: dev})
	}
	return err
}

// store takes over f, a file of image i of the chain, and locks it. The same file
// twice in a chain is a loop; that is told by the open file, whatever is at the
// path by now. dev is below the store, whose it is.
func (ch *chain) store(f *os.File, path string, i int) (st store.Store, dev *raw.Device, err error) {
	readOnly := ch.readOnly(i)
	id, err := raw.Identify(f)
	if err == nil && ch.seen[id] != "" {
		err = &backing.Error{Op: "open", Path: path, Off: -1, Kind: backing.ErrInvalid,
			Err: fmt.Errorf("the chain is a loop: it has this file already, as %q", ch.seen[id])}
	}
	if err == nil {
		err = ch.spec.admit(f, readOnly)
	}
	if err != nil {
		_ = f.Close() // the error that matters is err
		return nil, nil, err
	}
	ch.seen[id] = path
	dev, err = raw.Open(f, ch.spec.Engine, raw.Options{
		Path: path, ReadOnly: readOnly, Direct: ch.cache.direct, Container: true,
		Lock: ch.lock(readOnly), For: ch.spec.For, Buffers: ch.spec.Buffers, Log: ch.spec.Log,
		Lost: ch.spec.Lost, Poisoned: ch.spec.Poisoned,
	})
	if err != nil {
		return nil, nil, err
	}
	ch.spec.opened(f, i > 0)
	st = store.NewFile(dev)
	if ch.cache.unsafe {
		st = carelessStore{st}
	}
	return st, dev, nil
}

// lock is how a file is locked. A writer of qcow2 must know that it is the only
// one: where files cannot be locked, the operator has to say so.
func (ch *chain) lock(readOnly bool) raw.LockMode {
	if l := ch.spec.lock(); readOnly || l != raw.LockAuto && l != "" {
		return l
	}
	return raw.LockOn
}

// files names the files of the chain, top first.
func (ch *chain) files() []LayerFiles {
	list := make([]LayerFiles, len(ch.links))
	for i, l := range ch.links {
		list[i] = LayerFiles{Path: l.path, Data: l.path}
		if l.data != nil {
			list[i].Data = l.dataPath
		}
	}
	return list
}

// stack builds the layers below the top, each upon the one below.
func (ch *chain) stack(ctx context.Context) error {
	for len(ch.links) > 1 {
		l := ch.cut()
		layer, err := ch.layer(ctx, l)
		if err != nil {
			return inImage(l.path, err)
		}
		ch.below = layer
	}
	return nil
}

// device builds the layers and the device on top.
func (ch *chain) device(ctx context.Context) (backing.Device, error) {
	if err := ch.stack(ctx); err != nil {
		return nil, err
	}
	l := ch.cut()
	l.guest.SetThreshold(ch.spec.Threshold)
	o := ch.options(l)
	dev, err := qcow2.Open(ctx, l.st, o)
	if err != nil {
		return nil, inImage(l.path, err)
	}
	return dev, nil
}

// layer hands l on.
func (ch *chain) layer(ctx context.Context, l link) (qcow2.Layer, error) {
	if l.format == formatRaw {
		return qcow2.NewRawLayer(l.st)
	}
	return qcow2.OpenImage(ctx, l.st, ch.options(l))
}

// options hands on what lies below, and the data file of l.
func (ch *chain) options(l link) qcow2.Options {
	o := qcow2.Options{Path: l.path, ReadOnly: ch.readOnly(len(ch.links)), Backing: ch.below, DataFile: l.data,
		Lenient: ch.spec.Lenient, Discard: qcow2.Discard(ch.spec.Discard), Poisoned: ch.spec.Poisoned, Log: ch.spec.Log,
		CacheBytes: ch.spec.L2Cache}
	ch.below = nil
	if len(ch.links) == 0 { // l is the top
		o.Snapshot = ch.spec.Snapshot
	}
	return o
}

// cut takes the lowest image that is left off the chain.
func (ch *chain) cut() link {
	last := len(ch.links) - 1
	l := ch.links[last]
	ch.links = ch.links[:last]
	return l
}

// close closes what was not handed on.
func (ch *chain) close() {
	if ch.gate != nil {
		ch.gate.close()
	}
	for _, l := range ch.links {
		_ = l.st.Close() // read-only: there is nothing to lose
		if l.data != nil {
			_ = l.data.Close()
		}
	}
	if ch.below != nil {
		_ = ch.below.Close()
	}
}

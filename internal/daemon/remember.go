package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// errNoState is for a snapshot that would be forgotten.
var errNoState = errors.New("there is no folder (control.state) to remember the overlay in: after a restart the image would be served without it")

// lockState takes the folder of kept exports for this daemon alone: two would
// serve and forget the same exports.
func (d *daemon) lockState() (err error) {
	c := d.conf.Load()
	if c == nil || c.Control.State == "" {
		return nil
	}
	if d.stateLock, err = config.LockState(c.Control.State); err != nil {
		return fmt.Errorf("control.state: %w", err)
	}
	return nil
}

// placed is an export of the configuration with the overlay that a snapshot has
// put above its image.
func (d *daemon) placed(x config.Export) (config.Export, error) {
	state := d.conf.Load().Control.State
	if state == "" {
		return x, nil
	}
	i, err := config.ReadInstead(state, x.Name)
	if err != nil || i == nil {
		return x, err
	}
	return i.Apply(x)
}

// mayRemember tells whether overlays can be remembered.
func (d *daemon) mayRemember() error {
	if d.conf.Load().Control.State == "" {
		return errNoState
	}
	return nil
}

// remember makes it durable that the export serves another image from now on,
// which stands on the files below, and returns what takes that back. It comes before
// the first write to the image: were it not known after a restart, the guest would
// lose what it wrote. So an export that was not to be kept is written too, for the
// caller to make it fromState. With k.busy.
func (d *daemon) remember(k *disk, cfg config.Export, below []config.File) (undo func() error, err error) {
	state := d.conf.Load().Control.State
	switch k.origin {
	case fromState:
		before, under := k.cfg, k.stack.below
		return func() error { return d.writeKept(before, under) }, d.writeKept(cfg, below)
	case fromAPI:
		return func() error { return config.RemoveExport(state, cfg.Name) }, d.writeKept(cfg, below)
	case fromConfig:
		before, err := config.ReadInstead(state, cfg.Name)
		if err != nil {
			return nil, err
		}
		undo = func() error {
			if before != nil {
				return config.WriteInstead(state, *before)
			}
			return config.RemoveInstead(state, cfg.Name)
		}
		return undo, config.WriteInstead(state, config.Instead{Of: k.named, Serve: config.ImageOf(cfg), Below: below})
	}
	return func() error { return nil }, nil
}

// keepAdded writes the file of k, an addition as cfg says whose image stands on the
// files below, and returns what has that as it was before. Its caller must be there
// still: nobody else would know of it. k has its name, and is not ready.
func (d *daemon) keepAdded(ctx context.Context, k *disk, cfg config.Export, below []config.File) (undo func() error, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	state, old := d.conf.Load().Control.State, k.inPlaceOf
	undo = func() error { return config.RemoveExport(state, cfg.Name) }
	if old != nil {
		under := d.keptBelow(cfg.Name)
		undo = func() error { return d.writeKept(old.cfg, under) }
	}
	err = d.writeKept(cfg, below)
	if errors.Is(err, config.ErrUnsynced) {
		err = errors.Join(err, undo())
	}
	return undo, err
}

// writeKept writes the file of an export, which stands on the files below. It comes after
// those that were kept at the start, and after what was made since and before it.
func (d *daemon) writeKept(x config.Export, below []config.File) error {
	return config.WriteExport(d.conf.Load().Control.State, x, below, d.lastKept+d.exports.Made(x.Name))
}

// keptBelow are the files that the image of a kept export stands on, as its file says:
// none, if that is damaged.
func (d *daemon) keptBelow(name string) []config.File {
	below, _ := config.ReadBelow(d.conf.Load().Control.State, name)
	return below
}

// forgetOverlay forgets the overlay of an export of the configuration, and has the
// export serve what the file names, cutting its clients off, if that is another
// image. With force also where a guest may have written to the overlay, and where
// what is remembered cannot be read. It tells what it does; dry does nothing.
// An export that cannot be opened without the overlay keeps it; one that was removed
// stays away. With d.reloading.
func (d *daemon) forgetOverlay(ctx context.Context, name string, force, dry bool) (api.Forgotten, error) {
	f := api.Forgotten{DryRun: dry}
	state := d.conf.Load().Control.State
	if state == "" {
		return f, noOverlay(name)
	}
	i, err := config.ReadInstead(state, name)
	switch {
	case err != nil && !force:
		return f, &api.Error{Code: api.CodeForbidden, Text: fmt.Sprintf("what is remembered of an overlay cannot be read: %v; --force forgets it all the same", err)}
	case err == nil && i == nil:
		return f, noOverlay(name)
	case i != nil:
		f.Overlay = i.Serve.Image
	}
	x, ok := exportOf(d.conf.Load(), name)
	if ok {
		f.Image = x.Image
	}
	named := i != nil && ok && i.IsIn(x)
	if !named && !force {
		return f, &api.Error{Code: api.CodeForbidden, Text: fmt.Sprintf("a guest may have written to %q since a snapshot: what it wrote would be missing from %q. Stop the daemon and merge all overlays (qemu-img commit -f qcow2 -b %q %q), or name the overlay in the configuration; --force forgets it all the same", f.Overlay, f.Image, i.Of.Image, f.Overlay)}
	}
	if dry {
		return f, nil
	}
	if err := config.RemoveInstead(state, name); err != nil || named || !ok || d.disks.get(name) == nil {
		return f, err
	}
	defer d.disks.confirm()
	_, over, err := d.reopen(ctx, config.ExportChange{Name: name, New: &x})
	defer over()
	if err != nil {
		if i != nil {
			err = errors.Join(err, config.WriteInstead(state, *i))
		}
		return f, err
	}
	return f, nil
}

// noOverlay is the error for an export without one.
func noOverlay(name string) error {
	return &api.Error{Code: api.CodeNotFound, Text: fmt.Sprintf("no overlay is remembered for an export %q of the configuration", name)}
}

// forgetKept removes the file of k, if it is an export that is kept.
func (d *daemon) forgetKept(k *disk, name string) error {
	if k.origin != fromState {
		return nil
	}
	if err := config.RemoveExport(d.conf.Load().Control.State, name); err != nil {
		return err
	}
	d.disks.settle(k)
	return nil
}

// mayForget is why forgetKept would fail, as far as that can be foreseen.
func (d *daemon) mayForget(k *disk, name string) error {
	if d.disks.originOf(k) != fromState {
		return nil
	}
	return config.MayRemoveExport(d.conf.Load().Control.State, name)
}

// removeFile removes the file of an export that is kept and not there: one that
// could not be read.
func (d *daemon) removeFile(name string) error {
	state := d.conf.Load().Control.State
	if state == "" || !config.HasExport(state, name) {
		return unknownExport(name)
	}
	k := &disk{cfg: config.Export{Name: name}, origin: fromState}
	if err := d.disks.claim(k); err != nil { // somebody adds it
		return told(err)
	}
	defer d.disks.forget(k, nil)
	return told(d.forgetKept(k, name))
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// Reload applies what has changed in the configuration file. What comes is
// opened before anything is taken away, and goes again if the rest fails. An
// export that must be closed to be changed is opened as it was if it cannot be
// opened as it shall be.
func (s service) Reload(ctx context.Context, dryRun bool) (api.Reload, error) {
	d := s.d
	d.reloading.Lock()
	defer d.reloading.Unlock()
	c, err := config.Load(d.cfg.File)
	if err != nil {
		return api.Reload{}, &api.Error{Code: api.CodeInvalid, Text: err.Error()}
	}
	change := config.Diff(d.conf.Load(), c)
	r := api.Reload{DryRun: dryRun, Changes: change.Lines()}
	switch {
	case dryRun || change.Empty():
		return r, nil
	case change.Restart():
		return api.Reload{}, &api.Error{Code: api.CodeUnsupported, Text: "a restart is needed: " + change.String()}
	}
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	if err := d.apply(ctx, c, change); err != nil {
		return api.Reload{}, told(err)
	}
	d.bus.Publish(obs.Event{Kind: obs.Reloaded, Reason: strings.Join(r.Changes, "; ")})
	return r, nil
}

// levels are the words of the configuration.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// reloadTimeout bounds a reload: each of the exports that it closes waits for
// its clients.
const reloadTimeout = 5 * time.Minute

// apply does a reload: what comes, what changes, what goes.
func (d *daemon) apply(ctx context.Context, c *config.Config, change *config.Change) (err error) {
	var undo []func()
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	if err := d.groups.set(c.Groups); err != nil {
		return err
	}
	undo = append(undo, func() { _ = d.groups.set(d.conf.Load().Groups) }) // they were valid
	rules, err := rulesOf(&c.Control)
	if err != nil {
		return err
	}
	old := d.rules.Swap(rules)
	undo = append(undo, func() { d.rules.Store(old) })
	for _, x := range change.Exports {
		if x.What != config.Add {
			continue
		}
		if err := d.addExport(ctx, *x.New, fromConfig, nil); err != nil {
			return fmt.Errorf("export %q: %w", x.Name, err)
		}
		undo = append(undo, func() { _ = d.removeExport(context.Background(), x.Name, true) })
	}
	reopen := reopened(change)
	for _, x := range change.Exports {
		if k := d.disks.find(x.Name); x.What == config.Alter && k != nil && !slices.Contains(reopen, x.Name) {
			old, err := d.exchange(k, *x.New)
			if err != nil {
				return fmt.Errorf("export %q: %w", x.Name, err)
			}
			undo = append(undo, func() { _, _ = d.exchange(k, old) }) // it was valid
		}
	}
	for _, name := range reopen {
		x, _ := exportOf(c, name) // reopened names exports of c
		if err := d.reopen(ctx, x, &undo); err != nil {
			return fmt.Errorf("export %q: %w", name, err)
		}
	}
	return d.applyListeners(ctx, c, change)
}

// exchange is change for who does not hold k.busy. It returns what was before.
func (d *daemon) exchange(k *disk, x config.Export) (old config.Export, err error) {
	k.busy.Lock()
	defer k.busy.Unlock()
	old = k.cfg
	if k.origin == fromConfig {
		if x, err = d.placed(x); err != nil {
			return old, err
		}
	}
	return old, d.change(k, x)
}

// reopened are the exports that must be closed to be changed: also those that
// get other listeners.
func reopened(change *config.Change) (list []string) {
	moved := map[string]bool{} // those that come or go have their listeners with them
	for _, x := range change.Exports {
		moved[x.Name] = x.What != config.Alter
		if x.What == config.Alter && !x.Live {
			list = append(list, x.Name)
		}
	}
	for _, l := range change.Listeners {
		if l.Export != "" && !moved[l.Export] && !slices.Contains(list, l.Export) {
			list = append(list, l.Export)
		}
	}
	return list
}

// exportOf is an export as the configuration has it.
func exportOf(c *config.Config, name string) (x config.Export, ok bool) {
	i := slices.IndexFunc(c.Exports, func(x config.Export) bool { return x.Name == name })
	if i < 0 {
		return x, false
	}
	return c.Exports[i], true
}

// reopen closes an export and opens it as x says; if that fails, as it was.
func (d *daemon) reopen(ctx context.Context, x config.Export, undo *[]func()) error {
	k := d.disks.find(x.Name)
	if k == nil {
		d.disks.dropFailed(x.Name)
		return d.addExport(ctx, x, fromConfig, nil)
	}
	old, _, _ := d.disks.look(k)
	origin := k.origin
	if err := d.removeExport(ctx, x.Name, true); err != nil {
		return err
	}
	back := func() { d.tryExport(old, origin) }
	if err := d.addExport(ctx, x, fromConfig, nil); err != nil {
		back()
		return err
	}
	*undo = append(*undo, func() {
		if d.removeExport(context.Background(), x.Name, true) == nil {
			back()
		}
	})
	return nil
}

// applyListeners makes the shared listeners what c says, and takes away the
// exports that go. From here on nothing is undone but a listener that cannot be
// opened again.
func (d *daemon) applyListeners(ctx context.Context, c *config.Config, change *config.Change) error {
	var errs []error
	for _, l := range change.Listeners {
		if l.Export != "" {
			continue
		}
		if l.What != config.Add {
			d.closeDoors(d.doors.named(l.Old.URI))
		}
		if l.What != config.Remove {
			errs = append(errs, d.share(ctx, *l.New))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	d.conf.Store(c)
	d.server.SetSlow(d.slow())
	d.logs.SetLevel(levels[c.Log.Level])
	for _, x := range change.Exports {
		if x.What != config.Remove {
			continue
		}
		d.disks.dropFailed(x.Name)
		if err := d.removeExport(ctx, x.Name, true); err != nil {
			d.log.Warn("export was not removed in good order", "export", x.Name, "error", err)
		}
	}
	return nil
}

// share opens a listener that exports share.
func (d *daemon) share(ctx context.Context, l config.Listener) error {
	list, err := d.openDoor(ctx, l)
	if err != nil {
		return err
	}
	d.doors.add(list...)
	for _, o := range list {
		d.accept(o)
	}
	return nil
}

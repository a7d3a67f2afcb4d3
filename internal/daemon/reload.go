package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// Reload applies what has changed in the configuration file, and tries again to
// open exports that have failed. What comes is opened before anything is taken
// away, and goes again if the rest fails. An export or a listener that must be
// closed to be changed is opened as it was if it cannot be opened as it shall
// be. A reload that has begun does not end with its caller, but with the daemon;
// one whose caller has left before its turn is none.
func (s service) Reload(ctx context.Context, dryRun bool) (r api.Reload, err error) {
	d := s.d
	if err := d.reloading.Wait(ctx); err != nil {
		return api.Reload{}, told(err)
	}
	defer d.reloading.Unlock()
	if !dryRun {
		defer func() { d.staleConf.Store(err != nil) }()
	}
	c, err := config.Load(d.cfg.File)
	if err != nil {
		return api.Reload{}, &api.Error{Code: api.CodeInvalid, Text: err.Error()}
	}
	c.SpellAs(d.conf.Load())
	if !dryRun { // before mayDrop and mayTake look at what the API has added
		d.coming.Store(c)
		defer d.coming.Store(nil)
	}
	change, err := d.compare(c)
	if err != nil {
		return api.Reload{}, err
	}
	r, retries := api.Reload{DryRun: dryRun, Changes: change.Lines(), Restart: change.Restart()}, d.retries(c, change)
	if reordered(d.conf.Load(), c) {
		r.Changes = append(r.Changes, "change the order of exports")
	}
	if encrypts(c) && !d.canEncrypt() {
		r.Changes, r.Restart = append(r.Changes, "read certificates: needs a restart"), true
	}
	switch {
	case r.Restart && dryRun:
		r.Changes = append(r.Changes, retries...)
		return r, nil
	case r.Restart:
		return api.Reload{}, &api.Error{Code: api.CodeUnsupported, Text: "a restart is needed: " + strings.Join(r.Changes, "; ")}
	}
	if err := d.mayReopen(change); err != nil {
		return api.Reload{}, told(err)
	}
	secrets, takeSecrets, err := d.readSecrets(dryRun)
	if err != nil {
		return api.Reload{}, &api.Error{Code: api.CodeInvalid, Text: err.Error()}
	}
	if dryRun {
		r.Changes = append(append(r.Changes, retries...), secrets...)
		return r, nil
	}
	if len(r.Changes)+len(retries) == 0 {
		takeSecrets()
	} else if err := d.applyAll(c, change, takeSecrets, &r); err != nil {
		return api.Reload{}, told(err)
	}
	r.Changes = append(r.Changes, d.tellDefaults()...)
	if r.Changes = append(r.Changes, secrets...); len(r.Changes) > 0 {
		d.bus.Publish(obs.Event{Kind: obs.Reloaded, Reason: tellChanges(r.Changes)})
	}
	return r, nil
}

// compare is what c, as it was read, would change, if that may be.
func (d *daemon) compare(c *config.Config) (*config.Change, error) {
	change := config.Diff(d.conf.Load(), c)
	change.AddAbsent(c, func(name string) bool { return d.disks.get(name) == nil })
	d.openLost(change)
	if err := d.mayDrop(change); err != nil {
		return nil, err
	}
	return change, told(cmp.Or(d.mayTake(change), d.mayFollow(change)))
}

// applyAll applies a change, and tries the exports again that have failed; r gets
// what becomes of them.
func (d *daemon) applyAll(c *config.Config, change *config.Change, takeSecrets func(), r *api.Reload) error {
	ctx, cancel := context.WithTimeout(d.stopping, reloadTimeout)
	defer cancel()
	lost, err := d.apply(ctx, c, change, takeSecrets)
	if err != nil {
		return err
	}
	r.Changes = append(r.Changes, lost...)
	for _, name := range d.retry(ctx, func(error) bool { return true }) {
		r.Changes = append(r.Changes, d.outcome(name)...)
	}
	return nil
}

// tellChanges is the text of the event of a reload, which may have changed
// everything.
func tellChanges(all []string) string {
	if n := limits.ReloadTold; len(all) > n {
		return fmt.Sprintf("%d changes: %s; and %d more", len(all), strings.Join(all[:n], "; "), len(all)-n)
	}
	return strings.Join(all, "; ")
}

// openLost makes a change of an export that has failed while it was open, whatever
// changes, one for which it is closed and opened again.
func (d *daemon) openLost(change *config.Change) {
	for i := range change.Exports {
		x := &change.Exports[i]
		k := d.disks.find(x.Name)
		if x.What != config.Alter || k == nil {
			continue
		}
		if _, _, failed := d.disks.look(k); failed != nil {
			x.Live = false
		}
	}
}

// mayDrop refuses to remove a rate group that an export uses which does not come
// from the configuration: if it is kept, a restart could not open it.
func (d *daemon) mayDrop(change *config.Change) error {
	for _, g := range change.Groups {
		if g.What != config.Remove {
			continue
		}
		if name, used := d.disks.usesGroup(g.Name); used {
			return &api.Error{Code: api.CodeInUse, Text: fmt.Sprintf("rate group %q cannot be removed: export %q, which was added by the control API, is in it", g.Name, name)}
		}
	}
	return nil
}

// mayTake refuses to add or to change an export whose name one of the control API
// has, in its keys or its listeners.
func (d *daemon) mayTake(change *config.Change) error {
	names := reopened(change)
	for _, x := range change.Exports {
		if x.What != config.Remove {
			names = append(names, x.Name)
		}
	}
	for _, name := range names {
		if k := d.disks.get(name); k != nil && d.disks.originOf(k) != fromConfig {
			return fmt.Errorf("export %q: %w", name, errTaken)
		}
	}
	return nil
}

// levels are the words of the configuration.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// reloadTimeout bounds a reload: each of the exports that it closes waits for
// its clients.
const reloadTimeout = 5 * time.Minute

// reload is one that is under way.
type reload struct {
	d      *daemon
	c      *config.Config          // as it shall be
	change *config.Change          // without last
	last   []config.ExportChange   // see splitDefault
	undo   []func(context.Context) // of what is done, in its order
	opened []undoing               // of the exports that are open by it, in their order
	fresh  []*door                 // open; nothing is accepted at them before the end
	late   []config.ListenerChange // added ones whose addresses were in use
	hiding []*door                 // see hide
	over   []func()                // what is called when nothing is undone any more
	since  uint64                  // see export.Registry.Review
	rules  *server.Rules           // of the control API as it shall be

	takeSecrets func() // see readSecrets
}

// apply does a reload: what comes, what changes, and when all that is done, what
// goes. If a step fails, those before it are undone. It returns a line for each export
// that has gone without its last writes.
func (d *daemon) apply(ctx context.Context, c *config.Config, change *config.Change, takeSecrets func()) (lost []string, err error) {
	r := &reload{d: d, c: c, takeSecrets: takeSecrets, since: d.exports.Begun()}
	r.change, r.last = splitDefault(change)
	for _, step := range [...]func(context.Context) error{
		r.hideEarly, r.restoreDefault, r.closeLate, r.setRates, r.readRules, r.addListeners, r.addExports, r.changeExports, r.reopenExports, r.passDefault, r.changeListeners,
	} {
		err := ctx.Err()
		if err == nil {
			err = step(ctx)
		}
		if err != nil {
			r.takeBack()
			r.end()
			return nil, err
		}
	}
	return r.finish(ctx), nil
}

// end is when what was done stays, or was undone.
func (r *reload) end() {
	r.d.disks.confirm()
	for _, f := range r.over {
		f()
	}
}

func (r *reload) onError(undo func(context.Context)) { r.undo = append(r.undo, undo) }

func (r *reload) setRates(context.Context) error {
	undo, err := r.d.groups.set(r.c.Groups)
	if err == nil {
		r.onError(func(context.Context) { undo() })
	}
	return err
}

// readRules looks up who may use the control API in the end: what was done by it in
// the meantime could not be undone.
func (r *reload) readRules(context.Context) (err error) {
	r.rules, err = rulesOf(&r.c.Control)
	return err
}

func (r *reload) addExports(ctx context.Context) error {
	var list []*disk
	for _, x := range r.change.Exports {
		if x.What == config.Add {
			list = append(list, &disk{cfg: *x.New, origin: fromConfig, trial: true})
		}
	}
	undo, err := r.d.addAll(ctx, list)
	r.opened = append(r.opened, undo...)
	return err
}

// addAll opens exports that are not open: none, unless the storage of all answers and
// nobody else has an image of them. It returns what takes back what it has done, also
// with an error; one that had failed before is that again.
func (d *daemon) addAll(ctx context.Context, list []*disk) (undo []undoing, err error) {
	all := d.filesOf(list)
	defer func() {
		for _, g := range all {
			g.close()
		}
	}()
	for i, g := range all {
		if g.settled() {
			return nil, fmt.Errorf("export %q: %w", list[i].cfg.Name, g.err)
		}
	}
	for _, k := range list {
		name, failed := k.cfg.Name, k.again
		k.fresh = true
		if err := d.addDisk(ctx, k, nil); err != nil {
			return undo, fmt.Errorf("export %q: %w", name, err)
		}
		undo = append(undo, func(ctx context.Context) func() {
			_ = d.retire(ctx, k, failed) // it was not there before
			return func() {}
		})
	}
	return undo, nil
}

// changeExports changes those that stay open.
func (r *reload) changeExports(ctx context.Context) error {
	reopen := reopened(r.change)
	for i := range r.change.Exports {
		x := &r.change.Exports[i]
		if x.What != config.Alter || slices.Contains(reopen, x.Name) {
			continue
		}
		if err := r.changeOpen(ctx, x); err != nil {
			return err
		}
	}
	return nil
}

// changeOpen changes one that stays open, if it is: retry opens what has failed.
func (r *reload) changeOpen(ctx context.Context, x *config.ExportChange) error {
	k := r.d.disks.find(x.Name)
	if k == nil {
		return nil
	}
	old, now, err := r.d.exchange(ctx, k, x.On)
	if err != nil {
		return fmt.Errorf("export %q: %w", x.Name, err)
	}
	r.onError(func(ctx context.Context) {
		_, _, err := r.d.exchange(ctx, k, func(live *config.Export) config.Export { return config.TakenBack(&old, &now, live) })
		r.d.tellChanged(k, x, err) // it was valid: the export is being changed
	})
	return nil
}

// reopenExports changes those that must be closed for it.
func (r *reload) reopenExports(ctx context.Context) error {
	var list []config.ExportChange
	for _, name := range reopened(r.change) {
		i := slices.IndexFunc(r.change.Exports, func(x config.ExportChange) bool { return x.Name == name })
		if i >= 0 {
			list = append(list, r.change.Exports[i])
			continue
		}
		x, _ := exportOf(r.c, name) // reopened names exports of both
		old, _ := exportOf(r.d.conf.Load(), name)
		list = append(list, config.ExportChange{Name: name, Old: &old, New: &x})
	}
	undo, over, err := r.d.reopen(ctx, list...)
	r.opened, r.over = append(r.opened, undo...), append(r.over, over)
	return err
}

// finish makes the new configuration the one that is served, for those who came
// meanwhile too, and takes away what goes. It cannot fail: it returns a line for each
// export that has gone without its last writes, which is logged too.
func (r *reload) finish(ctx context.Context) (lost []string) {
	d := r.d
	r.takeSecrets()
	d.rules.Store(r.rules)
	for _, o := range r.fresh {
		d.accept(o)
	}
	d.conf.Store(r.c)
	d.arrange(r.c)
	d.groups.keep(r.c.Groups)
	d.server.SetSlow(d.slow())
	if !d.cfg.Verbose {
		d.logs.SetLevel(levels[r.c.Log.Level])
	}
	for _, l := range r.listeners(config.Remove) {
		d.closeDoors(d.doors.sharedAt(l.Place))
	}
	r.hideNoMore()
	r.end()
	d.exports.Review(r.since)
	for _, x := range r.change.Exports {
		if x.What != config.Remove {
			continue
		}
		switch k := d.disks.get(x.Name); {
		case k == nil || d.disks.originOf(k) != fromConfig: // another has taken the name
		case !d.disks.opened(k):
			d.release(k, x.Name, nil)
			d.freePlace(x.Name)
		default:
			if err := d.retire(ctx, k, nil); err != nil {
				lost = append(lost, errLastLost(x.Name, err).Error())
			}
		}
	}
	return lost
}

// retries are the lines of a dry run for what a reload to c tries to open again: not
// what has failed while it was open, which has to be removed first, or changed.
func (d *daemon) retries(c *config.Config, change *config.Change) (lines []string) {
	for _, k := range d.disks.failed() {
		x, now, _ := d.disks.look(k)
		_, mine := d.wanted(c, k)
		changed := slices.ContainsFunc(change.Exports, func(c config.ExportChange) bool { return c.Name == x.Name })
		if now == nil && mine && (!changed || k.origin != fromConfig) {
			lines = append(lines, fmt.Sprintf("try export %q again", x.Name))
		}
	}
	return lines
}

// outcome is the line for an export that was tried again, unless it was removed
// meanwhile.
func (d *daemon) outcome(name string) []string {
	k := d.disks.get(name)
	if k == nil {
		return nil
	}
	switch _, now, failed := d.disks.look(k); {
	case failed != nil:
		return []string{fmt.Sprintf("export %q still fails: %v", name, failed)}
	case now == nil: // another that is being opened
		return nil
	}
	return []string{fmt.Sprintf("export %q is open", name)}
}

// wanted is another attempt at k, which failed, with the configuration c, if there is to
// be one: c has it, or it is kept and c has no other of its name.
func (d *daemon) wanted(c *config.Config, k *disk) (next *disk, ok bool) {
	x, _, _ := d.disks.look(k)
	next = &disk{cfg: x, origin: k.origin, lost: d.disks.lostBy(k), again: k}
	configured, both := exportOf(c, x.Name)
	if k.origin == fromConfig {
		next.cfg, next.writes = k.asSet(configured), !configured.ReadOnly
		return next, both
	}
	return next, !both
}

// retry tries to open what could not be opened for a reason that may have gone, and
// names all that it has tried. With d.reloading.
func (d *daemon) retry(ctx context.Context, gone func(why error) bool) (tried []string) {
	var again []*disk
	for _, k := range d.disks.failed() {
		x, now, why := d.disks.look(k)
		next, known := d.wanted(d.conf.Load(), k)
		if known && now == nil && !d.disks.isLate(x.Name) && gone(why) {
			again = append(again, next)
			tried = append(tried, x.Name)
		}
	}
	d.tryAll(ctx, again)
	return tried
}

// retryLocked is a step of the start: it has the exports tried again whose images
// were locked, while the others are served. A daemon that has changed its user may
// have no right to open them again, and would hide why they failed.
func (d *daemon) retryLocked() error {
	if !d.served() || d.cfg.User != "" || d.cfg.Group != "" {
		return nil
	}
	d.accepted.Go(func() {
		for tries := 0; tries < limits.LockedRetries; {
			select {
			case <-time.After(limits.LockedRetryWait):
			case <-d.stopping.Done():
				return
			}
			if !d.reloading.TryLock() {
				continue // a reload, which may take long and would not end with this one
			}
			tried := d.retry(d.stopping, func(why error) bool { return errors.Is(why, backing.ErrLocked) })
			d.reloading.Unlock()
			if len(tried) == 0 {
				return
			}
			tries++
		}
	})
	return nil
}

// retire is removeExport that cannot fail. It logs why the export, which is away, was
// not closed in good order, and returns that. Where clients hold it up beyond ctx, it is
// done when they have left, and where storage does, when that answers.
func (d *daemon) retire(ctx context.Context, k, instead *disk) error {
	x, _, _ := d.disks.look(k)
	name := x.Name
	err := d.closeInTime(ctx, k, name, func() error { return d.removeExport(ctx, k, instead) }, func(err error) { d.tellRetired(name, err) })
	switch {
	case displaced(err):
		return nil
	case errors.Is(err, errLate):
		d.log.Warn("export is removed when its storage answers", "export", name)
		return nil
	case !errors.Is(err, export.ErrInUse):
		d.tellRetired(name, err)
		return err
	case d.stopping.Err() != nil:
		d.tellRetired(name, err)
		return nil
	}
	if instead != nil {
		d.disks.setParting(k)
	}
	d.log.Warn("export is removed when its clients have left", "export", name)
	d.closing.Go(func() { d.tellRetired(name, d.removeExport(d.stopping, k, instead)) })
	return nil
}

// displaced tells that nothing was done to an export because somebody else has
// removed it.
func displaced(err error) bool { return errors.Is(err, errAway) || errors.Is(err, errTaken) }

func (d *daemon) tellRetired(name string, err error) {
	if err != nil && !displaced(err) {
		d.log.Warn("export was not removed in good order", "export", name, "error", err)
	}
}

// exchange is change for who does not hold k.busy: to is what becomes of an export
// of the configuration. It returns what was before, and what is now. Another that has
// taken the name of k stays as it is: errAway or errTaken.
func (d *daemon) exchange(ctx context.Context, k *disk, to func(live *config.Export) config.Export) (old, now config.Export, err error) {
	if err := k.busy.Wait(ctx); err != nil {
		return old, now, fmt.Errorf("%w: it is being changed: %w", export.ErrInUse, err)
	}
	defer k.busy.Unlock()
	old = k.stack.live(k.cfg)
	if k.origin != fromConfig {
		return old, now, errTaken
	}
	if err := d.disks.stillHas(old.Name, k); err != nil {
		return old, now, err
	}
	if err := d.mayChange(k, old.Name); err != nil {
		return old, now, err
	}
	if now, err = d.placed(to(&old)); err != nil {
		return old, now, err
	}
	if err := d.change(k, now); err != nil {
		return old, now, err
	}
	if now.Threshold() != old.Threshold() {
		k.stack.threshold.Set(now.Threshold())
	}
	return old, now, nil
}

// errTaken is for an export of the configuration that cannot be changed: it had
// failed or was removed, and another has its name.
var errTaken = fmt.Errorf("%w: one of the control API has taken the name", export.ErrExists)

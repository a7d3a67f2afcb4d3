package daemon

import (
	"context"
	"fmt"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// splitDefault takes out of a change that an export is the default no more, which
// comes last: before another is, the empty name would open a third disk. What is
// left has that export stay the default, if it is.
func splitDefault(change *config.Change) (first *config.Change, last []config.ExportChange) {
	c := *change
	c.Exports = slices.Clone(c.Exports)
	for i := range c.Exports {
		x := &c.Exports[i]
		if x.What != config.Alter || !x.Old.Default || x.New.Default {
			continue
		}
		stays := *x.New
		stays.Default = true
		last = append(last, config.ExportChange{What: x.What, Name: x.Name, Old: &stays, New: x.New, Fields: []string{"default"}, Live: true})
		x.New = &stays
		x.Fields = slices.DeleteFunc(slices.Clone(x.Fields), func(key string) bool { return key == "default" })
	}
	return &c, last
}

// restoreDefault is the step of a reload whose undoing, the last, makes the export the
// default that was it last: an export that is made what it was comes after it. What the
// control API has chosen since is the last.
func (r *reload) restoreDefault(context.Context) error {
	d := r.d
	before := d.chosen.Load() // before last, which it may be then
	last, ok := d.exports.Default()
	r.onError(func(context.Context) {
		if ok {
			d.exports.Choose(last)
		}
		if since := d.chosen.Load(); since != before {
			d.exports.Choose(*since)
		}
	})
	return nil
}

// choose makes an export that says it is the default the last that was made so, for the
// control API.
func (d *daemon) choose(name string) {
	d.chosen.Store(&name)
	d.exports.Choose(name)
}

// passDefault is the step of a reload after which who was the default is it no more:
// who shall be it is by now, or has its place.
func (r *reload) passDefault(ctx context.Context) error {
	r.awaitDefault()
	for i := range r.last {
		if err := r.changeOpen(ctx, &r.last[i]); err != nil {
			return err
		}
	}
	return nil
}

// awaitDefault has the empty name wait for what shall be the default, if that has
// failed: it is tried again when the reload is over.
func (r *reload) awaitDefault() {
	d := r.d
	i := slices.IndexFunc(r.c.Exports, func(x config.Export) bool { return x.Default })
	if i < 0 {
		return
	}
	x := r.c.Exports[i]
	k := d.disks.get(x.Name)
	if k == nil {
		return
	}
	if _, now, failed := d.disks.look(k); now != nil || failed == nil {
		return
	}
	wait := func(k *disk) {
		d.keepPlace(k)
		d.freePlace(x.Name) // it may have been removed
	}
	wait(&disk{cfg: x, origin: fromConfig})
	r.onError(func(context.Context) { wait(k) })
}

// arrange puts the exports of a configuration in its order, as a start with it does.
func (d *daemon) arrange(c *config.Config) {
	var names []string
	for i := range c.Exports {
		names = append(names, c.Exports[i].Name)
	}
	d.exports.Arrange(names...)
}

// reordered tells whether exports that are in both configurations are in another
// order in the second.
func reordered(old, new *config.Config) bool {
	same := func(a, b config.Export) bool { return a.Name == b.Name }
	return !slices.EqualFunc(inBoth(old.Exports, new.Exports), inBoth(new.Exports, old.Exports), same)
}

// inBoth are those of list whose names an export of others has.
func inBoth(list, others []config.Export) []config.Export {
	names := map[string]bool{}
	for i := range others {
		names[others[i].Name] = true
	}
	return slices.DeleteFunc(slices.Clone(list), func(x config.Export) bool { return !names[x.Name] })
}

// yieldDefaults has one default at most of the exports that the control API has made,
// the last that was made it, in their files too: a start makes each the default that
// says so, in the order in which they were made. It does not end with its caller.
// What it could not do it does when it is called again.
func (d *daemon) yieldDefaults() (failed []error) {
	ctx, cancel := context.WithTimeout(d.stopping, openTimeout)
	defer cancel()
	for _, k := range d.disks.all() {
		if err := d.yieldDefault(ctx, k); err != nil {
			x, _, _ := d.disks.look(k)
			failed = append(failed, fmt.Errorf("export %q is %s: %w", x.Name, stillDefault, err))
		}
	}
	return failed
}

// stillDefault is what an export is that has not yielded.
const stillDefault = "still a default, and may be it after a restart"

// tellDefaults is yieldDefaults for who has done by then what was asked for: it logs
// what failed, and returns a line for each.
func (d *daemon) tellDefaults() (lines []string) {
	for _, err := range d.yieldDefaults() {
		d.log.Error("the empty name may open another disk after a restart", "error", err)
		lines = append(lines, err.Error())
	}
	return lines
}

// yieldDefault is yieldDefaults for one of them.
func (d *daemon) yieldDefault(ctx context.Context, k *disk) error {
	if !d.yields(k) {
		return nil
	}
	if err := k.busy.Wait(ctx); err != nil {
		return err
	}
	defer k.busy.Unlock()
	if !d.yields(k) {
		return nil
	}
	x := k.cfg
	x.Default = false
	if err := d.rewrite(k, x); err != nil {
		return err
	}
	d.exports.Yield(x.Name)
	d.disks.mu.Lock()
	defer d.disks.mu.Unlock()
	k.cfg.Default = false
	return nil
}

// yields tells whether k is one of the control API that says it is the default, and
// another was made it later. One that is being opened will be the last.
func (d *daemon) yields(k *disk) bool {
	x, now, failed := d.disks.look(k)
	if origin := d.disks.originOf(k); origin != fromAPI && origin != fromState || now == nil && failed == nil {
		return false
	}
	last, _ := d.exports.Default()
	return x.Default && x.Name != last && d.disks.get(x.Name) == k
}

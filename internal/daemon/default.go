package daemon

import (
	"context"
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
		last = append(last, config.ExportChange{What: x.What, Name: x.Name, Old: x.Old, New: x.New, Fields: []string{"default"}, Live: true})
		stays := *x.New
		stays.Default = true
		x.New = &stays
		x.Fields = slices.DeleteFunc(slices.Clone(x.Fields), func(key string) bool { return key == "default" })
	}
	return &c, last
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

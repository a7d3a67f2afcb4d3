package daemon

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// listeners are the changes of one kind to the listeners that exports share.
// Those of one export come and go with it.
func (r *reload) listeners(what config.What) (list []config.ListenerChange) {
	for _, l := range r.change.Listeners {
		if l.What == what && l.Export == "" {
			list = append(list, l)
		}
	}
	return list
}

// hideEarly is the first step: until the reload is over, or all of it is undone, the
// listeners that were there show nothing of it that they do not show as they shall be.
// Who has opened an export keeps it, so that nobody may find one meanwhile by a listener
// that is narrowed or closed in the end.
func (r *reload) hideEarly(context.Context) error {
	r.onError(func(context.Context) { r.hideNoMore() })
	for _, l := range r.change.Listeners {
		if l.What != config.Add && l.Export == "" {
			r.hide(l, r.d.doors.sharedAt(l.Place))
		}
	}
	return nil
}

// hide has doors of a listener as it was hide what the reload adds or changes, but for
// what the listener goes on to show where it stays open.
func (r *reload) hide(l config.ListenerChange, doors []*door) {
	names := reopened(r.change)
	for _, x := range r.change.Exports {
		if x.What != config.Remove {
			names = append(names, x.Name)
		}
	}
	if l.What == config.Alter && l.Live {
		names = slices.DeleteFunc(names, func(name string) bool {
			return len(l.New.Exports) == 0 || slices.Contains(l.New.Exports, name)
		})
	}
	for _, o := range doors {
		o.scope.Hide(names...)
	}
	r.hiding = append(r.hiding, doors...)
}

// hideNoMore is the end of hide.
func (r *reload) hideNoMore() {
	for _, o := range r.hiding {
		o.scope.Hide()
	}
}

// addListeners opens the listeners that come. Where another one goes, an address
// that is in use has a second try when that is closed.
func (r *reload) addListeners(ctx context.Context) error {
	goes := slices.ContainsFunc(r.change.Listeners, func(l config.ListenerChange) bool { return l.What == config.Remove })
	for _, l := range r.listeners(config.Add) {
		switch err := r.share(ctx, l); {
		case goes && errors.Is(err, unix.EADDRINUSE):
			r.late = append(r.late, l)
		case err != nil:
			return err
		}
	}
	return nil
}

// share opens a listener as it shall be; it is closed if the reload fails.
func (r *reload) share(ctx context.Context, l config.ListenerChange) error {
	list, err := r.d.share(ctx, l.Place, *l.New)
	if err != nil {
		return err
	}
	r.fresh = append(r.fresh, list...)
	r.onError(func(context.Context) { r.d.closeDoors(list) })
	return nil
}

// changeListeners changes the listeners that stay. It is the last step that can
// fail, since those who are about to connect may notice that one is closed for a
// moment.
func (r *reload) changeListeners(ctx context.Context) error {
	for _, l := range r.listeners(config.Alter) {
		if l.Live {
			r.show(l)
			continue
		}
		r.close(l)
		if err := r.share(ctx, l); err != nil {
			return err
		}
	}
	if len(r.late) == 0 {
		return nil
	}
	for _, l := range r.listeners(config.Remove) {
		r.close(l)
	}
	for _, l := range r.late {
		if err := r.share(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// show changes which exports can be found at a listener.
func (r *reload) show(l config.ListenerChange) {
	show := func(exports []string) {
		for _, o := range r.d.doors.sharedAt(l.Place) {
			o.show(exports)
		}
	}
	show(l.New.Exports)
	r.onError(func(context.Context) { show(l.Old.Exports) })
}

// close closes a listener; it is opened again as it was if the reload fails, and who
// has opened an export by it meanwhile keeps that.
func (r *reload) close(l config.ListenerChange) {
	closed := r.d.doors.sharedAt(l.Place)
	r.d.closeDoors(closed)
	r.onError(func(ctx context.Context) {
		list, err := r.d.share(ctx, l.Place, *l.Old)
		if err != nil {
			r.d.log.Error("listener cannot be opened again, the next reload tries it", "listener", l.Old.URI, "error", err)
			r.d.lose(l.Place)
			return
		}
		r.hide(l, list)
		for _, o := range closed { // until the uses were reviewed
			o.show(l.Old.Exports)
			r.over = append(r.over, func() { o.scope.Show() })
		}
		for _, o := range list {
			r.d.accept(o)
		}
	})
}

// lose takes a listener that is closed out of the configuration that is served, so
// that it is a change to have it.
func (d *daemon) lose(place config.Place) {
	old := d.conf.Load()
	c := *old
	c.Listeners = nil
	for p, l := range old.Shared() {
		if p != place {
			c.Listeners = append(c.Listeners, *l)
		}
	}
	d.conf.Store(&c)
	d.doors.lost(place)
}

// share opens a listener that exports share. Nothing is accepted yet.
func (d *daemon) share(ctx context.Context, place config.Place, l config.Listener) ([]*door, error) {
	list, err := d.openDoor(ctx, l, false)
	if err != nil {
		return nil, err
	}
	for _, o := range list {
		o.place = place
	}
	d.doors.add(list...)
	return list, nil
}

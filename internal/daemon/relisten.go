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

// addListeners opens the listeners that come. Where another one goes, an address
// that is in use has a second try when that is closed.
func (r *reload) addListeners(ctx context.Context) error {
	goes := slices.ContainsFunc(r.change.Listeners, func(l config.ListenerChange) bool { return l.What == config.Remove })
	for _, l := range r.listeners(config.Add) {
		switch err := r.share(ctx, *l.New); {
		case goes && errors.Is(err, unix.EADDRINUSE):
			r.late = append(r.late, *l.New)
		case err != nil:
			return err
		}
	}
	return nil
}

// share opens a listener; it is closed if the reload fails.
func (r *reload) share(ctx context.Context, l config.Listener) error {
	list, err := r.d.share(ctx, l)
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
		r.close(*l.Old)
		if err := r.share(ctx, *l.New); err != nil {
			return err
		}
	}
	if len(r.late) == 0 {
		return nil
	}
	for _, l := range r.listeners(config.Remove) {
		r.close(*l.Old)
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
		for _, o := range r.d.doors.sharedAt(l.Old.URI) {
			o.show(exports)
		}
	}
	show(l.New.Exports)
	r.onError(func(context.Context) { show(l.Old.Exports) })
}

// close closes a listener; it is opened again if the reload fails.
func (r *reload) close(l config.Listener) {
	r.d.closeDoors(r.d.doors.sharedAt(l.URI))
	r.onError(func(ctx context.Context) {
		list, err := r.d.share(ctx, l)
		if err != nil {
			r.d.log.Error("listener cannot be opened again, the next reload tries it", "listener", l.URI, "error", err)
			r.d.lose(l)
			return
		}
		for _, o := range list {
			r.d.accept(o)
		}
	})
}

// lose takes a listener out of the configuration that is served, so that it is
// a change to have it.
func (d *daemon) lose(l config.Listener) {
	c := *d.conf.Load()
	i := slices.IndexFunc(c.Listeners, func(o config.Listener) bool { return o.URI == l.URI })
	if i >= 0 {
		c.Listeners = slices.Delete(slices.Clone(c.Listeners), i, i+1)
		d.conf.Store(&c)
	}
}

// share opens a listener that exports share. Nothing is accepted yet.
func (d *daemon) share(ctx context.Context, l config.Listener) ([]*door, error) {
	list, err := d.openDoor(ctx, l, false)
	if err != nil {
		return nil, err
	}
	d.doors.add(list...)
	return list, nil
}

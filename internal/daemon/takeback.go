package daemon

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// undoing takes back that a reload has opened an export: it closes that, waiting for
// its clients until ctx ends, and returns what opens it as it was, if it was open.
type undoing func(ctx context.Context) (back func())

// takeBack undoes what was done, each step with openTimeout of its own, however long
// others have waited, for those who came meanwhile too. A daemon that stops takes down
// all there is, so that nothing has to come back.
func (r *reload) takeBack() {
	for _, undo := range slices.Backward(r.undo) {
		if r.d.stopping.Err() != nil {
			return
		}
		ctx, cancel := context.WithTimeout(r.d.stopping, openTimeout)
		undo(ctx)
		cancel()
	}
	r.d.exports.Review(r.since)
}

// closeLate is the step of a reload whose undoing takes back what it has opened. The
// undoing of the steps after it waits for no client, and comes first: nobody has what
// a grant gives that is taken back for as long as a client of another export takes.
func (r *reload) closeLate(context.Context) error {
	r.onError(r.takeBackExports)
	return nil
}

// takeBackExports takes back the exports that were opened. All close at the same time,
// so that ctx bounds how long the clients of all are waited for. None is opened as it
// was before all are closed, but for those that are late, which come back by themselves:
// it may need an address or an image that another has.
func (r *reload) takeBackExports(ctx context.Context) {
	back := make([]func(), len(r.opened))
	var closing sync.WaitGroup
	for i, undo := range r.opened {
		closing.Go(func() { back[i] = undo(ctx) })
	}
	closing.Wait()
	for _, back := range slices.Backward(back) {
		back()
	}
}

// tellChanged tells what has kept a reload that is taken back from making k what it was
// before the change x. If k goes on as it is, the next reload finds that it is not what
// the configuration says.
func (d *daemon) tellChanged(k *disk, x *config.ExportChange, err error) {
	switch {
	case err == nil || displaced(err) || errors.Is(err, errLate): // closeFor has told of that
	case d.disks.find(x.Name) != k: // it has gone, in bad order
		d.tellRetired(x.Name, err)
	default:
		d.log.Error("export stays changed, the next reload tries it", "export", x.Name, "error", err)
		d.stays(x)
	}
}

// stays takes a change of an export, which was not taken back, into the configuration
// that is served, so that it is a change to have the export as it was.
func (d *daemon) stays(x *config.ExportChange) {
	c := *d.conf.Load()
	i := slices.IndexFunc(c.Exports, func(old config.Export) bool { return old.Name == x.Name })
	if i < 0 {
		return
	}
	c.Exports = slices.Clone(c.Exports)
	c.Exports[i] = config.TakenBack(x.New, x.Old, &c.Exports[i])
	d.conf.Store(&c)
}

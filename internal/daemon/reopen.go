package daemon

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

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
	return named(c.Exports, name)
}

// named is the export of list that is called name.
func named(list []config.Export, name string) (x config.Export, ok bool) {
	i := slices.IndexFunc(list, func(x config.Export) bool { return x.Name == name })
	if i < 0 {
		return x, false
	}
	return list[i], true
}

// reopening is an export that is to be closed and opened as next says. Until end
// nobody changes it, or pauses it.
type reopening struct {
	d            *daemon
	k            *disk
	change       *config.ExportChange
	next, before *disk // others of its name, with their files: before is as k is, with those that k has open
	late         bool  // before is that of closeFor
}

// reopen closes exports and opens them as list says; one that is not open is
// opened. None is closed before the files of all are open. It returns what takes
// back what it has done, also with an error: an export that cannot be opened is
// opened as it was. over, which is never nil, is to be called when nothing is taken
// back any more.
func (d *daemon) reopen(ctx context.Context, list ...config.ExportChange) (undo []undoing, over func(), err error) {
	var away []*disk
	var all []*reopening
	over = func() {
		for _, r := range all {
			d.reveal(r.change.Name, r.next)
			r.letGo()
		}
		for _, k := range away {
			x, _, _ := d.disks.look(k)
			d.reveal(x.Name, k)
		}
	}
	defer func() {
		for _, r := range all {
			r.end()
		}
	}()
	for _, x := range list {
		k := d.disks.get(x.Name)
		switch {
		case k != nil && d.disks.originOf(k) != fromConfig:
			err = errTaken
		case d.disks.isLate(x.Name):
			err = errLate
		case k == nil || !d.disks.opened(k):
			away = append(away, &disk{cfg: k.asSet(*x.New), origin: fromConfig, writes: !x.New.ReadOnly, lost: d.disks.lostBy(k), again: k, trial: true})
		default:
			var r *reopening
			if r, err = d.beginReopen(ctx, k, x); err == nil {
				all = append(all, r)
			}
		}
		if err != nil {
			return nil, over, fmt.Errorf("export %q: %w", x.Name, err)
		}
	}
	if err := d.gatherReopened(ctx, all); err != nil {
		return nil, over, err
	}
	if undo, err = d.addAll(ctx, away); err != nil {
		return undo, over, err
	}
	slices.SortStableFunc(all, hiddenLast)
	for _, r := range all {
		back, err := r.reopen(ctx)
		if err != nil {
			return undo, over, fmt.Errorf("export %q: %w", r.next.cfg.Name, err)
		}
		undo = append(undo, back)
	}
	return undo, over, nil
}

// errPaused is for an export that the API has paused: the pause would be over.
var errPaused = fmt.Errorf("%w: it is paused, and has to be closed for what changes", export.ErrInUse)

// mayReopen refuses what beginReopen would by now, for a dry run to tell of it.
func (d *daemon) mayReopen(change *config.Change) error {
	for _, name := range reopened(change) {
		if k := d.disks.get(name); k != nil && d.disks.opened(k) && d.disks.held(k) {
			return fmt.Errorf("export %q: %w", name, errPaused)
		}
	}
	return nil
}

// beginReopen refuses an export that is paused, and one that somebody else is removing.
func (d *daemon) beginReopen(ctx context.Context, k *disk, change config.ExportChange) (*reopening, error) {
	if err := k.leave(ctx, false); err != nil {
		return nil, fmt.Errorf("%w: it is being changed: %w", export.ErrInUse, err)
	}
	live, _, _ := d.disks.look(k)
	err := d.disks.stillHas(live.Name, k)
	if err == nil && d.disks.held(k) {
		err = errPaused
	}
	if err == nil && k.goes() {
		err = fmt.Errorf("%w: it is being removed", export.ErrInUse)
	}
	if err != nil {
		k.stay(false)
		return nil, err
	}
	next := &disk{cfg: change.On(&live), origin: fromConfig, writes: !change.New.ReadOnly, trial: true}
	return &reopening{d: d, k: k, change: &change, next: next, before: d.likeness(k)}, nil
}

// gatherReopened opens the files of exports that are to be opened anew, and takes
// up those that they have open, for the case that it fails.
func (d *daemon) gatherReopened(ctx context.Context, all []*reopening) error {
	list := make([]sought, len(all))
	for i, r := range all {
		var err error
		if list[i], err = r.seek(ctx); err != nil {
			return fmt.Errorf("export %q: %w", r.next.cfg.Name, err)
		}
	}
	var first error
	for i, g := range d.gatherAll(list) {
		r := all[i]
		r.next.files = g.table
		if g.err == nil {
			g.err = r.handOver(&list[i])
		}
		if g.err != nil && first == nil {
			first = fmt.Errorf("export %q: %w", r.next.cfg.Name, g.err)
		}
	}
	return first
}

// hiddenLast orders exports so that those which are hidden are closed last: nobody finds
// them from then on until all is done.
func hiddenLast(a, b *reopening) int {
	switch {
	case a.next.hidden == b.next.hidden:
		return 0
	case b.next.hidden:
		return -1
	}
	return 1
}

// reveal is the end of disk.hidden for k, which may be away.
func (d *daemon) reveal(name string, k *disk) {
	d.exports.Reveal(name, k)
	d.disks.mu.Lock()
	k.hidden = false
	d.disks.mu.Unlock()
	d.tellState(name)
}

// handOver has r.next, which is to be opened as x says, go on with what r.k has in
// memory and in its overlay: that of a disk of other bytes is of no use to it. If r.next
// keeps what is written in another place than r.k, it is hidden: the clients of the one
// would miss that in the other.
func (r *reopening) handOver(x *sought) (err error) {
	if !hasFiles(&x.Export) {
		r.next.files, err = open.Again(r.k.stack.dev, nil, nil)
	}
	same := sameBelow(&r.before.cfg, x, r.next.files)
	if same {
		r.next.delta = r.before.delta
	}
	r.next.hidden = !same || (r.before.delta == nil) != (x.Overlay == nil)
	r.next.lost = r.before.lost
	return err
}

// sameBelow tells whether the overlay of x, whose files are in t, stands on the disk on
// which that of old does, whose files are known.
func sameBelow(old *config.Export, x *sought, t *open.Table) bool {
	if x.ImageFormat() != old.ImageFormat() || x.Snapshot != old.Snapshot || !reflect.DeepEqual(x.Window, old.Window) {
		return false
	}
	if hasFiles(&x.Export) {
		return t.Same(x.known)
	}
	return x.Image == old.Image
}

// seek takes up the files of r.k, whose paths may lead to others by now, and tells
// those of r.next. They may be the same ones: the daemon may have no right to open
// them again. One that has failed has no files open, and comes back as it is.
func (r *reopening) seek(ctx context.Context) (sought, error) {
	x, err := r.d.placed(r.next.opens(r.next.cfg))
	if err != nil {
		return sought{}, err
	}
	if err := r.k.busy.Wait(ctx); err != nil {
		return sought{}, err
	}
	defer r.k.busy.Unlock()
	if s := r.k.stack; r.before.failed == nil {
		r.before.files, err = open.Again(s.dev, s.files, s.dirs)
		if s.over != nil {
			r.before.delta = s.over.Hold()
		}
	}
	return sought{x, r.k.stack.known()}, err
}

// letGo is when r.before is not opened any more.
func (r *reopening) letGo() {
	if !r.late {
		r.before.letGo()
	}
}

// letGo closes what k, which is not open, was to go on with.
func (k *disk) letGo() {
	k.files.Close()
	if k.delta != nil {
		_ = k.delta.Close() // it is to be forgotten
	}
}

// close closes k, to be opened again as r.before.
func (r *reopening) close(ctx context.Context, k *disk) (closed *disk, back func(), err error) {
	closed, back, err = r.d.closeFor(ctx, k, r.before)
	r.late = errors.Is(err, errLate)
	return closed, back, err
}

func (r *reopening) end() {
	r.next.files.Close()
	r.k.stay(false)
}

// reopen closes the export and opens it as r.next says; if that fails, as it was.
// It returns what takes it back.
func (r *reopening) reopen(ctx context.Context) (undo undoing, err error) {
	d := r.d
	closed, back, err := r.close(ctx, r.k)
	if err != nil {
		return nil, err
	}
	r.next.again = closed
	r.next.busy.Lock() // nobody sets anything before after is known
	err = d.addDisk(ctx, r.next, nil)
	after, _, _ := d.disks.look(r.next)
	r.next.busy.Unlock()
	if err != nil {
		back()
		return nil, err
	}
	return func(ctx context.Context) func() {
		back, err := r.takeBack(ctx, &after)
		if err != nil {
			return func() { d.tellChanged(r.next, r.change, err) }
		}
		return back
	}, nil
}

// takeBack closes the export, which was opened as after says. back opens it as it was
// before, with what was set since.
func (r *reopening) takeBack(ctx context.Context, after *config.Export) (back func(), err error) {
	if err := r.next.leave(ctx, false); err != nil {
		return nil, fmt.Errorf("%w: it is being changed: %w", export.ErrInUse, err)
	}
	defer r.next.stay(false)
	live, _, _ := r.d.disks.look(r.next)
	r.before.cfg = config.TakenBack(&r.before.cfg, after, &live)
	files, _ := r.before.files.Contents()
	if err := mayWriteAgain(&live, &r.before.cfg, files); err != nil {
		return nil, err
	}
	_, back, err = r.close(ctx, r.next)
	return back, err
}

// likeness is another disk of the name of k, to be opened as k is.
func (d *daemon) likeness(k *disk) *disk {
	x, s, failed := d.disks.look(k)
	return &disk{cfg: x, named: k.named, writes: !s.x.ReadOnly, failed: failed, lost: d.disks.lostBy(k)}
}

// errReopening is what an export has failed for that closeFor has closed.
var errReopening = errors.New("it is being opened again")

// closeFor closes k, which is to come back as again, a likeness of what it is or has
// been: closed has its name, as one that failed. back opens again, or has it failed
// as it had, if nobody has removed it. Another that has taken the name of k stays:
// errAway or errTaken. If k is late, it comes back by itself, with what again has, which
// is closed then: errLate.
func (d *daemon) closeFor(ctx context.Context, k, again *disk) (closed *disk, back func(), err error) {
	name := again.cfg.Name
	if err := d.disks.stillHas(name, k); err != nil {
		return nil, nil, err
	}
	again.origin = d.disks.originOf(k)
	instead := &disk{cfg: again.cfg, origin: again.origin, failed: errReopening}
	again.again = instead
	err = d.closeInTime(ctx, k, name, func() error { return d.makeRoom(ctx, k, instead) }, func(err error) {
		defer again.letGo()
		d.tellRetired(name, err)
		if d.stopping.Err() == nil {
			d.comeBack(again)
		}
	})
	switch {
	case err == nil:
		d.hold(instead, again)
		return instead, func() { d.comeBack(again) }, nil
	case errors.Is(err, errLate):
		d.log.Warn("export is opened as it was when its storage answers", "export", name)
	case d.disks.find(name) == nil: // in bad order
		d.comeBack(again)
	}
	return nil, nil, err
}

// comeBack opens again, or has it failed as it had, if what closeFor has closed for it
// has its name still.
func (d *daemon) comeBack(again *disk) {
	switch {
	case d.disks.get(again.cfg.Name) != again.again:
	case again.failed != nil:
		d.giveUp(again)
	default:
		d.hold(again.again, again)
		d.tryDisk(again)
	}
}

// makeRoom removes k for instead. If its clients do not leave before ctx ends, it
// stays.
func (d *daemon) makeRoom(ctx context.Context, k, instead *disk) error {
	err := d.removeExport(ctx, k, instead)
	if errors.Is(err, export.ErrInUse) {
		d.exports.Readmit(instead.cfg.Name, k)
	}
	return err
}

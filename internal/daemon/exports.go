package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Origins of exports.
const (
	fromCommandLine = "command line"
	fromConfig      = "config"
	fromState       = "state"
	fromAPI         = "api"
)

// specOf is what the registry has to know of an export.
func specOf(x *config.Export) (export.Spec, error) {
	settings, err := settingsOf(x)
	return export.Spec{Name: x.Name, NeedTLS: x.RequireTLS, FlushOnLeave: x.FlushOnClose, Settings: settings}, err
}

// settingsOf is what may change while an export is in use.
func settingsOf(x *config.Export) (export.Settings, error) {
	grants, err := grantsOf(x.Grants)
	return export.Settings{
		Description: x.Description,
		ReadOnly:    x.ReadOnly,
		Default:     x.Default,
		Connections: x.Connections,
		Grants:      grants,
		TrustCID:    x.TrustCID,
	}, err
}

// addExport opens an export and publishes it; what fails leaves nothing
// behind. files are what the words "fd:N" in x stand for; they are closed.
func (d *daemon) addExport(ctx context.Context, x config.Export, origin string, files []*os.File) error {
	return d.addDisk(ctx, &disk{cfg: x, origin: origin}, files)
}

// addDisk is addExport of a disk that is not open. One that is another attempt
// leaves the name to what failed before, if it fails.
func (d *daemon) addDisk(ctx context.Context, k *disk, files []*os.File) (err error) {
	defer closeFiles(files)
	x := k.cfg
	if k.origin == fromConfig {
		if k.named.Name == "" {
			k.named = config.ImageOf(x)
		}
		if x, err = d.placed(x); err != nil {
			return err
		}
		k.cfg = x
	}
	if err := d.disks.claim(k); err != nil {
		return err
	}
	undo := []func(){func() { d.release(k, x.Name, nil) }}
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	spec, err := specOf(&x)
	spec.Owner, spec.Hidden = k, k.hidden
	if err == nil && (k.origin == fromAPI || k.origin == fromState) {
		err = d.mayJoin(&x, k.origin == fromState) // a reload that begins now finds the name claimed
	}
	var own []*door
	if err == nil {
		own, err = d.openDoors(ctx, &x)
	}
	if err != nil {
		return err
	}
	d.disks.mu.Lock()
	k.doors = own
	d.disks.mu.Unlock()
	undo = append(undo, func() { d.closeDoors(own) })
	for _, o := range own {
		spec.At = append(spec.At, &o.scope)
	}
	d.warnVsock(k, &x)
	var unkeep func() error
	err = d.exports.AddOpening(spec, func() (dev backing.Device, err error) {
		dev, unkeep, err = d.openDisk(ctx, k, &x, files)
		return dev, err
	})
	if err != nil && unkeep != nil {
		err = errors.Join(err, unkeep())
	}
	if err != nil {
		return err
	}
	d.disks.settle(k)
	if d.server == nil { // serve accepts at all doors that there are
		return nil
	}
	for _, o := range own {
		d.accept(o)
	}
	return nil
}

// openDisk opens k as x says. It returns what has the file of an addition as it was
// before, nil if it was not written.
func (d *daemon) openDisk(ctx context.Context, k *disk, x *config.Export, files []*os.File) (dev backing.Device, unkeep func() error, err error) {
	s, err := d.build(ctx, k, x, files)
	if err != nil {
		return nil, nil, err
	}
	cfg := k.cfg
	cfg.Format = s.x.Format // as it is kept: what a guest writes later is no reason to ask
	if k.unkept {
		if unkeep, err = d.keepAdded(ctx, k, cfg, s.below); err != nil {
			return nil, nil, errors.Join(err, s.top.Close())
		}
	}
	d.disks.mu.Lock()
	defer d.disks.mu.Unlock()
	if k.again != nil {
		k.held, k.again.held = k.again.held, held{}
	}
	if !k.trial {
		k.held.close()
	}
	k.cfg, k.stack, k.poison, k.file, k.again = cfg, s, s.poison, s.file, nil
	if !s.x.ReadOnly {
		k.lost = nil // that is its record, or of another image
	}
	return s.top, unkeep, nil
}

// warnVsock tells of an export that guests only read although others write.
func (d *daemon) warnVsock(k *disk, x *config.Export) {
	if x.ReadOnlyOverVsock() && slices.ContainsFunc(d.doorsOf(k, x.Name), func(o *door) bool { return overVsock(o.Listener) }) {
		d.log.Warn("export is read-only over vsock: to write takes a grant with vm, and psk or token-sha256, or vsock-trust-cid", "export", x.Name)
	}
}

// doorsOf are the listeners at which k, which has that name, is found: its own, or if
// it has none those that exports share.
func (d *daemon) doorsOf(k *disk, name string) []*door {
	if own := d.disks.doorsOf(k); len(own) > 0 {
		return own
	}
	return d.doors.shared(name)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written by it
	}
}

// openDoors listens where an export has addresses of its own.
func (d *daemon) openDoors(ctx context.Context, x *config.Export) (list []*door, err error) {
	for _, l := range x.Listeners {
		more, err := d.openDoor(ctx, l, x.RequireTLS)
		if err != nil {
			d.closeDoors(list)
			return nil, err
		}
		for _, o := range more {
			o.own = true
			o.scope.Show(x.Name)
		}
		d.doors.add(more...)
		list = append(list, more...)
	}
	return list, nil
}

// closeDoors closes listeners. Who came in by them and has opened no export
// finds none.
func (d *daemon) closeDoors(list []*door) {
	for _, o := range list {
		o.scope.Show()
	}
	d.forget(list)
	d.doors.remove(list)
}

// beginChange finds the export called name for somebody who changes it, and
// holds its busy for them: it is there and ready, and stays until they are done.
// Who has left before it is their turn changes nothing.
func (d *daemon) beginChange(ctx context.Context, name string) (*disk, error) {
	k := d.disks.find(name)
	if k == nil {
		return nil, d.unopen(name)
	}
	err := k.busy.Wait(ctx)
	if err != nil {
		return nil, told(err)
	}
	if d.disks.get(name) != k {
		err = d.unopen(name)
	} else {
		err = d.mayChange(k, name)
	}
	if err != nil {
		k.busy.Unlock()
	}
	return k, err
}

// mayChange refuses a change of k, which has that name, while it is being opened or
// removed. With k.busy.
func (d *daemon) mayChange(k *disk, name string) error {
	if x, _ := d.exports.StatusOf(name); k.leaving > 0 || x.State != export.Ready {
		return errChanging(name)
	}
	return nil
}

// errChanging is for an export that cannot be changed at the moment.
func errChanging(name string) error {
	return &api.Error{Code: api.CodeInUse, Text: fmt.Sprintf("export %q is not ready to be changed: it is being opened or removed", name)}
}

// unopen is why the export of that name, which was not open a moment ago, is not changed.
func (d *daemon) unopen(name string) error {
	k := d.disks.get(name)
	if k == nil {
		return unknownExport(name)
	}
	if _, now, failed := d.disks.look(k); now == nil && failed != nil && failed != errReopening {
		return &api.Error{Code: api.CodeFailed, Text: fmt.Sprintf("export %q has failed: %v", name, failed)}
	}
	return errChanging(name)
}

// removeExport takes k away, which has been opened, when its clients have finished
// what they have in flight, and its listeners with it. One that is kept stays so.
// instead, if not nil, has the name and the place then, unless another removal waits
// after which nothing shall have them. If somebody else has removed it before: errAway.
// If ctx has ended before: ErrInUse, as its clients had no time to finish.
func (d *daemon) removeExport(ctx context.Context, k, instead *disk) error {
	x, _, _ := d.disks.look(k)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %q: %w", export.ErrInUse, x.Name, err)
	}
	return d.takeAway(ctx, k, x.Name, true, instead, func() error { return nil })
}

// takeAway is removeExport of k, which has that name. When it has left, and before its
// name is free, forget is called with k.busy: if that fails, the name is that of an
// export which has failed for it. Of an export that took no more writes when this
// began, it is no error that it was closed without the last.
func (d *daemon) takeAway(ctx context.Context, k *disk, name string, force bool, instead *disk, forget func() error) error {
	if x, _ := d.exports.StatusOf(name); x.Clients > 0 && !force { // as Remove says, before the pause is over
		return fmt.Errorf("%w: %q", export.ErrInUse, name)
	}
	d.keepPlace(k)
	defer d.freePlace(name)
	d.unpause(k) // who changes it may wait for that
	final := instead == nil
	if err := k.leave(ctx, final); err != nil {
		return fmt.Errorf("%w: %q is being changed: %w", export.ErrInUse, name, err)
	}
	if d.disks.get(name) != k { // another removal has taken it away
		k.stay(final)
		return errAway
	}
	d.unpause(k) // nobody pauses it any more
	known := d.disks.healthOf(k).why()
	err := d.exports.Remove(ctx, name, k, force)
	k.busy.Lock()
	defer k.busy.Unlock()
	k.stayLocked(final)
	if errors.Is(err, export.ErrInUse) && d.disks.get(name) != k {
		return nil // another removal has waited longer
	}
	if _, stays := d.exports.StatusOf(name); stays || errors.Is(err, nbd.ErrUnknownExport) {
		return err // it is in use, or opening, or another removal has taken it away
	}
	if known != nil && err != nil {
		d.log.Warn("export was closed without its last writes, as it took no more", "export", name, "error", err)
		err = nil
	}
	if d.disks.get(name) != k {
		return err // as with another removal, which was told the same
	}
	d.closeDoors(d.disks.takeDoors(k))
	kept := forget()
	switch {
	case kept != nil:
		instead = &disk{cfg: k.cfg, origin: k.origin, failed: kept}
	case k.final > 0:
		instead = nil
	}
	d.release(k, name, instead)
	if instead != nil {
		d.keepPlace(instead)
	}
	return errors.Join(err, kept)
}

// keepPlace has the empty name stand for k, if it does, though k be away. Of two
// exports of one name, which are both away, either can be the default.
func (d *daemon) keepPlace(k *disk) {
	x, now, failed := d.disks.look(k)
	spec, _ := specOf(&x) // without grants it is everybody's
	if len(x.Listeners) > 0 {
		spec.At = []*transport.Scope{new(transport.Scope)} // they are closed, and no other shows it
	}
	if now == nil && failed != nil {
		c, _ := exportOf(d.conf.Load(), x.Name)
		spec.Default = spec.Default || c.Default && k.origin == fromState
	}
	d.exports.Keep(spec)
}

// freePlace is the end of keepPlace for a name that no export has any more.
func (d *daemon) freePlace(name string) {
	if d.disks.get(name) == nil {
		d.exports.Release(name)
	}
}

// unpause ends a pause of the API: requests that wait for its end would keep an
// export from leaving, and so would its last flush.
func (d *daemon) unpause(k *disk) {
	if hold := d.disks.unhold(k); hold != nil {
		_ = hold.Resume() // it may have ended
	}
}

// openTimeout bounds the opening of an image that a reload or the API wants.
const openTimeout = time.Minute

// allExports are those of the configuration or of the command line, and those that
// were kept, as far as they can be read; without those of which there are two of one
// name, which are not opened.
func (d *daemon) allExports() (list []config.Export, err error) {
	c := d.conf.Load()
	if c == nil {
		return []config.Export{d.cfg.Disk}, nil
	}
	if c.Control.State == "" {
		return c.Exports, nil
	}
	kept, _, err := config.ReadExports(c.Control.State)
	return slices.Concat(otherThan(kept, c.Exports), otherThan(c.Exports, kept)), err
}

// otherThan are those of list whose names no export of others has.
func otherThan(others, list []config.Export) []config.Export {
	return slices.DeleteFunc(slices.Clone(list), func(x config.Export) bool {
		_, both := named(others, x.Name)
		return both
	})
}

// addConfigured opens the exports of the configuration, and those that were
// kept. One that cannot be opened is known and does not work: the disks of
// other guests do not depend on it.
func (d *daemon) addConfigured() error {
	c := d.conf.Load()
	if _, err := d.groups.set(c.Groups); err != nil {
		return err
	}
	kept, err := d.readKept(c.Control.State)
	if err != nil {
		return err
	}
	d.arrange(c)
	var list []*disk
	for _, x := range otherThan(kept, c.Exports) {
		list = append(list, &disk{cfg: x, origin: fromConfig})
	}
	for _, x := range kept {
		k := &disk{cfg: x, origin: fromState}
		if other, both := exportOf(c, x.Name); both {
			k.failed = errTwo(&other, &x)
		}
		list = append(list, k)
	}
	d.tryAll(d.stopping, list)
	return nil
}

// errTwo is for a name of which the configuration has an export and another is kept.
// To serve either could give a guest the disk of another.
func errTwo(configured, kept *config.Export) error {
	return fmt.Errorf("%w: the configuration has it with image %q, and one with image %q was added and is kept: neither is served while there are both",
		export.ErrExists, configured.Image, kept.Image)
}

// mayJoin refuses an export of the control API that does not go with the
// configuration as it is, or as a reload is about to make it: its rate group is not
// there, or it is to be kept beside one of its name.
func (d *daemon) mayJoin(x *config.Export, kept bool) error {
	coming := d.coming.Load() // before conf, which it may be then
	for _, c := range [...]*config.Config{coming, d.conf.Load()} {
		if c == nil {
			continue
		}
		if _, both := exportOf(c, x.Name); both && kept {
			return errConfigured(x.Name)
		}
		if _, has := c.Groups[x.RateGroup]; !has && x.RateGroup != "" {
			return errNoGroup(x.RateGroup, c == coming)
		}
	}
	return nil
}

// errNoGroup is for an export whose rate group is not there, or goes with a reload.
func errNoGroup(name string, goes bool) error {
	text := "there is no rate group %q"
	if goes {
		text = "a reload that is under way removes the rate group %q"
	}
	return &api.Error{Code: api.CodeInvalid, Text: fmt.Sprintf(text, name)}
}

// errConfigured is for an export that would be kept beside one of the configuration.
func errConfigured(name string) error {
	return &api.Error{Code: api.CodeExists, Text: fmt.Sprintf("the configuration has an export %q: if another of that name were kept, neither would be served after a restart", name)}
}

// readKept reads the exports that were kept in a folder, if there is one. A file
// that cannot be read holds up no other.
func (d *daemon) readKept(state string) ([]config.Export, error) {
	if state == "" {
		return nil, nil
	}
	kept, last, err := config.ReadExports(state)
	var bad config.FileErrors
	if err != nil && !errors.As(err, &bad) {
		return nil, err
	}
	for _, err := range bad[:min(len(bad), limits.ConfigProblems)] {
		d.log.Error("kept export cannot be read", "error", err)
	}
	if len(bad) > 0 {
		d.unread = fmt.Sprintf("%d files of kept exports could not be read at the start, the first: %v", len(bad), bad[0])
	}
	d.lastKept = last
	return kept, nil
}

// tryAll opens exports that are not open, or notes why they do not work, until ctx
// ends. The files of all are gathered first: storage that hangs holds up no other.
func (d *daemon) tryAll(ctx context.Context, list []*disk) {
	for i, g := range d.filesOf(list) {
		k := list[i]
		switch {
		case ctx.Err() != nil:
		case k.failed != nil:
			d.giveUp(k)
		case g.settled():
			k.failed = g.err
			d.giveUp(k)
		default:
			d.tryDisk(k)
		}
		g.close()
	}
}

// giveUp makes an export known that does not work, with the image that it would have
// served. A name that is taken has its own export.
func (d *daemon) giveUp(failed *disk) {
	if failed.origin == fromConfig {
		failed.said, _ = exportOf(d.conf.Load(), failed.cfg.Name)
		if x, err := d.placed(failed.cfg); err == nil { // else that is why it failed
			failed.cfg = x
		}
	}
	d.log.Error("export cannot be opened", "export", failed.cfg.Name, "error", failed.failed)
	if d.disks.claim(failed) != nil {
		return
	}
	d.guard(failed.cfg.Name)
	d.keepPlace(failed)
	d.tellState(failed.cfg.Name)
}

// tryDisk opens a disk that is not open, or notes why it does not work. Another attempt
// at one that was removed meanwhile is none.
func (d *daemon) tryDisk(k *disk) {
	ctx, cancel := context.WithTimeout(d.stopping, openTimeout)
	defer cancel()
	failed := &disk{cfg: k.cfg, origin: k.origin, lost: k.lost, again: k.again}
	if failed.failed = d.addDisk(ctx, k, nil); failed.failed != nil && !errors.Is(failed.failed, errAway) {
		d.giveUp(failed)
	}
}

// removeFailed forgets k, which does not work, if its file can be removed. An export
// of the configuration that it has kept from being opened is for the next reload.
func (d *daemon) removeFailed(ctx context.Context, k *disk, name string) error {
	if err := k.busy.Wait(ctx); err != nil {
		return err
	}
	defer k.busy.Unlock()
	switch other := d.disks.get(name); {
	case other == k:
	case other != nil && d.disks.originOf(other) == k.origin: // another attempt at it
		return errUnready(name)
	default:
		return unknownExport(name)
	}
	if err := d.forgetKept(k, name); err != nil {
		return err
	}
	x, waits := exportOf(d.conf.Load(), name)
	if !waits || k.origin != fromState {
		d.release(k, name, nil)
		d.freePlace(name)
		return nil
	}
	next := &disk{cfg: x, origin: fromConfig, failed: errWaits}
	d.release(k, name, next)
	d.keepPlace(next)
	return nil
}

// errWaits is what an export of the configuration has failed for when one that was
// kept under its name has been removed.
var errWaits = errors.New("another that was kept had its name: the next reload opens it")

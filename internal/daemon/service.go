package daemon

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/version"
)

// service is the daemon as the control API sees it. Its errors are *api.Error.
type service struct{ d *daemon }

// codes are those of errors, the first that fits.
var codes = []struct {
	is   error
	code string
}{
	{nbd.ErrUnknownExport, api.CodeNotFound},
	{export.ErrExists, api.CodeExists},
	{export.ErrInUse, api.CodeInUse},
	{obs.ErrTooManySubscribers, api.CodeInUse},
	{export.ErrLeased, api.CodeInUse},
	{export.ErrLease, api.CodeNotFound},
	{export.ErrInvalid, api.CodeInvalid},
	{open.ErrDenied, api.CodeForbidden},
	{config.ErrOutside, api.CodeForbidden},
	{os.ErrPermission, api.CodeForbidden},
	{os.ErrExist, api.CodeExists},
	{os.ErrNotExist, api.CodeInvalid},
	{context.DeadlineExceeded, api.CodeTimeout},
	{backing.ErrNotSupported, api.CodeUnsupported},
	{backing.ErrInvalid, api.CodeInvalid},
	{layer.ErrResumed, api.CodeTimeout},
}

// told makes an *api.Error of any error.
func told(err error) error {
	var e *api.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	for _, c := range codes {
		if errors.Is(err, c.is) {
			return &api.Error{Code: c.code, Text: err.Error()}
		}
	}
	return &api.Error{Code: api.CodeFailed, Text: err.Error()}
}

func unknownExport(name string) error {
	return &api.Error{Code: api.CodeNotFound, Text: fmt.Sprintf("there is no export %q", name)}
}

func (s service) Status() api.Status {
	d := s.d
	t := api.Status{
		Version: version.Version, PID: os.Getpid(), Started: d.started, Engine: d.engine.Name(),
		Exports: len(d.all()), Clients: len(d.server.Clients()), Config: d.cfg.File,
		Memory: map[string]int64{}, Notes: map[string]string{},
	}
	for _, c := range d.cage {
		t.Security = append(t.Security, api.Control(c))
	}
	_, t.Memory["buffers"] = d.buffers.Outstanding()
	for _, x := range d.doors.all() {
		t.Listeners = append(t.Listeners, x.URI("", x.tls == nbd.TLSRequire))
	}
	if d.unread != "" {
		t.Notes["state"] = d.unread
	}
	more := 0
	for name, text := range d.notes() {
		if len(t.Notes) >= limits.StatusNotes {
			more++
			continue
		}
		t.Notes["export "+name] = text
	}
	if more > 0 {
		t.Notes["exports"] = fmt.Sprintf("there are notes about %d more: the list of exports shows those that failed", more)
	}
	return t
}

// notes are what there is to say about exports that are not what the configuration or
// the control API wants, once of each: those first that have failed, take no more
// writes or are still a default, by name.
func (d *daemon) notes() iter.Seq2[string, string] {
	return func(yield func(name, text string) bool) {
		said := map[string]bool{}
		for _, k := range d.disks.all() {
			cfg, _, _ := d.disks.look(k)
			text, h := "", d.disks.healthOf(k)
			switch {
			case h.failed != nil:
				text = h.failed.Error()
			case h.poisoned != nil:
				text = "it takes no more writes until its image is opened anew: " + h.poisoned.Error()
			case d.yields(k):
				text = "it is " + stillDefault + ": the next reload tries again to have it that no more"
			}
			if said[cfg.Name] = text != ""; said[cfg.Name] && !yield(cfg.Name, text) {
				return
			}
		}
		for _, x := range d.conf.Load().Exports {
			text, k := "", d.disks.get(x.Name)
			switch {
			case said[x.Name]:
			case k == nil:
				text = "it was removed, and the configuration has it: the next start opens it, or a reload that finds a key of it changed"
			case d.disks.originOf(k) != fromConfig:
				text = "the one of the configuration is not served: another was added by its name"
			}
			if text != "" && !yield(x.Name, text) {
				return
			}
		}
	}
}

func (s service) Exports() []api.Export {
	list := []api.Export{}
	for _, x := range s.d.all() {
		list = append(list, s.d.describe(x))
	}
	return list
}

// all are the exports, sorted by name, with those that could not be opened.
func (d *daemon) all() []export.Status {
	list := d.exports.Status()
	byName := func(x export.Status, name string) int { return strings.Compare(x.Spec.Name, name) }
	for _, k := range d.disks.failed() {
		x, _, _ := d.disks.look(k)
		if i, known := slices.BinarySearchFunc(list, x.Name, byName); !known {
			list = slices.Insert(list, i, unopened(x.Name))
		}
	}
	return list
}

// unopened is what there is to say about an export that could not be opened.
func unopened(name string) export.Status {
	return export.Status{Spec: export.Spec{Name: name, Stats: new(obs.ExportStats)}, State: export.Failed}
}

// writable tells whether clients may write to an export that is as well as h says.
func writable(x *export.Status, h health) bool {
	return x.Info.Caps.Has(backing.CanWrite) && !x.Spec.ReadOnly && h.why() == nil
}

func (s service) Export(name string) (api.Export, error) {
	if x, ok := s.d.exports.StatusOf(name); ok {
		return s.d.describe(x), nil
	}
	if k := s.d.disks.get(name); k != nil {
		if _, _, err := s.d.disks.look(k); err != nil {
			return s.d.describe(unopened(name)), nil
		}
	}
	return api.Export{}, unknownExport(name)
}

// describe is an export as the API shows it.
func (d *daemon) describe(x export.Status) api.Export {
	k := d.disks.get(x.Spec.Name)
	h := d.disks.healthOf(k)
	out := api.Export{State: string(x.State), Size: x.Info.Size, Clients: x.Clients, Writable: writable(&x, h)}
	if k == nil {
		out.Name = x.Spec.Name
		return out
	}
	var now *stack
	out.Export, now, _ = d.disks.look(k)
	out.Origin = d.disks.originOf(k)
	late := x.State == export.Draining && d.disks.isLate(x.Spec.Name)
	switch why := h.why(); {
	case late:
		out.Error = stillClosing
	case why != nil:
		out.Error = why.Error()
	case d.disks.hides(k):
		out.Error = "a reload that is under way has opened it: nobody finds it before that is done"
	}
	if late || now == nil && h.failed != nil { // it is nowhere to be seen
		return out
	}
	out.State, out.File = d.shown(k, x.State), d.disks.openFile(k)
	for _, o := range d.doorsOf(k, x.Spec.Name) {
		out.URIs = append(out.URIs, o.URI(x.Spec.Name, o.tls == nbd.TLSRequire))
	}
	return out
}

func (s service) Add(ctx context.Context, a api.AddExport, files []*os.File) (api.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	x := a.Export
	x.SetDefaults()
	origin, err := fromAPI, s.d.mayAdd(&x, a.Persist, len(files))
	if a.Persist {
		origin = fromState
	}
	if err == nil {
		err = s.d.addDisk(ctx, &disk{cfg: x, origin: origin, unkept: a.Persist}, files)
	}
	if err != nil {
		return api.Export{}, told(err)
	}
	if x.Default {
		s.d.choose(x.Name)
		s.d.tellDefaults() // it is there, whatever becomes of the others: the notes tell of them
	}
	return s.Export(x.Name)
}

// mayAdd refuses exports that the API cannot make.
func (d *daemon) mayAdd(x *config.Export, persist bool, files int) error {
	if n := limits.ConfigExports; d.disks.len() >= n {
		return &api.Error{Code: api.CodeInUse, Text: fmt.Sprintf("there are %d exports already, and no more can be", n)}
	}
	why, c := "", d.conf.Load()
	switch err := x.Validate(c.APIScope(files)); {
	case errors.Is(err, config.ErrOutside):
		return err
	case err != nil:
		why = err.Error()
	case persist && c.Control.State == "":
		why = "the configuration has no folder for exports that are kept"
	case persist && files > 0:
		why = "an image that came as a descriptor cannot be kept"
	}
	if why != "" {
		return &api.Error{Code: api.CodeInvalid, Text: why}
	}
	return d.mayJoin(x, persist)
}

func (s service) Patch(ctx context.Context, name string, p api.Patch) (api.Export, error) {
	x, err := s.patch(ctx, name, p)
	if err != nil || p.Default == nil || !*p.Default {
		return x, err
	}
	if err := errors.Join(s.d.yieldDefaults()...); err != nil {
		return x, told(fmt.Errorf("export %q is changed, but %w", name, err))
	}
	return x, nil
}

// patch is Patch but for the other defaults.
func (s service) patch(ctx context.Context, name string, p api.Patch) (api.Export, error) {
	k, err := s.d.beginChange(ctx, name)
	if err != nil {
		return api.Export{}, err
	}
	defer k.busy.Unlock()
	if k.fresh {
		err = s.d.mayLast(k, name)
	}
	if err == nil {
		err = s.d.patch(k, p)
	}
	if err != nil {
		return api.Export{}, told(err)
	}
	return s.Export(name)
}

// patch changes an export in use, as a whole or not at all. With k.busy.
func (d *daemon) patch(k *disk, p api.Patch) error {
	x := k.cfg
	set(&x.Description, p.Description)
	set(&x.ReadOnly, p.ReadOnly)
	set(&x.Default, p.Default)
	set(&x.Grants, p.Grants)
	set(&x.TrustCID, p.TrustCID)
	set(&x.Connections, p.Connections)
	set(&x.LogRequests, p.LogRequests)
	set(&x.Faults, p.Faults)
	if p.WriteThreshold != nil {
		x.WriteThreshold = p.WriteThreshold
	}
	if p.Rate != nil {
		x.Rate = p.Rate
	}
	rate, err := x.Rate.With(p.RateKeys)
	if err != nil {
		return &api.Error{Code: api.CodeInvalid, Text: err.Error()}
	}
	x.Rate = rate
	scope := d.conf.Load().APIScope(x.Descriptors())
	scope.Anywhere = true // the image is open
	if err := x.Validate(scope); err != nil {
		return &api.Error{Code: api.CodeInvalid, Text: err.Error()}
	}
	if k.stack.x.ReadOnly && !x.ReadOnly {
		return &api.Error{Code: api.CodeUnsupported,
			Text: "the image is open read-only: remove the export and add it again, or change the configuration and reload it"}
	}
	old := k.cfg
	switch err := d.rewrite(k, x); {
	case errors.Is(err, config.ErrUnsynced):
		return errors.Join(err, d.rewrite(k, old))
	case err != nil:
		return err
	}
	if err := d.change(k, x); err != nil {
		_ = d.change(k, old) // what was done of it; the rest fails again
		return errors.Join(err, d.rewrite(k, old))
	}
	if p.WriteThreshold != nil {
		k.stack.threshold.Set(x.Threshold())
	}
	if p.Default != nil && *p.Default {
		d.choose(x.Name)
	}
	return nil
}

// rewrite writes x to the file of k, if it is an export that is kept. With k.busy.
func (d *daemon) rewrite(k *disk, x config.Export) error {
	if k.origin != fromState {
		return nil
	}
	if k.stack != nil {
		return d.writeKept(x, k.stack.below)
	}
	return d.writeKept(x, d.keptBelow(x.Name))
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// change makes an export in use what x says of all that can change. With k.busy.
func (d *daemon) change(k *disk, x config.Export) error {
	if err := mayWriteAgain(&k.cfg, &x, k.stack.files); err != nil {
		return err
	}
	settings, err := settingsOf(&x)
	if err != nil {
		return err
	}
	limiters, err := d.limitersOf(k.stack, &x)
	if err != nil {
		return err
	}
	faults, err := faultsOf(x.Faults)
	switch {
	case err != nil:
		return err
	case k.stack.fault != nil:
		if err := k.stack.fault.Set(0, faults); err != nil {
			return err
		}
	case len(faults) > 0:
		return &api.Error{Code: api.CodeForbidden, Text: "the daemon was started without --enable-fault-injection"}
	}
	if err := errors.Join(k.stack.own.Set(ratesOf(x.Rate)), k.stack.rate.Set(limiters)); err != nil {
		return err
	}
	k.stack.log.Set(x.LogRequests)
	if err := d.exports.Update(x.Name, func(s *export.Settings) { *s = settings }); err != nil {
		return err
	}
	k.stack.ro.Set(x.ReadOnly)
	d.warnVsock(k, &x)
	d.disks.mu.Lock()
	defer d.disks.mu.Unlock()
	k.cfg = x
	return nil
}

func (s service) Remove(ctx context.Context, name string, force bool) error {
	k := s.d.disks.get(name)
	if k == nil {
		return s.d.removeFile(name)
	}
	switch _, now, failed := s.d.disks.look(k); {
	case now == nil && failed != nil:
		return told(s.d.removeFailed(ctx, k, name))
	case now == nil:
		return errUnready(name)
	}
	if err := s.d.mayForget(k, name); err != nil { // nobody is cut off for that
		return told(err)
	}
	removed := false
	err := s.d.takeAway(ctx, k, name, force, nil, func() error {
		err := s.d.forgetKept(k, name)
		removed = err == nil
		return err
	})
	switch {
	case removed && err != nil:
		err = errLastLost(name, err)
	case errors.Is(err, context.Canceled): // its caller has left, and nobody would go on with it
		s.d.exports.Readmit(name, k)
	case errors.Is(err, errAway) && s.d.disks.get(name) != nil:
		err = errUnready(name)
	}
	return told(err)
}

// errUnready is for an export that cannot be removed at the moment: somebody else has
// begun to open it, or to open it anew.
func errUnready(name string) error {
	return &api.Error{Code: api.CodeInUse, Text: fmt.Sprintf("export %q is not ready to be removed: it is being opened", name)}
}

// errLastLost is for an export that is away by now, and was not closed in good order.
func errLastLost(name string, err error) error {
	return fmt.Errorf("export %q is removed, but what was written to it last may be lost: %w", name, err)
}

func (s service) Pause(ctx context.Context, name string, limit time.Duration) error {
	if limit == 0 {
		limit = limits.PauseLongest
	}
	k, hold, err := s.d.beginPause(ctx, name, limit)
	if err != nil {
		return told(err)
	}
	if err := hold.Settle(ctx); err != nil {
		s.d.disks.drop(k, hold)
		return told(err)
	}
	return nil
}

// beginPause makes the requests of an export wait until its pause is taken, by
// whoever resumes or removes it.
func (d *daemon) beginPause(ctx context.Context, name string, limit time.Duration) (*disk, *layer.Hold, error) {
	k, err := d.beginChange(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	defer k.busy.Unlock()
	if err := d.mayLast(k, name); err != nil {
		return nil, nil, err
	}
	hold, err := k.stack.pause.Begin(limit)
	if err != nil {
		return nil, nil, err
	}
	d.disks.mu.Lock()
	defer d.disks.mu.Unlock()
	k.hold = hold
	return k, hold, nil
}

func (s service) Resume(name string) error {
	k := s.d.disks.find(name)
	if k == nil {
		return s.d.unopen(name)
	}
	hold := s.d.disks.unhold(k)
	if hold == nil {
		return &api.Error{Code: api.CodeInvalid, Text: "the export is not paused"}
	}
	return told(hold.Resume())
}

// drop forgets a pause that has failed.
func (s *disks) drop(k *disk, hold *layer.Hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.hold == hold {
		k.hold = nil
	}
}

// held tells whether the API has paused k.
func (s *disks) held(k *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.hold == nil {
		return false
	}
	select {
	case <-k.hold.Ended():
		return false
	default:
		return true
	}
}

// unhold takes the pause that was made by the API, nil if there is none.
func (s *disks) unhold(k *disk) (hold *layer.Hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	hold, k.hold = k.hold, nil
	return hold
}

func (s service) Resize(ctx context.Context, name string, want api.Resize) (api.Export, error) {
	k, err := s.d.beginChange(ctx, name)
	if err != nil {
		return api.Export{}, err
	}
	defer k.busy.Unlock()
	if err := k.mayMove(); err != nil {
		return api.Export{}, err
	}
	r, ok := k.stack.top.(backing.Resizer)
	if !ok {
		return api.Export{}, told(backing.ErrNotSupported)
	}
	size, err := sizeOf(want, k.stack.top.Info().Size)
	if err != nil {
		return api.Export{}, err
	}
	if err := r.Resize(ctx, size); err != nil {
		return api.Export{}, told(err)
	}
	return s.Export(name)
}

// mayMove refuses what would wait for the end of a pause. With k.busy, so that none
// begins.
func (k *disk) mayMove() error {
	if k.stack.pause.Paused() {
		return &api.Error{Code: api.CodeInUse, Text: "the disk is paused"}
	}
	return nil
}

// mayLast refuses what would not outlast a reload that takes back k, which has that
// name and which it has opened. With k.busy.
func (d *daemon) mayLast(k *disk, name string) error {
	if d.disks.passing(k) {
		return &api.Error{Code: api.CodeInUse, Text: fmt.Sprintf("a reload that has opened export %q is under way, and may take it back: try again when it is over", name)}
	}
	return nil
}

// sizeOf is what a disk of old bytes shall have.
func sizeOf(want api.Resize, old int64) (int64, error) {
	switch {
	case want.By == 0:
		return want.Size, nil
	case want.By > math.MaxInt64-old:
		return 0, &api.Error{Code: api.CodeInvalid, Text: fmt.Sprintf("a disk of %d bytes and %d more is too large", old, want.By)}
	}
	return old + want.By, nil
}

func (s service) Snapshot(ctx context.Context, name string, a api.Snapshot, files []*os.File) (api.Export, error) {
	k, err := s.d.beginChange(ctx, name)
	if err != nil {
		return api.Export{}, err
	}
	defer k.busy.Unlock()
	if len(files) > 0 {
		return api.Export{}, &api.Error{Code: api.CodeUnsupported, Text: "an overlay cannot come as a descriptor: its image would have no name for it"}
	}
	if err := k.mayMove(); err != nil {
		return api.Export{}, err
	}
	if err := s.d.snapshot(ctx, k, a.Overlay); err != nil {
		return api.Export{}, told(err)
	}
	return s.Export(name)
}

func (s service) Forget(ctx context.Context, name string, force, dryRun bool) (api.Forgotten, error) {
	if err := s.d.reloading.Wait(ctx); err != nil {
		return api.Forgotten{}, told(err)
	}
	defer s.d.reloading.Unlock()
	if k := s.d.disks.get(name); k != nil {
		if err := k.leave(ctx, false); err != nil { // a snapshot may be on its way, and none must begin
			return api.Forgotten{}, told(err)
		}
		defer k.stay(false)
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	f, err := s.d.forgetOverlay(ctx, name, force, dryRun)
	return f, told(err)
}

func (s service) Clients(name *string) []api.Client {
	list := []api.Client{}
	for _, c := range s.d.server.Clients() {
		if name != nil && c.Export != *name {
			continue
		}
		x := api.Client{
			ID: c.ID, Peer: c.Peer.String(), Via: c.Peer.Via, Export: c.Export, Since: c.Since, Cert: c.CertName, PSK: c.Peer.PSK,
			Writable: c.Writable, InFlight: int(c.InFlight), Requests: c.Requests,
			BytesIn: c.BytesIn, BytesOut: c.BytesOut, Stalled: c.Stalled,
		}
		if c.TLSVersion != "" {
			x.TLS = c.TLSVersion + " " + c.TLSCipher
		}
		if c.Agreed.Structured {
			x.Features = append(x.Features, "structured")
		}
		if c.Agreed.Extended {
			x.Features = append(x.Features, "extended")
		}
		x.Features = append(x.Features, c.Agreed.Contexts...)
		list = append(list, x)
	}
	return list
}

func (s service) Disconnect(id uint64) error {
	if !s.d.server.Disconnect(id) {
		return &api.Error{Code: api.CodeNotFound, Text: fmt.Sprintf("there is no client %d", id)}
	}
	return nil
}

func (s service) Stats() []api.Stats {
	list := []api.Stats{}
	for _, x := range s.d.exports.Status() {
		t := api.Stats{Export: x.Spec.Name, Time: time.Now(), Commands: map[string]api.Command{}}
		for op, c := range x.Spec.Stats.Snapshot() {
			t.InFlight += int(c.InFlight)
			t.Commands[obs.Op(op).String()] = api.Command{
				Requests: c.Requests, Errors: c.Errors, Bytes: c.Bytes, Latency: c.Histogram[:],
			}
		}
		list = append(list, t)
	}
	return list
}

// Subscribe gives the events of the bus, which has its own bound.
func (s service) Subscribe(int) (<-chan api.Event, func(), error) {
	sub, err := s.d.bus.Subscribe()
	if err != nil {
		return nil, nil, told(err)
	}
	out := make(chan api.Event)
	ctx, cancel := context.WithCancel(s.d.ctx)
	go func() {
		defer close(out)
		defer sub.Close()
		for {
			events, lost, err := sub.Next(ctx)
			if err != nil {
				return
			}
			for _, e := range eventsOf(events, lost) {
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, cancel, nil
}

// eventsOf are events as the API has them.
func eventsOf(events []obs.Event, lost int) (out []api.Event) {
	if lost > 0 {
		out = append(out, api.Event{Time: time.Now(), Kind: "lost", Lost: uint64(lost)})
	}
	for _, e := range events {
		x := api.Event{Time: e.Time, Kind: string(e.Kind), Export: e.Export, Client: e.Client, Text: e.Reason}
		x.Threshold, x.Exceeded = e.Threshold, e.Exceeded
		if e.Kind == obs.ExportState {
			x.State, x.Text = e.Reason, ""
		}
		out = append(out, x)
	}
	return out
}

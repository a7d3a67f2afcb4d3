// Package export keeps the named disks of a server and decides which of them
// a peer may see and open.
package export

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// State is where an export is in its life.
type State string

const (
	Opening  State = "opening"  // its name is taken; no peer sees it
	Ready    State = "ready"    // it can be opened
	Failed   State = "failed"   // its disk has gone; those that use it stay, no other sees it
	Draining State = "draining" // its connections leave; no peer sees it
	Closed   State = "closed"   // it is in no registry any more
)

// Spec describes an export. What Update changes may change while peers use it.
type Spec struct {
	Name    string
	Device  backing.Device // owned by the registry from Add on
	NeedTLS bool           // only for connections that are encrypted

	// Owner tells the export from a later one of the same name, for who takes it
	// away. It is compared with ==.
	Owner any

	// FlushOnLeave flushes the device, as long as limits.CloseFlush may wait for
	// its turn, when a client leaves that could write.
	FlushOnLeave bool

	// Stats counts the requests; Add makes one if it is nil.
	Stats *obs.ExportStats

	// At are the listeners at which it can be seen and nowhere else; none is
	// for all that show it.
	At []*transport.Scope

	// Hidden is for an export that is Ready and that no peer sees before Reveal.
	Hidden bool

	Settings
}

// Settings are what may change while an export is in use. Connections in
// transmission keep the access that they have.
type Settings struct {
	Description string
	ReadOnly    bool
	Default     bool // the empty name opens it too; the last to say so does
	Grants      []Grant
	TrustCID    bool // vsock peers may write whose grant proves nothing
	Connections int  // bound of the clients at a time; 0 for none
}

// Registry is safe for concurrent use. No device is asked for anything while mu
// is held: storage that hangs is then waited for by those who use it alone.
type Registry struct {
	mu      sync.Mutex
	byName  map[string]*entry // guarded by mu
	away    map[string]*entry // guarded by mu; Closed, with a place that Keep keeps
	count   int               // guarded by mu; of what makes an entry first or last
	rank    map[string]int    // guarded by mu; of the names given to Arrange, below 0
	begun   uint64            // guarded by mu; of the uses, the number of the last one
	closed  bool              // guarded by mu
	opening sync.WaitGroup    // Add is not called once closed is set

	attempts *attempts         // of tokens
	clock    clock             // guarded by mu; by which tokens expire
	leases   map[uint32]*lease // guarded by mu; by CID

	// Changed is called after a change of a state, without locks. It is set
	// before the first Add.
	Changed func(name string, s State)
}

// entry is an export; its fields are guarded by Registry.mu.
type entry struct {
	spec  Spec
	state State
	lost  bool // the disk has failed: there is nothing to flush
	uses  map[*use]struct{}
	place
	clients  int           // of the uses, those that are not for information alone
	due      int           // what place.made will be; 0 before it is known
	kept     bool          // it is away when it is closed, and not forgotten
	removing int           // Removes that are under way
	idle     chan struct{} // not nil while somebody waits for uses to be none

	shut    chan struct{} // not nil once the disk is being closed, closed when it is
	shutErr error         // of that; set before shut is closed

	gone  context.Context // ends when connections shall leave
	leave context.CancelFunc
	cut   context.Context // ends when they are not waited for any more
	sever context.CancelFunc
}

// place decides what the empty name stands for; it is 0 before an export is Ready.
type place struct {
	made   int // by Registry.count, when it became Ready first
	chosen int // the same, when it was made the default; 0 if it is not
}

// welcome is for connections that nobody has told to leave.
func (e *entry) welcome() {
	e.gone, e.leave = context.WithCancel(context.Background())
	e.cut, e.sever = context.WithCancel(context.Background())
}

// Errors of the registry. ErrInUse is also that of a Remove that may not wait.
var (
	ErrExists = errors.New("export exists")
	ErrInUse  = errors.New("export is in use")
	errFull   = fmt.Errorf("%w: it has as many clients as it may have", nbd.ErrUnknownExport)
)

// NewRegistry makes an empty registry.
func NewRegistry() *Registry {
	return &Registry{byName: map[string]*entry{}, away: map[string]*entry{}, attempts: newAttempts(), clock: newClock(time.Now), leases: map[uint32]*lease{}}
}

// check refuses what cannot be sent to a client.
func (s *Spec) check() error {
	if len(s.Name) > limits.MaxString || len(s.Description) > limits.MaxString ||
		!utf8.ValidString(s.Name) || !utf8.ValidString(s.Description) {
		return fmt.Errorf("export name and description must be UTF-8 of at most %d bytes", limits.MaxString)
	}
	if _, token := cutToken(s.Name); token != nil {
		return errors.New("export name ends like one with a token")
	}
	return nil
}

// Add publishes an export. The first one that is there is the default unless
// another says that it is.
func (r *Registry) Add(s Spec) error {
	return r.AddOpening(s, func() (backing.Device, error) { return s.Device, nil })
}

// AddOpening takes the name of s, opens the device, which may take long, and
// publishes the export.
func (r *Registry) AddOpening(s Spec, open func() (backing.Device, error)) error {
	if err := s.check(); err != nil {
		return err
	}
	if s.Stats == nil {
		s.Stats = new(obs.ExportStats)
	}
	e := &entry{spec: s, state: Opening, uses: map[*use]struct{}{}}
	e.welcome()
	r.mu.Lock()
	if _, ok := r.byName[s.Name]; ok || r.closed {
		r.mu.Unlock()
		return fmt.Errorf("%w: %q", ErrExists, s.Name)
	}
	r.byName[s.Name] = e
	r.opening.Add(1)
	r.mu.Unlock()
	defer r.opening.Done()
	r.tell(s.Name, Opening)
	dev, err := open()
	if err != nil {
		r.forget(e)
		return err
	}
	return r.publish(e, dev)
}

// publish makes a device that is open visible, unless the registry was closed
// meanwhile.
func (r *Registry) publish(e *entry, dev backing.Device) error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		r.forget(e)
		return errors.Join(errors.New("server is shutting down"), dev.Close())
	}
	e.spec.Device, e.state = dev, Ready
	r.placeLocked(e)
	r.mu.Unlock()
	r.tell(e.spec.Name, Ready)
	return nil
}

// forget takes e out of the registry.
func (r *Registry) forget(e *entry) {
	r.mu.Lock()
	delete(r.byName, e.spec.Name)
	e.state = Closed
	if e.kept {
		r.away[e.spec.Name] = e
	}
	r.mu.Unlock()
	r.tell(e.spec.Name, Closed)
}

func (r *Registry) tell(name string, s State) {
	if r.Changed != nil {
		r.Changed(name, s)
	}
}

// Update changes the settings of an export: f is called with those that it
// has and must not block.
func (r *Registry) Update(name string, f func(*Settings)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.byName[name]
	if e == nil || e.state != Ready {
		return nbd.ErrUnknownExport
	}
	next := e.spec
	f(&next.Settings)
	if err := next.check(); err != nil {
		return err
	}
	e.spec = next
	r.chooseLocked(e)
	return nil
}

// Fail makes an export Failed that is Ready: its device fails everything from now
// on. It can only be removed.
func (r *Registry) Fail(name string) {
	r.mu.Lock()
	e := r.byName[name]
	ready := e != nil && e.state == Ready
	if ready {
		e.state, e.lost = Failed, true
	}
	r.mu.Unlock()
	if ready {
		r.tell(name, Failed)
	}
}

// Remove takes the export of an owner away: no peer sees it any more, and those that
// use it leave when what they have in flight is finished. Without force an export that
// has clients stays: ErrInUse. With it, what is in flight at the deadline of ctx is given
// up. When all have left, the disk is flushed and closed. If ctx is cancelled
// before that, or the storage still has requests, the export stays in the state
// Draining, and Remove can be called again, or Readmit.
func (r *Registry) Remove(ctx context.Context, name string, owner any, force bool) error {
	r.mu.Lock()
	e := r.byName[name]
	switch {
	case e == nil || e.spec.Owner != owner || e.state == Opening:
		r.mu.Unlock()
		return nbd.ErrUnknownExport
	case e.clients > 0 && !force:
		r.mu.Unlock()
		return fmt.Errorf("%w: %q", ErrInUse, name)
	}
	first := e.state != Draining
	e.state = Draining
	e.removing++
	r.mu.Unlock()
	defer r.removed(e)
	if first {
		r.tell(name, Draining)
	}
	e.leave()
	err := r.wait(ctx, e)
	if force && errors.Is(err, context.DeadlineExceeded) {
		e.sever()
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), limits.Sever)
		defer cancel()
		if r.wait(after, e) == nil {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	return r.shut(ctx, e)
}

// wait waits until nobody uses e.
func (r *Registry) wait(ctx context.Context, e *entry) error {
	r.mu.Lock()
	if len(e.uses) > 0 && e.idle == nil {
		e.idle = make(chan struct{})
	}
	idle := e.idle
	r.mu.Unlock()
	if idle == nil {
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %q: %w", ErrInUse, e.spec.Name, ctx.Err())
	}
}

// shut flushes and closes the disk of e, which nobody uses, and forgets e. The
// first who calls it does so; the others wait for that until ctx ends, and get
// the same error.
func (r *Registry) shut(ctx context.Context, e *entry) error {
	r.mu.Lock()
	first := e.shut == nil
	if first {
		e.shut = make(chan struct{})
	}
	dev, lost := e.spec.Device, e.lost
	e.spec.Device = nil
	r.mu.Unlock()
	if !first {
		select {
		case <-e.shut:
			return e.shutErr
		case <-ctx.Done():
			return fmt.Errorf("%w: %q is being closed: %w", ErrInUse, e.spec.Name, ctx.Err())
		}
	}
	defer close(e.shut)
	if !lost && dev.Info().Caps.Has(backing.CanWrite) {
		e.shutErr = e.flush(ctx, dev)
	}
	e.shutErr = errors.Join(e.shutErr, dev.Close())
	r.forget(e)
	return e.shutErr
}

// flush is the last one of e. It waits for its turn, not as long as who was given
// up for waiting, and for the storage without an end.
func (e *entry) flush(ctx context.Context, dev backing.Device) error {
	turn := limits.CloseFlush
	if e.cut.Err() != nil {
		turn = limits.Sever
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), turn)
	defer cancel()
	return dev.Flush(ctx)
}

// List implements nbd.Exports, sorted by name.
func (r *Registry) List(p *transport.Peer) []nbd.ExportInfo {
	specs := r.visible(p)
	out := make([]nbd.ExportInfo, 0, len(specs))
	for _, s := range specs {
		out = append(out, s.info())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// visible are the exports that p may see, in any order.
func (r *Registry) visible(p *transport.Peer) []Spec {
	if !p.Stands() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var specs []Spec
	known := learnt{lease: r.leaseLocked(p)}
	for _, e := range r.byName {
		if access, _ := r.accessLocked(e, p, known); access != NoAccess {
			specs = append(specs, e.spec)
		}
	}
	return specs
}

// Find implements nbd.Exports.
func (r *Registry) Find(name string, p *transport.Peer) (nbd.ExportInfo, error) {
	s, err := r.find(name, p)
	if err != nil {
		return nbd.ExportInfo{}, err
	}
	return s.info(), nil
}

// find is the export that the name stands for to p.
func (r *Registry) find(name string, p *transport.Peer) (Spec, error) {
	if !p.Stands() {
		return Spec{}, nbd.ErrUnknownExport
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e, _, _, err := r.findLocked(name, p)
	if err != nil {
		return Spec{}, err
	}
	return e.spec, nil
}

// Open implements nbd.Exports: the view that it returns has the size that the
// device has now, and no right to write if the peer or the export has none. The
// export is in use from before the device is asked for that, which it may take
// long to answer.
func (r *Registry) Open(_ context.Context, name string, p *transport.Peer) (*nbd.Export, error) {
	return r.open(name, p, true)
}

// Inspect implements nbd.Exports. The disk stays until the view is closed, for which
// Remove waits.
func (r *Registry) Inspect(_ context.Context, name string, p *transport.Peer) (*nbd.Export, error) {
	return r.open(name, p, false)
}

func (r *Registry) open(name string, p *transport.Peer, client bool) (*nbd.Export, error) {
	u, err := r.use(name, p, client)
	if err != nil {
		return nil, err
	}
	dev := backing.NewChecked(u.spec.Device, u.deny)
	var flush func()
	if u.spec.FlushOnLeave {
		flush = func() { lastFlush(dev) }
	}
	return &nbd.Export{
		ExportInfo: u.spec.info(),
		Device:     dev,
		Gone:       u.gone,
		Cut:        u.cut,
		Still:      func() bool { return r.still(u) },
		Stats:      u.spec.Stats,
		Flush:      flush,
		Close:      sync.OnceFunc(func() { r.left(u) }),
	}, nil
}

// denies is what a peer with that access may not do.
func (s *Settings) denies(access Access) backing.Caps {
	if s.ReadOnly || access != ReadWrite {
		return backing.CanWrite
	}
	return 0
}

// lacks is what nobody can do, whatever the device can: a client that is told of
// CanMultiConn connects more than once.
func (s *Settings) lacks() backing.Caps {
	if s.Connections == 1 {
		return backing.CanMultiConn
	}
	return 0
}

// lastFlush makes durable what a client has written that has left. A failure
// stays with the device: the next who flushes gets it.
func lastFlush(dev backing.Device) {
	if !dev.Info().Caps.Has(backing.CanFlush | backing.CanWrite) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), limits.CloseFlush)
	defer cancel()
	_ = dev.Flush(ctx)
}

// findLocked also gives what was learnt of the peer, with the lease if the access
// depends on it.
func (r *Registry) findLocked(name string, p *transport.Peer) (*entry, Access, learnt, error) {
	name, token := cutToken(name)
	e := r.byName[name]
	if name == "" && e == nil {
		e = r.defaultLocked(p)
	}
	if token != nil && p != nil && !(private(p) && r.attempts.allowed(guessed{p.Key(), name})) {
		token = nil
	}
	access, byLease := NoAccess, false
	known := learnt{lease: r.leaseLocked(p)}
	if token != nil {
		known.token = &shownToken{*token, r.clock.now()}
	}
	if e != nil {
		access, byLease = r.accessLocked(e, p, known)
	}
	if access == NoAccess {
		if token != nil && p != nil && r.guessesLocked(e, p, known.token) {
			r.attempts.wrong(guessed{p.Key(), name}, *token)
		}
		return nil, NoAccess, learnt{}, nbd.ErrUnknownExport
	}
	if !byLease {
		known.lease = nil
	}
	return e, access, known, nil
}

// guessesLocked tells whether a token that opens nothing may be a guess at one of e, or
// nil: where the right one would open nothing either, nothing can be found out.
func (r *Registry) guessesLocked(e *entry, p *transport.Peer, token *shownToken) bool {
	return e != nil && r.openToLocked(e, p) && !slices.ContainsFunc(e.spec.Grants, func(g Grant) bool {
		return len(g.Tokens) > 0 && g.hasToken(token)
	})
}

// openToLocked tells whether e can be opened where p is, by who has the right to.
func (r *Registry) openToLocked(e *entry, p *transport.Peer) bool {
	return !r.closed && e.state == Ready && !e.spec.Hidden && (p == nil || e.shownTo(p))
}

// accessLocked is what p may do with e, and whether by its lease. What it may
// not see does not exist for it.
func (r *Registry) accessLocked(e *entry, p *transport.Peer, known learnt) (access Access, byLease bool) {
	if !r.openToLocked(e, p) {
		return NoAccess, false
	}
	return e.spec.accessOf(p, known)
}

// shownTo reports whether e is to be found at the listener of p.
func (e *entry) shownTo(p *transport.Peer) bool {
	names, all := p.Scope.Names()
	return (all || slices.Contains(names, e.spec.Name)) && !p.Scope.Hides(e.spec.Name) && e.spec.isAt(p)
}

func (s *Spec) info() nbd.ExportInfo {
	x := nbd.ExportInfo{Name: s.Name, Description: s.Description, NeedTLS: s.NeedTLS}
	if d, ok := s.Device.(backing.Describer); ok {
		x.Contexts = d.Descriptions()
	}
	return x
}

// Status is what there is to say about an export.
type Status struct {
	Spec    Spec
	State   State
	Clients int
	Info    backing.Info // zero unless Ready, Failed or Draining
}

// Status describes all exports, sorted by name. The devices in it may be closed
// at any time. It waits for the slowest of them.
func (r *Registry) Status() []Status {
	out := r.states()
	var asked sync.WaitGroup
	for i := range out {
		asked.Go(out[i].ask)
	}
	asked.Wait()
	sort.Slice(out, func(i, j int) bool { return out[i].Spec.Name < out[j].Spec.Name })
	return out
}

// states are all exports, in any order, of which no device was asked yet.
func (r *Registry) states() []Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Status, 0, len(r.byName))
	for _, e := range r.byName {
		out = append(out, e.status())
	}
	return out
}

// StatusOf describes one export, if it is there.
func (r *Registry) StatusOf(name string) (s Status, ok bool) {
	r.mu.Lock()
	e := r.byName[name]
	if ok = e != nil; ok {
		s = e.status()
	}
	r.mu.Unlock()
	s.ask()
	return s, ok
}

// StateOf is the state of one export, if it is there. No device is asked.
func (r *Registry) StateOf(name string) (s State, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.byName[name]
	if e == nil {
		return "", false
	}
	return e.state, true
}

// Len is the number of exports.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.byName)
}

// status is what is known of e without its device.
func (e *entry) status() Status {
	return Status{Spec: e.spec, State: e.state, Clients: e.clients}
}

// ask completes s with what the device says of itself.
func (s *Status) ask() {
	if s.Spec.Device != nil {
		s.Info = s.Spec.Device.Info()
	}
}

// Close waits until no connection uses an export any more, flushes the
// writable ones and closes all. It returns all errors. If ctx ends before that,
// or an opening does not end within limits.LastClose, the others are flushed and
// closed, and ErrInUse is among the errors.
func (r *Registry) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	all := slices.DeleteFunc(slices.Collect(maps.Values(r.byName)), func(e *entry) bool { return e.state == Opening })
	r.mu.Unlock()
	ended := make(chan error, len(all)+1)
	go func() { ended <- r.opened(ctx) }()
	for _, e := range all {
		go func() {
			err := r.wait(ctx, e)
			if err == nil {
				err = r.shut(ctx, e)
			}
			ended <- err
		}()
	}
	// Those that wait end with ctx; a flush takes as long as its storage.
	late := make(chan struct{})
	defer context.AfterFunc(ctx, func() { time.AfterFunc(limits.Sever, func() { close(late) }) })()
	var errs []error
	for range cap(ended) {
		select {
		case err := <-ended:
			errs = append(errs, err)
		case <-late:
			return errors.Join(append(errs, fmt.Errorf("%w: its storage does not answer", ErrInUse))...)
		}
	}
	return errors.Join(errs...)
}

// opened waits for what is being opened when the registry is closed; publish
// closes it.
func (r *Registry) opened(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limits.LastClose)
	defer cancel()
	done := make(chan struct{})
	go func() {
		r.opening.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: an image is still being opened", ErrInUse)
	}
}

package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
)

// disk is an export with what the registry does not know of it.
type disk struct {
	cfg    config.Export // guarded by disks.mu; written with busy held too
	said   config.Export // what the configuration had it as when it failed; see asSet
	named  config.Export // its image as the configuration has it, whatever snapshots have put above
	origin string        // guarded by disks.mu; written with busy held too
	doors  []*door       // its own; guarded by disks.mu; set before it is open, none once they are being closed
	stack  *stack        // guarded by disks.mu; nil while it opens and when it failed
	hold   *layer.Hold   // guarded by disks.mu; of a pause by the API; set with busy held too
	files  *open.Table   // of the image, opened already; nil: none are
	delta  *layer.Delta  // what its overlay is to go on with; nil: it begins empty
	failed error         // guarded by disks.mu; why it could not be opened or, with a stack, works no more
	poison *poison       // guarded by disks.mu; of the image that was opened last
	file   api.File      // guarded by disks.mu; of that image, which may be open no more
	lost   *poison       // of what its name has written to last; see record. Guarded by disks.mu once k is open
	writes bool          // its image is opened for writing, though cfg may have been set read-only since

	// held is what another attempt at this one, which failed, goes on with. One that a
	// reload has opened has it as long as it may be taken back. Guarded by disks.mu.
	held held

	// again is the one that failed which this is another attempt at: that has the
	// name if this one is not opened. Guarded by disks.mu; nil once it is open.
	again *disk

	// unkept is for an addition that is to be kept: its file is written before it
	// is ready, so that nobody changes what is not kept.
	unkept bool

	// inPlaceOf is a kept export that failed, whose name and file this one is about
	// to take: it has both again if this one is not opened. Guarded by disks.mu;
	// nil once this one is ready, or its file gone.
	inPlaceOf *disk

	// trial is for one that a reload has opened which is under way, and may take
	// it back. Guarded by disks.mu.
	trial bool

	// fresh is for a trial of one that was not open: nothing is open instead if it is
	// taken back, and has what was set of it. Set before it is open.
	fresh bool

	// parting is for one that a reload takes back, and does not wait for any more: another
	// that failed has its name and what it holds when it has left. Guarded by disks.mu.
	parting bool

	// hidden is for one that a reload opens and that nobody finds before that is over:
	// were it taken back, what is written to it would be lost. Guarded by disks.mu; set
	// before it is open.
	hidden bool

	// busy is held by whoever changes the export. Removals hold it while they
	// begin and while they end, not while they wait for clients and storage.
	busy    lock
	leaving int // guarded by busy; removals under way, meanwhile nobody begins to change it
	final   int // guarded by busy; those of them after which nothing shall have its name
}

// disks are the exports of the daemon, those included that are being opened.
type disks struct {
	mu     sync.Mutex
	byName map[string]*disk // guarded by mu

	// late are the names of exports that are still being closed though nobody waits for
	// it any more, until what is to follow is done. Guarded by mu.
	late map[string]bool
}

// poison is whether an image takes no more writes. It outlasts that a reload closes
// the image and opens it again: who removes the export and adds it again begins anew.
type poison struct {
	why atomic.Pointer[error] // nil: it takes them; set once
	of  []raw.ID              // its files that are written to; none before it is open
}

// health is what an export is good for. At most one of the two is not nil.
type health struct {
	failed   error // it could not be opened, or works no more
	poisoned error // it can be read, and takes no more writes until its image is opened anew
}

// why is what is wrong with the export, nil for nothing.
func (h health) why() error { return cmp.Or(h.failed, h.poisoned) }

// errAway is for an export that has been removed meanwhile, and for another attempt
// at it.
var errAway = fmt.Errorf("%w: it was removed meanwhile", nbd.ErrUnknownExport)

// opens is x, an export with the image of k, as that is opened.
func (k *disk) opens(x config.Export) config.Export {
	x.ReadOnly = x.ReadOnly && !k.writes
	return x
}

// asSet is x, which is k as the configuration has it by now, for another attempt at k,
// which failed: the keys that the control API has set stay, but for those that have
// changed since. The image may be another by now, and is asked for its format again.
func (k *disk) asSet(x config.Export) config.Export {
	if k == nil || k.said.Name == "" {
		return x
	}
	live := k.said.To(&x).On(&k.cfg)
	live.Format = x.Format
	return live
}

// leave begins a removal of k when who changes it has finished, unless ctx ends
// before. Where nobody changes it, a ctx that has ended does no harm: it bounds what
// force waits for. After a removal that is final nothing shall have its name.
func (k *disk) leave(ctx context.Context, final bool) error {
	if !k.busy.TryLock() {
		if err := k.busy.Wait(ctx); err != nil {
			return err
		}
	}
	defer k.busy.Unlock()
	k.leaving++
	if final {
		k.final++
	}
	return nil
}

// goes tells whether a removal of k is final.
func (k *disk) goes() bool {
	k.busy.Lock() // while it leaves nobody holds that for long
	defer k.busy.Unlock()
	return k.final > 0
}

// stay is the end of a removal after which k is still there.
func (k *disk) stay(final bool) {
	k.busy.Lock() // while it leaves nobody holds that for long
	defer k.busy.Unlock()
	k.stayLocked(final)
}

// stayLocked is stay with k.busy.
func (k *disk) stayLocked(final bool) {
	k.leaving--
	if final {
		k.final--
	}
}

// claim takes a name. One that failed is for another attempt at that very export,
// and one of a kept export that failed for another that is kept: its file takes the
// place of the other's. A removal of what failed comes before that or after it.
func (s *disks) claim(k *disk) error {
	if old := s.get(k.cfg.Name); old != nil {
		if _, now, failed := s.look(old); now == nil && failed != nil {
			old.busy.Lock()
			defer old.busy.Unlock()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byName == nil {
		s.byName = map[string]*disk{}
	}
	old := s.byName[k.cfg.Name]
	switch {
	case k.again != nil && old != k.again:
		return errAway
	case k.again != nil && k.again.stack == nil:
		if k.failed != nil {
			k.held, k.again.held = k.again.held, held{}
			k.again = nil
		}
	case old != nil && old.failed != nil && old.origin == fromState && k.origin == fromState:
		k.inPlaceOf = old
	case old != nil && old.failed != nil:
		return fmt.Errorf("%w: %q, which failed: remove it first", export.ErrExists, k.cfg.Name)
	case old != nil:
		return fmt.Errorf("%w: %q", export.ErrExists, k.cfg.Name)
	}
	s.byName[k.cfg.Name] = k
	return nil
}

// forget frees the name of k, unless it is another's by now. instead, if not nil,
// has it then.
func (s *disks) forget(k, instead *disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.byName[k.cfg.Name] != k:
	case instead != nil:
		s.byName[k.cfg.Name] = instead
		instead.held, k.held = k.held, held{}
	case k.again != nil:
		s.byName[k.cfg.Name] = k.again
	case k.inPlaceOf != nil:
		s.byName[k.cfg.Name] = k.inPlaceOf
	default:
		delete(s.byName, k.cfg.Name)
		k.held.close()
	}
}

// settle is when the file of the export is that of k, or gone.
func (s *disks) settle(k *disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k.inPlaceOf = nil
}

// passing tells whether a reload may still take k back.
func (s *disks) passing(k *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.trial
}

// confirm is when a reload is over: what it has opened and not taken back stays. One
// that is late, or parting, is still to be taken back.
func (s *disks) confirm() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, k := range s.byName {
		if s.late[name] || k.parting {
			continue
		}
		if k.trial = false; k.stack != nil {
			k.held.close()
		}
	}
}

// setParting is for k, which leaves while nobody waits, for another.
func (s *disks) setParting(k *disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k.parting = true
}

// hides tells whether nobody finds k before a reload is over.
func (s *disks) hides(k *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.hidden
}

// get is an export in any state, or nil.
func (s *disks) get(name string) *disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byName[name]
}

// find is an export that is open, or nil.
func (s *disks) find(name string) *disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.byName[name]; k != nil && k.stack != nil {
		return k
	}
	return nil
}

// opened tells whether k has been opened.
func (s *disks) opened(k *disk) bool {
	_, now, _ := s.look(k)
	return now != nil
}

// stillHas says why k has that name no more, nil if it has it.
func (s *disks) stillHas(name string, k *disk) error {
	switch s.get(name) {
	case k:
		return nil
	case nil:
		return errAway
	}
	return errTaken
}

// look is what an export is like now, a threshold that was reached included.
func (s *disks) look(k *disk) (cfg config.Export, now *stack, failed error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.stack.live(k.cfg), k.stack, k.failed
}

// healthOf is what k is good for now; nil, which is no disk, is well.
func (s *disks) healthOf(k *disk) (h health) {
	if k == nil {
		return h
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.failed = k.failed; h.failed == nil {
		h.poisoned = k.poison.reason()
	}
	return h
}

// reason is why the image takes no more writes, or nil.
func (p *poison) reason() error {
	if p == nil {
		return nil
	}
	if why := p.why.Load(); why != nil {
		return *why
	}
	return nil
}

// record is that of the image of k, which is about to be opened and whose files are in
// t: for writing to a file that was written to before, by whatever path, what it was
// then. Where nobody knows the files (nil) they are taken for the same.
func (k *disk) record(readOnly bool, t *open.Table) (*poison, error) {
	if k.lost == nil || readOnly {
		return new(poison), nil
	}
	if t == nil {
		return k.lost, nil
	}
	written, err := t.Written()
	if err != nil || slices.ContainsFunc(written, func(id raw.ID) bool { return slices.Contains(k.lost.of, id) }) {
		return k.lost, err
	}
	return new(poison), nil
}

// lostBy is the record of the image of k, which may be nil, for another disk of its
// name.
func (s *disks) lostBy(k *disk) *poison {
	if k == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return cmp.Or(k.lost, k.poison)
}

// doorsOf are the listeners of k alone.
func (s *disks) doorsOf(k *disk) []*door {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.doors
}

// originOf is where k is from.
func (s *disks) originOf(k *disk) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return k.origin
}

// openFile is the file that k has open as its image.
func (s *disks) openFile(k *disk) api.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.failed != nil {
		return api.File{}
	}
	return k.file
}

// all are those in any state, by name.
func (s *disks) all() []*disk { return s.list(func(*disk) bool { return true }) }

// len is the number of exports, in any state.
func (s *disks) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byName)
}

// failed are the exports that do not work, by name.
func (s *disks) failed() []*disk { return s.list(func(k *disk) bool { return k.failed != nil }) }

// list are those that are wanted, which is called with s.mu, by name.
func (s *disks) list(wanted func(*disk) bool) (list []*disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(s.byName)) {
		if k := s.byName[name]; wanted(k) {
			list = append(list, k)
		}
	}
	return list
}

// usesGroup names an export in a rate group, the configuration's own aside.
func (s *disks) usesGroup(group string) (name string, used bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.byName {
		if k.origin != fromConfig && k.cfg.RateGroup == group {
			return k.cfg.Name, true
		}
	}
	return "", false
}

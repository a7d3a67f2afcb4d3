package export

import (
	"cmp"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Keep keeps the place of the export that s describes while it is away: until
// Release, the empty name does not stand for another in its stead. s counts if it
// has not been Ready, or is away; it needs no device.
func (r *Registry) Keep(s Spec) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.byName[s.Name]; e != nil && e.made > 0 {
		e.kept = true
		return
	}
	s.Device = nil
	e := &entry{spec: s, state: Closed, kept: true}
	r.placeLocked(e)
	r.away[s.Name] = e
}

// Release gives up the place of an export when it is not there.
func (r *Registry) Release(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.away, name)
	if e := r.byName[name]; e != nil {
		e.kept = false
	}
}

// Arrange says which exports come first, where none is the default: those that are
// named, in this order, and then all others, as they came.
func (r *Registry) Arrange(names ...string) {
	rank := make(map[string]int, len(names))
	for i, name := range names {
		rank[name] = i - len(names)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rank = rank
}

// Made orders the exports as they came: it is above that of all that came before,
// and 0 for one that is neither there nor kept a place for. One that is being opened
// comes when this is asked.
func (r *Registry) Made(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.placedLocked(name); e != nil {
		return e.made
	}
	if e := r.byName[name]; e != nil {
		return r.dueLocked(e)
	}
	return 0
}

// dueLocked is the number of e among those that came.
func (r *Registry) dueLocked(e *entry) int {
	if e.due == 0 {
		e.due = r.nextLocked()
	}
	return e.due
}

// Default names the export that was made the default last. Without one it is not ok.
func (r *Registry) Default() (name string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.firstLocked(nil)
	if e == nil || e.chosen == 0 {
		return "", false
	}
	return e.spec.Name, true
}

// Choose makes an export that is a default the last that was made so.
func (r *Registry) Choose(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.placedLocked(name); e != nil && e.chosen > 0 {
		e.chosen = r.nextLocked()
	}
}

// Yield makes an export the default no more, in whatever state it is.
func (r *Registry) Yield(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.placedLocked(name); e != nil {
		e.spec.Default, e.chosen = false, 0
	}
}

// placedLocked is the export of that name that has a place, or that one is kept
// for, or nil.
func (r *Registry) placedLocked(name string) *entry {
	if e := r.byName[name]; e != nil && e.made > 0 {
		return e
	}
	return r.away[name]
}

// placeLocked gives e the place that was kept for it, or the next.
func (r *Registry) placeLocked(e *entry) {
	if old := r.away[e.spec.Name]; old != nil {
		e.place = old.place
		delete(r.away, e.spec.Name)
	} else {
		e.made = r.dueLocked(e)
	}
	r.chooseLocked(e)
}

// chooseLocked makes e the default, or makes it none, as it says.
func (r *Registry) chooseLocked(e *entry) {
	switch {
	case !e.spec.Default:
		e.chosen = 0
	case e.chosen == 0:
		e.chosen = r.nextLocked()
	}
}

func (r *Registry) nextLocked() int {
	r.count++
	return r.count
}

// defaultLocked is what the empty name opens for p, or nil: where a listener shows
// some exports, the first of them that p may open, or else, of those that are shown
// there, the last that was made the default, or the first. One that is away, hidden,
// or leaves, is not passed over: who had it would get the disk of another.
func (r *Registry) defaultLocked(p *transport.Peer) (first *entry) {
	names, all := []string(nil), true
	if p != nil {
		names, all = p.Scope.Names()
	}
	if all {
		return r.firstLocked(p)
	}
	known := learnt{lease: r.leaseLocked(p)}
	for _, name := range names {
		e := r.placedLocked(name)
		if e == nil || !e.spec.isAt(p) {
			continue
		}
		if access, _ := e.spec.accessOf(p, known); access != NoAccess {
			return e
		}
	}
	return nil
}

// firstLocked is what the empty name stands for to p at a listener that shows all
// exports but those with listeners of their own.
func (r *Registry) firstLocked(p *transport.Peer) (first *entry) {
	for _, list := range [...]map[string]*entry{r.byName, r.away} {
		for _, e := range list {
			if e.made > 0 && e.spec.isAt(p) && (first == nil || r.beforeLocked(e, first)) {
				first = e
			}
		}
	}
	return first
}

// beforeLocked tells whether the empty name stands for a rather than for b.
func (r *Registry) beforeLocked(a, b *entry) bool {
	return cmp.Or(
		cmp.Compare(b.chosen, a.chosen),
		cmp.Compare(r.rank[a.spec.Name], r.rank[b.spec.Name]),
		cmp.Compare(a.made, b.made)) < 0
}

// isAt tells whether the listener of p is one of those at which s can be seen, if
// there are such.
func (s *Spec) isAt(p *transport.Peer) bool {
	return p == nil || len(s.At) == 0 || slices.Contains(s.At, p.Scope)
}

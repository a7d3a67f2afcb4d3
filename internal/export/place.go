package export

import (
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

// placeLocked gives e the place that was kept for it, or the next.
func (r *Registry) placeLocked(e *entry) {
	if old := r.away[e.spec.Name]; old != nil {
		e.place = old.place
		delete(r.away, e.spec.Name)
	} else {
		e.made = r.nextLocked()
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
// there, the last that was made the default, or the first. One that is away, or
// leaves, is not passed over: who had it would get the disk of another.
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
		e := r.byName[name]
		if e == nil || e.made == 0 {
			e = r.away[name]
		}
		if e == nil {
			continue
		}
		if access, _ := e.rights(p, known); access != NoAccess {
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
			if e.made > 0 && e.spec.isAt(p) && (first == nil || e.before(first.place)) {
				first = e
			}
		}
	}
	return first
}

// isAt tells whether the listener of p is one of those at which s can be seen, if
// there are such.
func (s *Spec) isAt(p *transport.Peer) bool {
	return p == nil || len(s.At) == 0 || slices.Contains(s.At, p.Scope)
}

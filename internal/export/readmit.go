package export

// Readmit makes the export of an owner again what it was that a Remove has left in
// the state Draining, and tells whether there is such a one. Clients that were told
// to leave still do. While another Remove waits, that one has its way.
func (r *Registry) Readmit(name string, owner any) bool {
	r.mu.Lock()
	e := r.byName[name]
	if e == nil || e.spec.Owner != owner || e.state != Draining || e.removing > 0 || e.spec.Device == nil {
		r.mu.Unlock()
		return false
	}
	state := Ready
	if e.lost {
		state = Failed
	}
	e.state = state
	e.welcome()
	r.mu.Unlock()
	r.tell(name, state)
	return true
}

// Reveal is the end of Spec.Hidden for the export of an owner, if that is there.
func (r *Registry) Reveal(name string, owner any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.byName[name]; e != nil && e.spec.Owner == owner {
		e.spec.Hidden = false
	}
}

// removed is the end of a Remove that found e.
func (r *Registry) removed(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.removing--
}

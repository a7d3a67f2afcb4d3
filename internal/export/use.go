package export

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// use is one use of an export, which left ends.
type use struct {
	e      *entry
	p      *transport.Peer // nil for one of the process itself
	client bool            // it is not for information alone
	begun  uint64          // by Registry.begun
	spec   Spec            // of e when the use began
	deny   backing.Caps    // what p may not do
	known  learnt          // of p when the use began
	gone   context.Context
	leave  func() // ends gone, and frees it
	cut    context.Context
}

// use begins a use of an export by p. Whether what p has proved stands is asked when the
// use is there: who exchanges keys or certificates and calls Review then misses nobody.
func (r *Registry) use(name string, p *transport.Peer, client bool) (*use, error) {
	u, err := r.begin(name, p, client)
	if err == nil && !p.Stands() {
		r.left(u)
		return nil, nbd.ErrUnknownExport
	}
	return u, err
}

// begin is use by who has proved what it is.
func (r *Registry) begin(name string, p *transport.Peer, client bool) (*use, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, access, known, err := r.findLocked(name, p)
	if err != nil {
		return nil, err
	}
	if n := e.spec.Connections; client && n > 0 && e.clients >= n {
		return nil, errFull
	}
	r.begun++
	u := &use{e: e, p: p, client: client, begun: r.begun, spec: e.spec, deny: e.spec.denies(access) | e.spec.lacks(), known: known, cut: e.cut}
	if x := known.lease; x != nil {
		u.gone, u.leave = either(e.gone, x.gone)
	} else {
		u.gone, u.leave = context.WithCancel(e.gone)
	}
	e.uses[u] = struct{}{}
	if client {
		e.clients++
	}
	return u, nil
}

// still tells whether the peer would be given at least what u has, besides that
// u.gone may have ended. A token that was right when the use began still is; a lease
// gives nothing to a use that does not end with it.
func (r *Registry) still(u *use) bool {
	if !u.p.Stands() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if u.p != nil && !u.e.shownTo(u.p) {
		return false
	}
	access, byLease := u.e.spec.accessOf(u.p, learnt{token: u.known.token, lease: r.leaseLocked(u.p)})
	if byLease && u.known.lease == nil {
		return false
	}
	return access != NoAccess && u.deny.Has(u.e.spec.denies(access))
}

// left is the end of a use.
func (r *Registry) left(u *use) {
	u.leave()
	r.mu.Lock()
	defer r.mu.Unlock()
	e := u.e
	if u.client {
		e.clients--
	}
	if delete(e.uses, u); len(e.uses) == 0 && e.idle != nil {
		close(e.idle)
		e.idle = nil
	}
}

// Begun is for Review: the number of uses that have begun.
func (r *Registry) Begun() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.begun
}

// Review has those leave who have opened an export since Begun was n and would not
// be given now what they were given then, when what they have in flight is finished.
func (r *Registry) Review(n uint64) {
	for _, u := range r.since(n) {
		if !r.still(u) {
			u.leave()
		}
	}
}

// since are the uses that have begun after the first n, and have not ended.
func (r *Registry) since(n uint64) (list []*use) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.byName {
		for u := range e.uses {
			if u.begun > n {
				list = append(list, u)
			}
		}
	}
	return list
}

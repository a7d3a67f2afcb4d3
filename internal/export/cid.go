package export

import (
	"math"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// reserved tells whether a vsock peer is no guest, and has not come to a
// listener that is for processes of this host alone. The CIDs are that of the
// hypervisor, of processes of this host, of the host of which this one is a
// guest, and the one that means anybody (vsock(7)).
func reserved(p *transport.Peer) bool {
	return p.Kind == transport.VSock && !p.Loopback && (p.CID <= 2 || p.CID == math.MaxUint32)
}

// mayHaveCID reports whether g is for p as far as CIDs go. Whoever is on this
// host reaches its vsock ports, whatever their permissions say, and whoever is
// on the host above reaches them too: they match only grants that name them.
func (g *Grant) mayHaveCID(p *transport.Peer) bool {
	if p.Kind != transport.VSock {
		return len(g.CIDs) == 0
	}
	if len(g.CIDs) == 0 {
		return !reserved(p)
	}
	return slices.Contains(g.CIDs, p.CID)
}

// admits reports whether the grants may give p something: what is not known of
// a peer before it has greeted, its certificate, key and token, may be
// anything. x is the lease of its CID, or nil.
func admits(grants []Grant, p *transport.Peer, x *lease) bool {
	if len(grants) == 0 {
		return !reserved(p)
	}
	for i := range grants {
		g := grants[i]
		later := len(g.CertNames) > 0 || len(g.PSKs) > 0 || len(g.Tokens) > 0
		g.CertNames, g.PSKs = nil, nil
		switch {
		case !g.matches(p), !g.hasLease(x):
		case g.Access != NoAccess:
			return true
		case !later:
			return false
		}
	}
	return false
}

// Admits reports whether there is a reason to talk to a peer of which no more is
// known than its connection says. It is no for peers that no export of their
// listener can be for; where there is none at all, it is no for vsock peers
// that are no guests of this host.
func (r *Registry) Admits(p *transport.Peer) bool {
	if p.Kind == transport.Stdio {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	x := r.leaseLocked(p)
	alone := true
	for _, e := range r.byName {
		if !e.shownTo(p) {
			continue
		}
		if alone = false; admits(e.spec.Grants, p, x) {
			return true
		}
	}
	return alone && !reserved(p)
}

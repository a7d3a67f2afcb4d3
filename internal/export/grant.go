package export

import (
	"net/netip"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Access is what a peer may do with an export.
type Access uint8

const (
	NoAccess  Access = iota // it does not exist for the peer
	ReadOnly                // it can be read
	ReadWrite               // it can be written to as well, if it can at all
)

// Grant gives an access to the peers that it matches: those that have every
// fact it names, and of a list one. A peer without such a fact, as a TCP peer
// without a user, does not match.
type Grant struct {
	Access Access

	UIDs      []uint32
	GIDs      []uint32 // primary or supplementary
	CIDs      []uint32
	Addresses []netip.Prefix // an IPv4 address inside IPv6 counts as IPv4
	Label     string         // SELinux context, whole, in whatever words
	Types     []string       // SELinux type
	Level     string         // SELinux range, with exactly these categories
	CertNames []string       // common name, or one of the DNS names
	PSKs      []string       // identity of the pre-shared key
	Tokens    []Token        // that came with the name
	VMs       []string       // machine that has leased the CID
}

// learnt is what is known of a peer that its connection does not say.
type learnt struct {
	token *shownToken // nil for none
	lease *lease      // of its CID; nil for none
}

// matches reports whether p has every fact of g, besides what was learnt.
func (g *Grant) matches(p *transport.Peer) bool {
	unix := p.Kind == transport.Unix
	switch {
	case len(g.UIDs) > 0 && !(unix && p.UID != transport.OverflowID && slices.Contains(g.UIDs, p.UID)),
		len(g.GIDs) > 0 && !(unix && transport.IsMember(p.GID, p.Groups, g.GIDs)),
		!g.mayHaveCID(p),
		len(g.Addresses) > 0 && !g.hasAddress(p),
		!g.hasLabel(p),
		len(g.CertNames) > 0 && !g.hasCert(p),
		len(g.PSKs) > 0 && !(p.PSK != "" && slices.Contains(g.PSKs, p.PSK)):
		return false
	}
	return true
}

func (g *Grant) hasAddress(p *transport.Peer) bool {
	if p.Kind != transport.TCP {
		return false
	}
	a, err := netip.ParseAddrPort(p.Addr)
	if err != nil || a.Addr().Is4In6() && a.Addr().Zone() != "" { // zones are for IPv6 (RFC 4007)
		return false
	}
	ip := a.Addr().Unmap().WithZone("")
	return slices.ContainsFunc(g.Addresses, func(x netip.Prefix) bool { return x.Contains(ip) })
}

func (g *Grant) hasCert(p *transport.Peer) bool {
	if p.Cert == nil {
		return false
	}
	return slices.Contains(g.CertNames, p.Cert.Subject.CommonName) ||
		slices.ContainsFunc(p.Cert.DNSNames, func(n string) bool { return slices.Contains(g.CertNames, n) })
}

// accessOf is what the first grant that matches gives, and with no grants at
// all everything, except to vsock peers that are no guests. Vsock peers write
// only by a grant that proves who they are, or where their CIDs are trusted:
// any other that gives writing lets them read. byLease says that the grant
// depends on the lease.
func (s *Settings) accessOf(p *transport.Peer, known learnt) (access Access, byLease bool) {
	g := &Grant{Access: ReadWrite}
	if len(s.Grants) > 0 {
		i := slices.IndexFunc(s.Grants, func(g Grant) bool {
			return p != nil && g.matches(p) && g.hasToken(known.token) && g.hasLease(known.lease)
		})
		if i < 0 {
			return NoAccess, false
		}
		g = &s.Grants[i]
	} else if p != nil && reserved(p) {
		return NoAccess, false
	}
	access = g.Access
	if access == ReadWrite && p != nil && p.Kind == transport.VSock && !s.TrustCID && !g.proves() {
		access = ReadOnly
	}
	return access, len(g.VMs) > 0
}

// proves reports whether a vsock peer that matches is more than its CID says:
// the machine that has leased it, and the holder of a secret.
func (g *Grant) proves() bool {
	return len(g.VMs) > 0 && len(g.PSKs)+len(g.Tokens) > 0
}

// hasLease reports whether x is of one of the machines of g, if g names any.
func (g *Grant) hasLease(x *lease) bool {
	return len(g.VMs) == 0 || x != nil && slices.Contains(g.VMs, x.VM)
}

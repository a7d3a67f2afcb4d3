package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ParseAddress reads an IP address, which stands for itself alone, or a
// prefix. An IPv4 address inside IPv6 becomes the IPv4 address. Zones, and
// prefixes that are not zero behind their length, are errors.
func ParseAddress(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			return netip.Prefix{}, fmt.Errorf("%q is not an IP address", cut(s))
		case a.Zone() != "":
			return netip.Prefix{}, fmt.Errorf("%q has a zone", cut(s))
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not an IP address with the length of a prefix", cut(s))
	}
	if p.Addr().Is4In6() {
		const mapped = 96
		if p.Bits() < mapped {
			return netip.Prefix{}, fmt.Errorf("%q has IPv4 addresses and others", s)
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mapped)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%q: did you mean %v?", s, p.Masked())
	}
	return p, nil
}

// Token is what a grant has of a token.
type Token struct {
	SHA256  [sha256.Size]byte
	Expires time.Time // in UTC, whole seconds; zero for never
}

// String is what ParseToken reads.
func (t Token) String() string {
	s := hex.EncodeToString(t.SHA256[:])
	if !t.Expires.IsZero() {
		s += "@" + t.Expires.UTC().Format(time.RFC3339)
	}
	return s
}

// ParseToken reads the SHA-256 of a token, and the time when it expires behind
// an @, if it does. Errors do not repeat what was read: it may be the token
// itself.
func ParseToken(s string) (t Token, err error) {
	digits, expires, limited := strings.Cut(s, "@")
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != len(t.SHA256) {
		return t, errors.New("want the 64 hexadecimal digits of a SHA-256")
	}
	t.SHA256 = [sha256.Size]byte(b)
	if limited {
		t.Expires, err = ParseExpiry(expires)
	}
	return t, err
}

// ParseExpiry reads a time of RFC 3339 in whole seconds, before the year 10000.
func ParseExpiry(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if t = t.UTC(); err != nil || t.Nanosecond() != 0 || t.Year() < 1 || t.Year() > 9999 || t.IsZero() {
		return time.Time{}, errors.New("want a time in whole seconds, as 2026-11-21T12:00:00Z")
	}
	return t, nil
}

// checkGrants looks at all grants; vsock tells that no other peers reach the
// export.
func (e *Export) checkGrants(k checker, vsock bool) {
	everybody := 0
	trusts := e.TrustCID || e.ReadOnly
	if vsock && len(e.Grants) == 0 && !trusts {
		k.fail("%s", needProof(new(Grant)))
	}
	for i := range e.Grants {
		in := k.in("grant %d", i+1)
		g := &e.Grants[i]
		g.check(in)
		if lack := needProof(g); lack != "" && g.Access == "rw" && (g.ofVsock() || vsock && !g.ofOthers()) && !trusts {
			in.fail("%s", lack)
		}
		if everybody > 0 {
			in.fail("it is never reached: grant %d is for everybody", everybody)
		} else if e.Grants[i].everybody() {
			everybody = i + 1
		}
	}
}

// needProof says what g lacks to let a vsock peer write, if it lacks something:
// a lease of the CID, which is free again when its machine has ended, and a
// secret of the peer. See export.Settings, which decides.
func needProof(g *Grant) string {
	var lack []string
	if len(g.VMs) == 0 {
		lack = append(lack, "vm")
	}
	if len(g.PSKs)+len(g.Tokens) == 0 {
		lack = append(lack, "psk or token-sha256")
	}
	if lack == nil {
		return ""
	}
	return "writing over vsock needs " + strings.Join(lack, ", and ") + ", or an export with vsock-trust-cid = true"
}

// ReadOnlyOverVsock tells whether what lets others write lets vsock peers read,
// because it does not ask for what they need.
func (e *Export) ReadOnlyOverVsock() bool {
	lacks := func(g Grant) bool { return g.Access == "rw" && !g.ofOthers() && needProof(&g) != "" }
	return !e.ReadOnly && !e.TrustCID && (len(e.Grants) == 0 || slices.ContainsFunc(e.Grants, lacks))
}

// ofVsock tells whether g names what only vsock peers have.
func (g *Grant) ofVsock() bool { return len(g.CIDs)+len(g.VMs) > 0 }

// ofUnix tells whether g names what only peers at Unix sockets have.
func (g *Grant) ofUnix() bool { return len(g.UIDs)+len(g.GIDs) > 0 || g.hasLabel() }

// ofOthers tells whether g names what no vsock peer has.
func (g *Grant) ofOthers() bool { return g.ofUnix() || len(g.Addresses) > 0 }

// everybody tells whether g names no fact.
func (g *Grant) everybody() bool {
	return len(g.UIDs)+len(g.GIDs)+len(g.CIDs)+len(g.Addresses)+len(g.CertNames)+len(g.PSKs)+len(g.Tokens)+len(g.VMs) == 0 && !g.hasLabel()
}

// overflowID is in place of the users and groups that a user namespace does not
// know (user_namespaces(7)). It matches no peer, not even to keep it out.
const overflowID = 65534

// check also refuses facts that exclude each other: a peer has an IP address,
// or a CID, or a user.
func (g *Grant) check(k checker) {
	k.word("access", g.Access, "rw", "ro", "none")
	kinds := 0
	for _, n := range [...]struct {
		key string
		n   int
	}{{"uid", len(g.UIDs)}, {"gid", len(g.GIDs)}, {"cid", len(g.CIDs)}, {"address", len(g.Addresses)}, {"cert-name", len(g.CertNames)}, {"psk", len(g.PSKs)}, {"token-sha256", len(g.Tokens)}, {"vm", len(g.VMs)}} {
		k.most(n.key, n.n, limits.GrantFacts)
	}
	for _, local := range [...]bool{g.ofUnix(), g.ofVsock(), len(g.Addresses) > 0} {
		if local {
			kinds++
		}
	}
	if kinds > 1 {
		k.fail("no peer matches: uid, gid and label are of Unix sockets, cid and vm of vsock, address of TCP")
	}
	for _, cid := range g.CIDs {
		if cid == math.MaxUint32 {
			k.fail("cid: %d is no address of anybody", cid)
		}
	}
	if slices.Contains(g.UIDs, overflowID) {
		k.fail("uid: %d stands for every user that is not known here", overflowID)
	}
	if slices.Contains(g.GIDs, overflowID) {
		k.fail("gid: %d stands for every group that is not known here", overflowID)
	}
	for _, a := range g.Addresses {
		if _, err := ParseAddress(a); err != nil {
			k.fail("address: %v", err)
		}
	}
	g.checkLabel(k)
	for _, name := range g.CertNames {
		if k.text("cert-name", name, limits.MaxString, "") && name == "" {
			k.fail("cert-name: it is empty")
		}
	}
	for _, id := range g.PSKs {
		if k.text("psk", id, limits.PSKIdentity, "") && id == "" {
			k.fail("psk: it is empty")
		}
	}
	for _, vm := range g.VMs {
		if k.text("vm", vm, limits.LeaseName, "") && vm == "" {
			k.fail("vm: it is empty")
		}
	}
	for _, t := range g.Tokens {
		if _, err := ParseToken(t); err != nil {
			k.fail("token-sha256: %v", err)
		}
	}
	if len(g.PSKs) > 0 && len(g.CertNames) > 0 {
		k.fail("no peer matches: who proves a key shows no certificate")
	}
}

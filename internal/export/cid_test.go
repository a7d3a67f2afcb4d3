package export

import (
	"math"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestPeersThatAreNoGuestsNeedToBeNamed: a process of this host, or of the one
// above, gets nothing for being anybody.
func TestPeersThatAreNoGuestsNeedToBeNamed(t *testing.T) {
	const guest = 42
	everybody := Grant{Access: ReadWrite}
	local := Grant{Access: ReadOnly, CIDs: []uint32{1}}
	for _, tt := range []struct {
		name   string
		grants []Grant
		cid    uint32
		want   Access
	}{
		{"a guest without grants", nil, guest, ReadWrite},
		{"the hypervisor without grants", nil, 0, NoAccess},
		{"a local process without grants", nil, 1, NoAccess},
		{"the host above without grants", nil, 2, NoAccess},
		{"nobody's CID without grants", nil, math.MaxUint32, NoAccess},
		{"a guest by the grant for everybody", []Grant{everybody}, guest, ReadWrite},
		{"a local process by the grant for everybody", []Grant{everybody}, 1, NoAccess},
		{"the host above by the grant for everybody", []Grant{everybody}, 2, NoAccess},
		{"a local process that is named", []Grant{local, everybody}, 1, ReadOnly},
		{"another one than is named", []Grant{local, everybody}, 2, NoAccess},
		{"a guest that is not named", []Grant{{Access: ReadWrite, CIDs: []uint32{43}}}, guest, NoAccess},
	} {
		p := &transport.Peer{Kind: transport.VSock, CID: tt.cid}
		if got := given(tt.grants, p); got != tt.want {
			t.Errorf("%s: access %v, want %v", tt.name, got, tt.want)
		}
		if got := admits(tt.grants, p, nil); got != (tt.want != NoAccess) {
			t.Errorf("%s: admitted is %v, access %v", tt.name, got, tt.want)
		}
	}
	here := &transport.Peer{Kind: transport.VSock, CID: 1, Loopback: true}
	if got := given(nil, here); got != ReadWrite || !admits(nil, here, nil) {
		t.Errorf("access %v at a listener for processes of this host", got)
	}
	for _, p := range []*transport.Peer{{Kind: transport.Unix}, {Kind: transport.TCP}, nil} {
		if got := given(nil, p); got != ReadWrite {
			t.Errorf("%v: access %v without grants", p, got)
		}
	}
}

// TestPeerMayShowItsKeyBeforeItIsRefused: what decides may come later.
func TestPeerMayShowItsKeyBeforeItIsRefused(t *testing.T) {
	p := &transport.Peer{Kind: transport.VSock, CID: 42}
	for _, tt := range []struct {
		name   string
		grants []Grant
		want   bool
	}{
		{"a certificate opens", []Grant{{Access: ReadWrite, CertNames: []string{"vm1"}}}, true},
		{"a certificate of another CID opens", []Grant{{Access: ReadWrite, CIDs: []uint32{43}, CertNames: []string{"vm1"}}}, false},
		{"a certificate closes, everybody else may", []Grant{{Access: NoAccess, CertNames: []string{"vm1"}}, {Access: ReadOnly}}, true},
		{"the CID closes, everybody else may", []Grant{{Access: NoAccess, CIDs: []uint32{42}}, {Access: ReadOnly}}, false},
		{"a user of a Unix socket may", []Grant{{Access: ReadWrite, UIDs: []uint32{0}}}, false},
		{"a certificate closes, nobody may", []Grant{{Access: NoAccess, CertNames: []string{"vm1"}}}, false},
	} {
		if got := admits(tt.grants, p, nil); got != tt.want {
			t.Errorf("%s: admitted is %v, want %v", tt.name, got, tt.want)
		}
	}
}

// given is the access of a peer of which nothing was learnt, where CIDs are
// trusted.
func given(grants []Grant, p *transport.Peer) Access {
	s := Settings{Grants: grants, TrustCID: true}
	access, _ := s.accessOf(p, learnt{})
	return access
}

// TestCIDAloneDoesNotWrite: writing over vsock takes a lease, and a key or a
// token, unless CIDs are trusted; peers of other kinds need none of these. What
// does not suffice to write suffices to read.
func TestCIDAloneDoesNotWrite(t *testing.T) {
	const guest = 42
	token := digest{1}
	x := &lease{Lease: Lease{CID: guest, VM: "vm"}}
	for _, tt := range []struct {
		name  string
		grant *Grant // nil for none
		want  Access
	}{
		{"no grant", nil, ReadOnly},
		{"everybody", &Grant{}, ReadOnly},
		{"a CID", &Grant{CIDs: []uint32{guest}}, ReadOnly},
		{"a lease", &Grant{VMs: []string{"vm"}}, ReadOnly},
		{"a key", &Grant{PSKs: []string{"id"}}, ReadOnly},
		{"a token", &Grant{Tokens: []Token{{SHA256: token}}}, ReadOnly},
		{"a CID, a key and a token", &Grant{CIDs: []uint32{guest}, PSKs: []string{"id"}, Tokens: []Token{{SHA256: token}}}, ReadOnly},
		{"a lease and a key", &Grant{VMs: []string{"vm"}, PSKs: []string{"id"}}, ReadWrite},
		{"a lease and a token", &Grant{VMs: []string{"vm"}, Tokens: []Token{{SHA256: token}}}, ReadWrite},
		{"a lease and a key that it has not", &Grant{VMs: []string{"vm"}, PSKs: []string{"other"}}, NoAccess},
		{"a lease that it has not, and a key", &Grant{VMs: []string{"other"}, PSKs: []string{"id"}}, NoAccess},
	} {
		var s Settings
		if tt.grant != nil {
			tt.grant.Access = ReadWrite
			s.Grants = []Grant{*tt.grant}
		}
		p := &transport.Peer{Kind: transport.VSock, CID: guest, PSK: "id"}
		known := learnt{token: &shownToken{digest: token}, lease: x}
		if got, _ := s.accessOf(p, known); got != tt.want {
			t.Errorf("%s: access %v, want %v", tt.name, got, tt.want)
		}
		want := tt.want
		if want == ReadOnly {
			want = ReadWrite
		}
		s.TrustCID = true
		if got, _ := s.accessOf(p, known); got != want {
			t.Errorf("%s, CIDs are trusted: access %v, want %v", tt.name, got, want)
		}
	}
	for _, p := range []*transport.Peer{{Kind: transport.Unix}, {Kind: transport.TCP}} {
		for _, s := range []Settings{{}, {Grants: []Grant{{Access: ReadWrite}}}} {
			if got, _ := s.accessOf(p, learnt{}); got != ReadWrite {
				t.Errorf("%v: access %v, want writing", p, got)
			}
		}
	}
	loopback := &transport.Peer{Kind: transport.VSock, CID: 1, Loopback: true}
	if got, _ := new(Settings).accessOf(loopback, learnt{}); got != ReadOnly {
		t.Errorf("a process of this host: access %v, want reading", got)
	}
}

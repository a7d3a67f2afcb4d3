package export

import (
	"crypto/sha256"
	"net/netip"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestNobodyIsGreetedInVain is AU-13: a peer that no grant can be for is not
// talked to, and one that may still show a certificate, a key or a token is.
func TestNobodyIsGreetedInVain(t *testing.T) {
	alice, bob := &transport.Peer{Kind: transport.Unix, UID: 7}, &transport.Peer{Kind: transport.Unix, UID: 8}
	near, far := &transport.Peer{Kind: transport.TCP, Addr: "10.0.0.1:5"}, &transport.Peer{Kind: transport.TCP, Addr: "192.0.2.1:5"}
	for _, tt := range []struct {
		name   string
		grants []Grant
		yes    []*transport.Peer
		no     []*transport.Peer
	}{
		{"no grants", nil, []*transport.Peer{alice, bob, near, far, {Kind: transport.Stdio}}, nil},
		{"a user", []Grant{{Access: ReadOnly, UIDs: []uint32{7}}}, []*transport.Peer{alice, {Kind: transport.Stdio}}, []*transport.Peer{bob, near}},
		{"a network", []Grant{{Access: ReadOnly, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}, []*transport.Peer{near}, []*transport.Peer{far, alice}},
		{"a certificate", []Grant{{Access: ReadOnly, CertNames: []string{"x"}}}, []*transport.Peer{alice, near, far}, nil},
		{"a key, of a network", []Grant{{Access: ReadOnly, PSKs: []string{"x"}, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}, []*transport.Peer{near}, []*transport.Peer{far}},
		{"a token", []Grant{{Access: ReadOnly, Tokens: []Token{{SHA256: sha256.Sum256(nil)}}}}, []*transport.Peer{alice, far}, nil},
		{"none but some", []Grant{{Access: NoAccess, UIDs: []uint32{8}}, {Access: ReadWrite}}, []*transport.Peer{alice, near}, []*transport.Peer{bob}},
		{"none with a certificate", []Grant{{Access: NoAccess, CertNames: []string{"x"}}, {Access: ReadWrite}}, []*transport.Peer{alice, far}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := NewRegistry()
			if err := r.Add(Spec{Name: "a", Device: mem.New(4096, nil), Settings: Settings{Grants: tt.grants}}); err != nil {
				t.Fatal(err)
			}
			for _, p := range tt.yes {
				if !r.Admits(p) {
					t.Errorf("%v is refused", p)
				}
			}
			for _, p := range tt.no {
				if r.Admits(p) {
					t.Errorf("%v is admitted", p)
				}
			}
		})
	}
}

func TestPeerIsAdmittedForWhatItsListenerShows(t *testing.T) {
	r := NewRegistry()
	for name, uid := range map[string]uint32{"a": 7, "b": 8} {
		s := Spec{Name: name, Device: mem.New(4096, nil), Settings: Settings{Grants: []Grant{{Access: ReadOnly, UIDs: []uint32{uid}}}}}
		if err := r.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	var all, front, empty transport.Scope
	front.Show("a")
	empty.Show("c")
	for at, want := range map[*transport.Scope]bool{nil: true, &all: true, &front: false, &empty: true} {
		if got := r.Admits(&transport.Peer{Kind: transport.Unix, UID: 8, Scope: at}); got != want {
			names, _ := at.Names()
			t.Errorf("user 8 at a listener of %q: admitted %v, want %v", names, got, want)
		}
	}
}

package export

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

var _ nbd.Exports = (*Registry)(nil)

// recorder notes what happens to a device.
type recorder struct {
	backing.Device
	calls []string
}

func (r *recorder) Flush(ctx context.Context) error {
	r.calls = append(r.calls, "flush")
	return r.Device.Flush(ctx)
}

func (r *recorder) Close() error {
	r.calls = append(r.calls, "close")
	return r.Device.Close()
}

func add(t *testing.T, r *Registry, s Spec) {
	t.Helper()
	if s.Device == nil {
		s.Device = mem.New(1<<20, nil)
	}
	if err := r.Add(s); err != nil {
		t.Fatal(err)
	}
}

func TestEmptyNameOpensTheFirstExport(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "b"})
	add(t, r, Spec{Name: "a"})
	x, err := r.Find("", nil)
	if err != nil || x.Name != "b" {
		t.Errorf("got %q, %v; want b", x.Name, err)
	}
}

func TestListIsSorted(t *testing.T) {
	r := NewRegistry()
	for _, n := range []string{"c", "a", "b"} {
		add(t, r, Spec{Name: n, Settings: Settings{Description: "disk " + n}})
	}
	var got []string
	for _, x := range r.List(nil) {
		got = append(got, x.Name+":"+x.Description)
	}
	if s := strings.Join(got, " "); s != "a:disk a b:disk b c:disk c" {
		t.Errorf("got %q", s)
	}
}

func TestUnknownNameIsUnknown(t *testing.T) {
	r := NewRegistry()
	if _, err := r.Find("", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("empty registry: got %v", err)
	}
	add(t, r, Spec{Name: "a"})
	if _, err := r.Open(t.Context(), "A", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("other name: got %v", err)
	}
}

func TestBadSpecsAreRefused(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a"})
	long := strings.Repeat("x", limits.MaxString+1)
	for _, s := range []Spec{{Name: "a"}, {Name: long}, {Name: "\xff"}, {Name: "b", Settings: Settings{Description: long}}, {Name: "b", Settings: Settings{Description: "\xff"}}} {
		s.Device = mem.New(1, nil)
		if err := r.Add(s); err == nil {
			t.Errorf("%.20q was accepted", s.Name)
		}
	}
	if err := r.Add(Spec{Name: "a"}); !errors.Is(err, ErrExists) {
		t.Errorf("second a: got %v, want %v", err, ErrExists)
	}
}

func TestReadOnlyExportHasNoRightToWrite(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a", Settings: Settings{ReadOnly: true}})
	x, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if err := x.Device.WriteAt(t.Context(), make([]byte, 512), 0, 0); !errors.Is(err, backing.ErrReadOnly) {
		t.Errorf("write: got %v, want %v", err, backing.ErrReadOnly)
	}
}

func TestCloseWaitsFlushesAndCloses(t *testing.T) {
	r := NewRegistry()
	rw := &recorder{Device: mem.New(1, nil)}
	add(t, r, Spec{Name: "rw", Device: rw})
	x, err := r.Open(t.Context(), "rw", nil)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- r.Close(context.Background()) }()
	select {
	case <-closed:
		t.Fatal("closed under a user")
	default:
	}
	x.Close()
	x.Close() // twice is once
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if got := strings.Join(rw.calls, " "); got != "flush close" {
		t.Errorf("writable device: got %q, want flush close", got)
	}
	if _, err := r.Open(t.Context(), "rw", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open after close: got %v", err)
	}
}

// names are what a peer can see.
func names(r *Registry, p *transport.Peer) string {
	var got []string
	for _, x := range r.List(p) {
		got = append(got, x.Name)
	}
	return strings.Join(got, " ")
}

// TestGrantsDecideWhatExists: the first that matches decides, and what a peer
// may not see is unknown to it.
func TestGrantsDecideWhatExists(t *testing.T) {
	r := NewRegistry()
	grants := []Grant{
		{Access: NoAccess, UIDs: []uint32{7}},
		{Access: ReadOnly, UIDs: []uint32{7, 8}},
		{Access: ReadWrite, Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.0.1/32")}},
		{Access: ReadOnly, Addresses: []netip.Prefix{netip.MustParsePrefix("fe80::/64")}},
		{Access: ReadWrite, CIDs: []uint32{42}, Label: "x"},
		{Access: ReadWrite, CertNames: []string{"host.example"}},
		{Access: ReadOnly, GIDs: []uint32{36, 65534}},
		{Access: ReadOnly, UIDs: []uint32{65534}},
		{Access: ReadWrite, GIDs: []uint32{37}},
	}
	add(t, r, Spec{Name: "a", Settings: Settings{Grants: grants, TrustCID: true}})
	tcp := func(a string) *transport.Peer { return &transport.Peer{Kind: transport.TCP, Addr: a} }
	cert := tcp("10.0.0.1:1")
	cert.Cert = &x509.Certificate{DNSNames: []string{"host.example"}}
	for _, tt := range []struct {
		name string
		peer *transport.Peer
		want Access
	}{
		{"denied first", &transport.Peer{Kind: transport.Unix, UID: 7}, NoAccess},
		{"read-only user", &transport.Peer{Kind: transport.Unix, UID: 8}, ReadOnly},
		{"UID of a peer that has none", &transport.Peer{Kind: transport.VSock, UID: 8}, NoAccess},
		{"own group", &transport.Peer{Kind: transport.Unix, UID: 9, GID: 37}, ReadWrite},
		{"supplementary group", &transport.Peer{Kind: transport.Unix, UID: 9, GID: 9, Groups: []uint32{5, 37}}, ReadWrite},
		{"groups of two grants", &transport.Peer{Kind: transport.Unix, UID: 9, GID: 37, Groups: []uint32{36}}, ReadOnly},
		{"other groups", &transport.Peer{Kind: transport.Unix, UID: 37, GID: 9, Groups: []uint32{5, 38}}, NoAccess},
		{"groups that nobody knows", &transport.Peer{Kind: transport.Unix, UID: 9, GID: 65534, Groups: []uint32{65534}}, NoAccess},
		{"user that nobody knows", &transport.Peer{Kind: transport.Unix, UID: 65534, GID: 9}, NoAccess},
		{"user that nobody knows, of a known group", &transport.Peer{Kind: transport.Unix, UID: 65534, GID: 37}, ReadWrite},
		{"group of a peer that has none", &transport.Peer{Kind: transport.VSock, GID: 37, Groups: []uint32{37}}, NoAccess},
		{"address", tcp("192.168.0.1:99"), ReadWrite},
		{"longer address", tcp("192.168.0.10:99"), NoAccess},
		{"mapped address", tcp("[::ffff:192.168.0.1]:99"), ReadWrite},
		{"mapped address with a zone", tcp("[::ffff:192.168.0.1%lo]:99"), NoAccess},
		{"IPv4 address with a zone", tcp("192.168.0.1%lo:99"), NoAccess},
		{"link-local address", tcp("[fe80::1%2]:99"), ReadOnly},
		{"half of the facts", &transport.Peer{Kind: transport.VSock, CID: 42}, NoAccess},
		{"all facts", &transport.Peer{Kind: transport.VSock, CID: 42, Label: "x"}, ReadWrite},
		{"certificate", cert, ReadWrite},
		{"nothing known", &transport.Peer{Kind: transport.Stdio}, NoAccess},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x, err := r.Open(t.Context(), "a", tt.peer)
			if visible := names(r, tt.peer) == "a"; visible != (tt.want != NoAccess) || (err == nil) != visible {
				t.Fatalf("visible %v, open %v; want access %d", visible, err, tt.want)
			}
			if err != nil {
				if err != nbd.ErrUnknownExport {
					t.Errorf("got %v, want %v", err, nbd.ErrUnknownExport)
				}
				return
			}
			defer x.Close()
			if got := x.Device.Info().Caps.Has(backing.CanWrite); got != (tt.want == ReadWrite) {
				t.Errorf("may write: got %v, want %v", got, tt.want == ReadWrite)
			}
		})
	}
}

// TestUseKnowsWhetherItsRightsAreStillGiven: what was taken away since, not what
// was added.
func TestUseKnowsWhetherItsRightsAreStillGiven(t *testing.T) {
	token := strings.Repeat("a5", limits.TokenDigits/2)
	peer := &transport.Peer{Kind: transport.Unix, UID: 7}
	of := func(a Access) []Grant { return []Grant{{Access: a, UIDs: []uint32{7}}} }
	byToken := []Grant{{Access: ReadWrite, Tokens: []Token{{SHA256: sha256.Sum256([]byte(token))}}}}
	for _, tt := range []struct {
		name   string
		open   string
		grants []Grant
		change func(*Settings)
		want   bool
	}{
		{"nothing", "a", of(ReadWrite), func(*Settings) {}, true},
		{"no rights", "a", of(ReadWrite), func(s *Settings) { s.Grants = of(NoAccess) }, false},
		{"another user's", "a", of(ReadOnly), func(s *Settings) { s.Grants[0].UIDs = []uint32{8} }, false},
		{"reading is left", "a", of(ReadWrite), func(s *Settings) { s.Grants = of(ReadOnly) }, false},
		{"read-only", "a", of(ReadWrite), func(s *Settings) { s.ReadOnly = true }, false},
		{"writing is added", "a", of(ReadOnly), func(s *Settings) { s.Grants = of(ReadWrite) }, true},
		{"a reader of what is read-only now", "a", of(ReadOnly), func(s *Settings) { s.ReadOnly = true }, true},
		{"the same token", "a?" + token, byToken, func(*Settings) {}, true},
		{"another token", "a?" + token, byToken, func(s *Settings) { s.Grants = []Grant{{Access: ReadWrite, Tokens: []Token{{}}}} }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := NewRegistry()
			add(t, r, Spec{Name: "a", Settings: Settings{Grants: slices.Clone(tt.grants)}})
			x, err := r.Open(t.Context(), tt.open, peer)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			if err := r.Update("a", tt.change); err != nil {
				t.Fatal(err)
			}
			if got := x.Still(); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// TestReviewHasThoseLeaveWhoWouldNotBeLetIn, of those who came since a moment: who was
// there before stays, and so does who has all that it had.
func TestReviewHasThoseLeaveWhoWouldNotBeLetIn(t *testing.T) {
	of := func(a Access) []Grant { return []Grant{{Access: a, UIDs: []uint32{7}}} }
	var scope transport.Scope
	peer := &transport.Peer{Kind: transport.Unix, UID: 7, Scope: &scope}
	for _, tt := range []struct {
		name   string
		change func(*Settings)
		leaves bool
	}{
		{"nothing", func(*Settings) {}, false},
		{"no rights", func(s *Settings) { s.Grants = of(NoAccess) }, true},
		{"reading is left", func(s *Settings) { s.Grants = of(ReadOnly) }, true},
		{"read-only", func(s *Settings) { s.ReadOnly = true }, true},
		{"another listener", func(*Settings) { scope.Show("b") }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			scope.ShowAll()
			r := NewRegistry()
			open := func() *nbd.Export {
				t.Helper()
				x, err := r.Open(t.Context(), "a", peer)
				if err != nil {
					t.Fatal(err)
				}
				return x
			}
			add(t, r, Spec{Name: "a", Settings: Settings{Grants: of(ReadWrite)}})
			before := open()
			defer before.Close()
			n := r.Begun()
			since := open()
			defer since.Close()
			if err := r.Update("a", tt.change); err != nil {
				t.Fatal(err)
			}
			r.Review(n)
			if before.Gone.Err() != nil {
				t.Error("who was there before is told to leave")
			}
			if got := since.Gone.Err() != nil; got != tt.leaves {
				t.Errorf("who came since is told to leave: got %t, want %t", got, tt.leaves)
			}
		})
	}
}

// TestWhoseProofDoesNotStandFindsNothing, and what it has opened before knows it.
func TestWhoseProofDoesNotStandFindsNothing(t *testing.T) {
	stands := true
	peer := &transport.Peer{Kind: transport.Unix, PSK: "vm1", Proof: func() bool { return stands }}
	r := NewRegistry()
	add(t, r, Spec{Name: "a", Settings: Settings{Grants: []Grant{{Access: ReadWrite, PSKs: []string{"vm1"}}}}})
	var x *nbd.Export
	for _, stands = range []bool{true, false} {
		_, found := r.Find("a", peer)
		opened, err := r.Open(t.Context(), "a", peer)
		if err == nil {
			defer opened.Close()
			x = opened
		}
		if n := len(r.List(peer)); (n == 1) != stands || (found == nil) != stands || (err == nil) != stands {
			t.Errorf("stands: %t: %d exports are listed, find: %v, open: %v", stands, n, found, err)
		}
	}
	if x.Still() || x.Gone.Err() != nil {
		t.Errorf("who has opened it before: still %t, told to leave: %v", x.Still(), x.Gone.Err())
	}
	r.Review(r.Begun())
	if x.Gone.Err() != nil {
		t.Error("who was there before a review is told to leave")
	}
	if r.Review(0); x.Gone.Err() == nil {
		t.Error("who has come since is not told to leave")
	}
	if s, _ := r.StatusOf("a"); s.Clients != 1 {
		t.Errorf("got %d clients, want 1", s.Clients)
	}
}

// TestListenerOfAnExportShowsNothingElse: and the export is not to be seen at
// others. Who came in by a listener that is closed sees nothing.
func TestListenerOfAnExportShowsNothingElse(t *testing.T) {
	r := NewRegistry()
	var l1, l2, closed transport.Scope
	l1.Show("own")
	closed.Show()
	add(t, r, Spec{Name: "common"})
	add(t, r, Spec{Name: "own", At: []*transport.Scope{&l1}})
	for i, tt := range []struct {
		at   *transport.Scope
		want string
	}{{&l1, "own"}, {&l2, "common"}, {nil, "common"}, {&closed, ""}} {
		p := &transport.Peer{Scope: tt.at}
		if got := names(r, p); got != tt.want {
			t.Errorf("listener %d: got %q, want %q", i, got, tt.want)
		}
		if x, err := r.Find("", p); x.Name != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("default at listener %d: got %q, %v, want %q", i, x.Name, err, tt.want)
		}
	}
}

// TestDefaultIsWhatIsSaidNow: the last that was made it, or else the first that is
// there.
func TestDefaultIsWhatIsSaidNow(t *testing.T) {
	r := NewRegistry()
	for _, name := range []string{"a", "b", "c"} {
		add(t, r, Spec{Name: name, Settings: Settings{Default: name == "b"}})
	}
	is := func(what, want string) {
		t.Helper()
		if x, err := r.Find("", nil); err != nil || x.Name != want {
			t.Errorf("%s: got %q, %v, want %q", what, x.Name, err, want)
		}
	}
	choose := func(name string, is bool) {
		t.Helper()
		if err := r.Update(name, func(s *Settings) { s.Default = is }); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := r.Remove(t.Context(), name, nil, false); err != nil {
			t.Fatal(err)
		}
	}
	is("one is made it", "b")
	choose("c", true)
	is("another is made it", "c")
	choose("c", false)
	is("the other is it no more", "b")
	remove("b")
	is("what was it is gone", "a")
	remove("a")
	is("the first is gone", "c")
}

// used is a registry with an export "a" that somebody has opened, and the states
// that it tells of.
func used(t *testing.T) (r *Registry, dev *recorder, x *nbd.Export, states *[]string) {
	t.Helper()
	r, states = NewRegistry(), new([]string)
	r.Changed = func(_ string, s State) { *states = append(*states, string(s)) }
	dev = &recorder{Device: mem.New(1, nil)}
	add(t, r, Spec{Name: "a", Device: dev})
	x, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	return r, dev, x, states
}

func TestRemoveWaitsForThoseWhoLeave(t *testing.T) {
	r, dev, x, states := used(t)
	if err := r.Remove(t.Context(), "a", nil, false); !errors.Is(err, ErrInUse) {
		t.Errorf("remove of an export in use: got %v, want %v", err, ErrInUse)
	}
	hasty, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Remove(hasty, "a", nil, true); !errors.Is(err, ErrInUse) || !errors.Is(err, context.Canceled) {
		t.Errorf("forced remove that may not wait: got %v, want %v", err, ErrInUse)
	}
	if x.Gone.Err() == nil {
		t.Error("the user was not told to leave")
	}
	if _, err := r.Open(t.Context(), "a", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open while it goes: got %v, want %v", err, nbd.ErrUnknownExport)
	}
	removed := make(chan error)
	go func() { removed <- r.Remove(context.Background(), "a", nil, true) }()
	x.Close()
	if err := <-removed; err != nil {
		t.Error(err)
	}
	if got := strings.Join(dev.calls, " "); got != "flush close" {
		t.Errorf("device: got %q, want flush close", got)
	}
	if got := strings.Join(*states, " "); got != "opening ready draining closed" {
		t.Errorf("states: got %q", got)
	}
	add(t, r, Spec{Name: "a"}) // the name is free again
}

// TestFailedExportStaysWithItsUsers: until it is removed, without a flush that
// could only fail.
func TestFailedExportStaysWithItsUsers(t *testing.T) {
	r, dev, x, states := used(t)
	r.Fail("a")
	r.Fail("a")
	r.Fail("b")
	if x.Gone.Err() != nil {
		t.Error("the user was told to leave")
	}
	if s, ok := r.StatusOf("a"); !ok || s.State != Failed || s.Clients != 1 || s.Info.Size != 1 {
		t.Errorf("status: got %+v, %v", s, ok)
	}
	if _, err := r.Open(t.Context(), "a", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open: got %v, want %v", err, nbd.ErrUnknownExport)
	}
	x.Close()
	if err := r.Remove(t.Context(), "a", nil, false); err != nil {
		t.Error(err)
	}
	if got := strings.Join(dev.calls, " "); got != "close" {
		t.Errorf("device: got %q, want close", got)
	}
	if got := strings.Join(*states, " "); got != "opening ready failed draining closed" {
		t.Errorf("states: got %q", got)
	}
}

func TestSettingsChangeWhileInUse(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a"})
	add(t, r, Spec{Name: "b"})
	x, err := r.Open(t.Context(), "b", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	err = r.Update("b", func(s *Settings) { s.Default, s.Connections, s.Description = true, 1, "new" })
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Find("", nil); err != nil || got.Name != "b" || got.Description != "new" {
		t.Errorf("default: got %+v, %v, want the changed b", got, err)
	}
	if _, err := r.Open(t.Context(), "b", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("second client of one: got %v, want %v", err, nbd.ErrUnknownExport)
	}
	if err := r.Update("b", func(s *Settings) { s.Description = "\xff" }); err == nil {
		t.Error("a description that is not text was accepted")
	}
	if err := r.Update("c", func(*Settings) {}); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("update of nothing: got %v, want %v", err, nbd.ErrUnknownExport)
	}
}

func TestExportOfOneConnectionIsNotForSeveral(t *testing.T) {
	for limit, want := range []bool{true, false, true} {
		r := NewRegistry()
		add(t, r, Spec{Name: "a", Settings: Settings{Connections: limit}})
		x, err := r.Open(t.Context(), "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		if got := x.Device.Info().Caps.Has(backing.CanMultiConn); got != want {
			t.Errorf("%d connections at most: several are offered: %v, want %v", limit, got, want)
		}
	}
}

// TestWhoAsksForInformationTakesNoPlace of a client, needs none, and is no reason to
// keep the export.
func TestWhoAsksForInformationTakesNoPlace(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a", Settings: Settings{Connections: 1}})
	clients := func(want int) {
		t.Helper()
		if s, _ := r.StatusOf("a"); s.Clients != want {
			t.Errorf("got %d clients, want %d", s.Clients, want)
		}
	}
	before, err := r.Inspect(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	clients(0)
	x, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatalf("while somebody asks for information: %v", err)
	}
	after, err := r.Inspect(t.Context(), "a", nil)
	if err != nil {
		t.Fatalf("information about an export in use: %v", err)
	}
	before.Close()
	clients(1)
	if _, err := r.Open(t.Context(), "a", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("the second client: got %v, want %v", err, nbd.ErrUnknownExport)
	}
	if err := r.Remove(t.Context(), "a", nil, false); !errors.Is(err, ErrInUse) {
		t.Errorf("remove: got %v, want %v", err, ErrInUse)
	}
	x.Close()
	clients(0)
	removed := make(chan error, 1)
	go func() { removed <- r.Remove(t.Context(), "a", nil, false) }()
	select {
	case <-after.Gone.Done():
	case err := <-removed:
		t.Fatalf("remove while somebody asks for information: %v", err)
	}
	after.Close()
	if err := <-removed; err != nil {
		t.Errorf("remove: %v", err)
	}
}

func TestFailedOpenLeavesNothing(t *testing.T) {
	r := NewRegistry()
	boom := errors.New("boom")
	err := r.AddOpening(Spec{Name: "a"}, func() (backing.Device, error) {
		if _, err := r.Find("a", nil); !errors.Is(err, nbd.ErrUnknownExport) {
			t.Errorf("find while it opens: got %v, want %v", err, nbd.ErrUnknownExport)
		}
		return nil, boom
	})
	if err != boom || len(r.Status()) != 0 {
		t.Errorf("got %v, %v, want %v and no export", err, r.Status(), boom)
	}
}

// TestLeavingClientIsFlushed: only where that is wanted, and only for one that could
// write.
func TestLeavingClientIsFlushed(t *testing.T) {
	for _, tt := range []struct {
		name            string
		flush, readOnly bool
		want            int
	}{
		{"wanted", true, false, 1},
		{"not wanted", false, false, 0},
		{"cannot write", true, true, 0},
	} {
		r := NewRegistry()
		dev := &recorder{Device: mem.New(1<<20, nil)}
		add(t, r, Spec{Name: "a", Device: dev, FlushOnLeave: tt.flush, Settings: Settings{ReadOnly: tt.readOnly}})
		x, err := r.Open(t.Context(), "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		if x.Flush != nil {
			x.Flush()
		}
		x.Close()
		x.Close()
		if len(dev.calls) != tt.want {
			t.Errorf("%s: %q, want %d flushes", tt.name, dev.calls, tt.want)
		}
	}
}

package export

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// leasing is a registry with an export a for whoever has a lease as vm1.
func leasing(t *testing.T) (r *Registry, peer *transport.Peer) {
	t.Helper()
	r = NewRegistry()
	s := Spec{Name: "a", Device: mem.New(4096, nil), Settings: Settings{Grants: []Grant{{Access: ReadWrite, VMs: []string{"vm0", "vm1"}}}}}
	if err := r.Add(s); err != nil {
		t.Fatal(err)
	}
	return r, &transport.Peer{Kind: transport.VSock, CID: 42, Port: 1000}
}

func lend(t *testing.T, r *Registry, vm, start string) {
	t.Helper()
	if _, err := r.OpenLease(Lease{CID: 42, VM: vm, Start: start}, "", time.Hour); err != nil {
		t.Fatal(err)
	}
}

func (r *Registry) opens(t *testing.T, p *transport.Peer) bool {
	t.Helper()
	x, err := r.Open(t.Context(), "a", p)
	if err == nil {
		x.Close()
	}
	return err == nil
}

// ended waits for the word to leave, which comes at once.
func ended(t *testing.T, x *nbd.Export) {
	t.Helper()
	select {
	case <-x.Gone.Done():
	case <-time.After(20 * time.Second):
		t.Error("the connection is not told to leave")
	}
}

// TestClosedLeaseEndsItsConnections is AU-03: those that it has admitted are
// told to leave, and no other is admitted, not even to the greeting.
func TestClosedLeaseEndsItsConnections(t *testing.T) {
	r, p := leasing(t)
	if r.opens(t, p) || r.Admits(p) {
		t.Error("without a lease it opens")
	}
	lend(t, r, "vm1", "s1")
	if !r.Admits(p) || len(r.List(p)) != 1 {
		t.Error("with a lease it is not to be seen")
	}
	x, err := r.Open(t.Context(), "a", p)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	lend(t, r, "vm1", "s1") // renewed
	if x.Gone.Err() != nil {
		t.Fatal("a renewed lease ends its connections")
	}
	if err := r.CloseLease(42, "s1", ""); err != nil {
		t.Fatal(err)
	}
	ended(t, x)
	if r.opens(t, p) || r.Admits(p) || len(r.List(p)) != 0 {
		t.Error("it opens after the lease")
	}
}

// TestLeaseNamesTheStart is AU-04: another start of the same machine, and
// another machine on the same CID, have nothing of a lease, cannot take it and
// cannot end it.
func TestLeaseNamesTheStart(t *testing.T) {
	r, p := leasing(t)
	lend(t, r, "vm1", "s1")
	for _, l := range []Lease{{CID: 42, VM: "vm1", Start: "s2"}, {CID: 42, VM: "vm2", Start: "s1"}} {
		if _, err := r.OpenLease(l, "", time.Hour); !errors.Is(err, ErrLeased) {
			t.Errorf("%+v: got %v, want ErrLeased", l, err)
		}
	}
	if err := r.CloseLease(42, "s2", ""); !errors.Is(err, ErrLease) {
		t.Errorf("another start closes it: %v", err)
	}
	if !r.opens(t, p) {
		t.Error("the lease is gone")
	}
	if err := r.CloseLease(42, "s1", ""); err != nil {
		t.Fatal(err)
	}
	lend(t, r, "vm2", "s3")
	if r.opens(t, p) {
		t.Error("another machine with the same CID gets in")
	}
	if got := r.Leases(); len(got) != 1 || got[0].VM != "vm2" {
		t.Errorf("leases: %+v", got)
	}
}

func TestLeaseThatNobodyRenewsEnds(t *testing.T) {
	r, p := leasing(t)
	if _, err := r.OpenLease(Lease{CID: 42, VM: "vm1", Start: "s1"}, "", limits.LeaseShortest); err != nil {
		t.Fatal(err)
	}
	x, err := r.Open(t.Context(), "a", p)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	ended(t, x)
	if r.opens(t, p) || len(r.Leases()) != 0 {
		t.Error("it opens after the lease")
	}
}

// TestLeaseLastsAsLongAsOneHolds: of two who watch one start of a machine neither
// ends the lease of the other, whether it closes its own or does not renew it.
func TestLeaseLastsAsLongAsOneHolds(t *testing.T) {
	hold := func(r *Registry, holder string, d time.Duration) {
		t.Helper()
		if _, err := r.OpenLease(Lease{CID: 42, VM: "vm1", Start: "s1"}, holder, d); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		end  func(r *Registry) error // of the second holder
	}{
		{"closed", func(r *Registry) error { return r.CloseLease(42, "s1", "h2") }},
		{"closed by both", func(r *Registry) error {
			hold(r, "h3", time.Hour)
			return errors.Join(r.CloseLease(42, "s1", "h2"), r.CloseLease(42, "s1", "h3"))
		}},
		{"machine has ended", func(r *Registry) error {
			hold(r, "h3", time.Hour)
			return r.CloseLease(42, "s1", "")
		}},
		{"not renewed", func(r *Registry) error {
			hold(r, "h2", limits.LeaseShortest)
			return nil
		}},
	} {
		r, p := leasing(t)
		hold(r, "h1", time.Hour)
		hold(r, "h2", limits.LeaseShortest)
		if got := r.Leases(); len(got) != 1 || time.Until(got[0].Expires) < time.Minute {
			t.Errorf("%s: leases: %+v, want one for an hour", tt.name, got)
		}
		x, err := r.Open(t.Context(), "a", p)
		if err != nil {
			t.Fatal(err)
		}
		hold(r, "h2", time.Hour)
		if err := r.CloseLease(42, "s1", "h1"); err != nil {
			t.Fatal(err)
		}
		if err := r.CloseLease(42, "s1", "h1"); !errors.Is(err, ErrLease) {
			t.Errorf("%s: closed twice: got %v, want ErrLease", tt.name, err)
		}
		if x.Gone.Err() != nil || !r.opens(t, p) {
			t.Errorf("%s: the first holder has ended the lease", tt.name)
		}
		if err := tt.end(r); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		ended(t, x)
		x.Close()
		if r.opens(t, p) || len(r.Leases()) != 0 {
			t.Errorf("%s: it opens after the lease", tt.name)
		}
	}
}

func TestLeaseHasFewHolders(t *testing.T) {
	r, _ := leasing(t)
	l := Lease{CID: 42, VM: "vm1", Start: "s1"}
	for i := range limits.LeaseHolders {
		if _, err := r.OpenLease(l, strings.Repeat("h", i), time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.OpenLease(l, "one more", time.Hour); err == nil {
		t.Error("there are more holders than may be")
	}
	if _, err := r.OpenLease(l, "h", time.Hour); err != nil {
		t.Errorf("one of them renews: %v", err)
	}
	if _, err := r.OpenLease(l, strings.Repeat("x", limits.LeaseName+1), time.Hour); !errors.Is(err, ErrInvalid) {
		t.Errorf("a long name: got %v, want ErrInvalid", err)
	}
}

func TestConnectionsOfOtherGrantsOutliveALease(t *testing.T) {
	r, p := leasing(t)
	both := []Grant{{Access: ReadOnly, CIDs: []uint32{42}}, {Access: ReadWrite, VMs: []string{"vm1"}}}
	if err := r.Update("a", func(s *Settings) { s.Grants = both }); err != nil {
		t.Fatal(err)
	}
	lend(t, r, "vm1", "s1")
	x, err := r.Open(t.Context(), "a", p)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if err := r.CloseLease(42, "s1", ""); err != nil {
		t.Fatal(err)
	}
	if x.Gone.Err() != nil {
		t.Error("a connection that the CID alone has admitted is told to leave")
	}
}

// TestLeaseDoesNotKeepWhoHasComeByAnotherGrant when that has gone: its end would not end
// that use.
func TestLeaseDoesNotKeepWhoHasComeByAnotherGrant(t *testing.T) {
	r, p := leasing(t)
	lend(t, r, "vm1", "s1")
	var byLease []Grant
	set := func(grants []Grant) {
		t.Helper()
		if err := r.Update("a", func(s *Settings) { byLease, s.Grants = s.Grants, grants }); err != nil {
			t.Fatal(err)
		}
	}
	set([]Grant{{Access: ReadOnly, CIDs: []uint32{42}}})
	x, err := r.Open(t.Context(), "a", p)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if !x.Still() {
		t.Error("the grant that has admitted it does not hold")
	}
	if set(byLease); x.Still() {
		t.Error("it holds by a lease whose end it would not notice")
	}
	if r.Review(0); x.Gone.Err() == nil {
		t.Error("it is not told to leave")
	}
}

func TestLeasesOfOthersThanGuestsAreRefused(t *testing.T) {
	r, _ := leasing(t)
	long := strings.Repeat("x", limits.LeaseName+1)
	for _, tt := range []struct {
		l Lease
		d time.Duration
	}{
		{Lease{CID: 0, VM: "v", Start: "s"}, time.Minute}, {Lease{CID: 1, VM: "v", Start: "s"}, time.Minute},
		{Lease{CID: 2, VM: "v", Start: "s"}, time.Minute}, {Lease{CID: 1<<32 - 1, VM: "v", Start: "s"}, time.Minute},
		{Lease{CID: 3, Start: "s"}, time.Minute}, {Lease{CID: 3, VM: "v"}, time.Minute},
		{Lease{CID: 3, VM: long, Start: "s"}, time.Minute}, {Lease{CID: 3, VM: "v", Start: long}, time.Minute},
		{Lease{CID: 3, VM: "v", Start: "s"}, 0}, {Lease{CID: 3, VM: "v", Start: "s"}, 1 << 62},
	} {
		if _, err := r.OpenLease(tt.l, "", tt.d); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d %d/%d %v: got %v, want ErrInvalid", tt.l.CID, len(tt.l.VM), len(tt.l.Start), tt.d, err)
		}
	}
	for cid := range uint32(limits.Leases) {
		if _, err := r.OpenLease(Lease{CID: 100 + cid, VM: "v", Start: "s"}, "", time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.OpenLease(Lease{CID: 99, VM: "v", Start: "s"}, "", time.Hour); err == nil {
		t.Error("there are more leases than may be")
	}
}

func TestOthersThanVsockPeersHaveNoLease(t *testing.T) {
	r, _ := leasing(t)
	lend(t, r, "vm1", "s1")
	for _, p := range []*transport.Peer{{Kind: transport.Unix, CID: 42}, {Kind: transport.TCP, Addr: "10.0.0.1:5", CID: 42}, nil} {
		if r.opens(t, p) {
			t.Errorf("%v gets in by a lease", p)
		}
	}
}

package main

import (
	"errors"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
)

// TestLeasesAreKeptByTheControlSocket opens, renews and closes leases of a
// running service, and asks for some that cannot be.
func TestLeasesAreKeptByTheControlSocket(t *testing.T) {
	t.Parallel()
	s := newService(t, exportA)
	ctx := t.Context()
	lease := api.OpenLease{CID: 42, VM: "vm 1", Start: "s?1", TTL: config.Duration(time.Minute)}
	first, err := s.ctl.OpenLease(ctx, lease)
	if err != nil {
		t.Fatal(err)
	}
	lease.TTL = config.Duration(time.Hour)
	second, err := s.ctl.OpenLease(ctx, lease)
	if err != nil || !second.Expires.After(first.Expires) {
		t.Errorf("renewed: %+v, %v; want later than %v", second, err, first.Expires)
	}
	refused := func(what, code string, err error) {
		t.Helper()
		if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != code {
			t.Errorf("%s: got %v, want %s", what, err, code)
		}
	}
	other := lease
	other.Start = "s2"
	_, err = s.ctl.OpenLease(ctx, other)
	refused("another start", api.CodeInUse, err)
	other.CID = 2
	_, err = s.ctl.OpenLease(ctx, other)
	refused("the host's CID", api.CodeInvalid, err)
	other.CID, other.TTL = 43, 0
	_, err = s.ctl.OpenLease(ctx, other)
	refused("no time", api.CodeInvalid, err)
	refused("close another start's", api.CodeNotFound, s.ctl.CloseLease(ctx, 42, "s2", ""))
	if all, err := s.ctl.Leases(ctx); err != nil || len(all) != 1 || all[0].VM != "vm 1" || all[0].Start != "s?1" {
		t.Errorf("leases: %+v, %v", all, err)
	}
	if err := s.ctl.CloseLease(ctx, 42, "s?1", ""); err != nil {
		t.Errorf("close: %v", err)
	}
	if all, err := s.ctl.Leases(ctx); err != nil || len(all) != 0 {
		t.Errorf("leases at the end: %+v, %v", all, err)
	}
	s.stop()
}

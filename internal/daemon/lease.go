package daemon

import (
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

func (s service) Leases() []api.Lease {
	list := []api.Lease{}
	for _, l := range s.d.exports.Leases() {
		list = append(list, api.Lease(l))
	}
	return list
}

func (s service) OpenLease(l api.OpenLease) (api.Lease, error) {
	x, err := s.d.exports.OpenLease(export.Lease{CID: l.CID, VM: l.VM, Start: l.Start}, l.Holder, time.Duration(l.TTL))
	return api.Lease(x), told(err)
}

func (s service) CloseLease(cid uint32, start, holder string) error {
	return told(s.d.exports.CloseLease(cid, start, holder))
}

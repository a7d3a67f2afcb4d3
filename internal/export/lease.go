package export

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Lease says that a context ID belongs to one start of one machine, as long as
// somebody who watches that machine says so: its holders. A CID alone is an
// address: it is free again when its machine ends, and anybody may take it then.
type Lease struct {
	CID     uint32
	VM      string    // as grants name it
	Start   string    // tells this start of the machine from others
	Expires time.Time // when the last of its holders lets go
}

// lease is an open one; guarded by Registry.mu.
type lease struct {
	Lease
	holders map[string]time.Time // when each lets go; those of the past too
	timer   *time.Timer
	gone    context.Context // ends when its connections shall leave
	leave   context.CancelFunc
}

// Errors of leases.
var (
	ErrLease   = errors.New("no such lease")
	ErrLeased  = errors.New("the CID is leased to another start")
	ErrInvalid = errors.New("invalid lease")
)

func (l *Lease) check(holder string, d time.Duration) error {
	for what, s := range map[string]string{"vm": l.VM, "start": l.Start} {
		if s == "" || len(s) > limits.LeaseName {
			return fmt.Errorf("%w: %s has %d bytes, want 1 to %d", ErrInvalid, what, len(s), limits.LeaseName)
		}
	}
	if len(holder) > limits.LeaseName {
		return fmt.Errorf("%w: holder has %d bytes, want at most %d", ErrInvalid, len(holder), limits.LeaseName)
	}
	if reserved(&transport.Peer{Kind: transport.VSock, CID: l.CID}) {
		return fmt.Errorf("%w: CID %d is no guest's", ErrInvalid, l.CID)
	}
	if d < limits.LeaseShortest || d > limits.LeaseLongest {
		return fmt.Errorf("%w: %v is not between %v and %v", ErrInvalid, d, limits.LeaseShortest, limits.LeaseLongest)
	}
	return nil
}

// OpenLease opens a lease for d, or has the one of the same start of the machine
// last that long for one more holder, or for the same once more. Holders without
// a name are one. The lease of another start has to be closed before, or to expire.
func (r *Registry) OpenLease(l Lease, holder string, d time.Duration) (Lease, error) {
	if err := l.check(holder, d); err != nil {
		return Lease{}, err
	}
	l.Expires = time.Now().Add(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.leases[l.CID]
	switch {
	case old != nil && (old.VM != l.VM || old.Start != l.Start):
		return Lease{}, fmt.Errorf("%w: CID %d is that of %q", ErrLeased, l.CID, old.VM)
	case old != nil:
		return old.renew(holder, l.Expires)
	case len(r.leases) >= limits.Leases:
		return Lease{}, fmt.Errorf("there are %d leases, which is all that there may be", limits.Leases)
	}
	x := &lease{Lease: l, holders: map[string]time.Time{holder: l.Expires}}
	x.gone, x.leave = context.WithCancel(context.Background())
	x.timer = time.AfterFunc(d, func() { r.expire(x) })
	r.leases[l.CID] = x
	return l, nil
}

// renew makes until the time when holder lets go. The caller holds Registry.mu.
func (x *lease) renew(holder string, until time.Time) (Lease, error) {
	x.lapse()
	if _, ok := x.holders[holder]; !ok && len(x.holders) >= limits.LeaseHolders {
		return Lease{}, fmt.Errorf("the lease of CID %d has %d holders, which is all that it may have", x.CID, limits.LeaseHolders)
	}
	x.holders[holder] = until
	x.lapse()
	return x.Lease, nil
}

// lapse forgets the holders that have let go, and sets the end of the lease to that
// of the last one. The caller holds Registry.mu.
func (x *lease) lapse() {
	now := time.Now()
	x.Expires = now
	for name, until := range x.holders {
		if !until.After(now) {
			delete(x.holders, name)
		} else if until.After(x.Expires) {
			x.Expires = until
		}
	}
	x.timer.Reset(x.Expires.Sub(now))
}

// expire ends a lease that nobody has renewed in the meantime.
func (r *Registry) expire(x *lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leases[x.CID] == x && !time.Now().Before(x.Expires) {
		r.endLocked(x)
	}
}

// CloseLease ends the lease of a start for a holder, and whole with the last one,
// or if holder is "". Connections that were admitted by it finish what is in flight
// and leave then; no other is admitted.
func (r *Registry) CloseLease(cid uint32, start, holder string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	x := r.leases[cid]
	if x == nil || x.Start != start {
		return ErrLease
	}
	if _, ok := x.holders[holder]; !ok && holder != "" {
		return ErrLease
	}
	delete(x.holders, holder)
	x.lapse()
	if holder == "" || len(x.holders) == 0 {
		r.endLocked(x)
	}
	return nil
}

func (r *Registry) endLocked(x *lease) {
	x.timer.Stop()
	delete(r.leases, x.CID)
	x.leave()
}

// Leases are those that are open, sorted by CID.
func (r *Registry) Leases() []Lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Lease, 0, len(r.leases))
	for _, x := range r.leases {
		list = append(list, x.Lease)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].CID < list[j].CID })
	return list
}

// leaseLocked is the lease of p's CID, or nil.
func (r *Registry) leaseLocked(p *transport.Peer) *lease {
	if p == nil || p.Kind != transport.VSock {
		return nil
	}
	return r.leases[p.CID]
}

// either ends with the first of the two. stop releases it.
func either(a, b context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(a)
	undo := context.AfterFunc(b, cancel)
	return ctx, func() { undo(); cancel() }
}

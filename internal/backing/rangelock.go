package backing

import "context"

// RangeLocks are shared and exclusive locks on ranges of bytes, for layers that
// read, modify and write. They are granted in order of arrival where they
// conflict. The zero value is ready for use.
type RangeLocks struct{ set rangeLocks }

// Lock locks [lo, hi) until the lease is released. It waits until ctx ends.
func (r *RangeLocks) Lock(ctx context.Context, lo, hi int64, exclusive bool) (Lease, error) {
	l, err := r.set.lock(ctx, lo, hi, exclusive)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// TryShare takes a shared lock on [lo, hi) if that needs no waiting. It does
// not allocate in the long run.
func (r *RangeLocks) TryShare(lo, hi int64) (Lease, bool) {
	if l := r.set.try(lo, hi); l != nil {
		return l, true
	}
	return nil, false
}

package qcow2

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
)

// claim keeps other writers from some guest clusters while one changes how
// they are mapped. What others have under way in place, or read, goes on.
type claim struct {
	first, n int64 // guest clusters
	done     chan struct{}
	s        *slice // pinned
}

// stretch is a run of guest clusters of one slice for which one writer does
// the same thing.
type stretch struct {
	claim
	at  int64     // index of the first in the slice
	run space.Run // the host clusters that they get

	// fresh: run was reserved for them. Else there is one cluster, which keeps
	// its host cluster, and data are the subclusters that have data.
	fresh bool
	data  uint32
	// whole: all of a cluster is to be written, not only the subclusters that
	// the guest's bytes touch.
	whole bool

	reach int64 // how far the disk went when this was claimed, in bytes
}

// claimed is the claim on one of some guest clusters, nil for none. With
// d.m.mu.
func (d *disk) claimed(first, n int64) *claim {
	if len(d.claims) == 0 {
		return nil
	}
	for c := first; c < first+n; c++ {
		if x := d.claims[c]; x != nil {
			return x
		}
	}
	return nil
}

// hold claims the clusters of x, which nobody has claimed. With d.m.mu.
func (d *disk) hold(x *claim, s *slice) {
	x.done, x.s = make(chan struct{}), s
	d.m.clock.pin(s)
	for c := x.first; c < x.first+x.n; c++ {
		d.claims[c] = x
	}
}

// letGo ends the claim. With d.m.mu.
func (d *disk) letGo(x *claim) {
	for c := x.first; c < x.first+x.n; c++ {
		delete(d.claims, c)
	}
	d.m.clock.unpin(x.s)
	close(x.done)
}

// wait waits for the end of a claim.
func (x *claim) wait(ctx context.Context) error {
	select {
	case <-x.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lockClusters is lockSlice for the slice of a guest cluster, when nobody has
// a claim on it. free is how many of the n clusters from it on, all of that
// slice, nobody has claimed. Those are sound.
func (d *disk) lockClusters(ctx context.Context, first, n int64) (s *slice, free int64, err error) {
	for {
		s, err := d.lockSlice(ctx, first/d.m.entries)
		if err != nil {
			return nil, 0, err
		}
		x := d.claims[first]
		if x == nil {
			at := first % d.m.entries
			if err := s.bad[at]; err != nil {
				d.m.mu.Unlock()
				return nil, 0, err
			}
			free = 1
			for n = min(n, d.m.entries-at); free < n && d.claims[first+free] == nil && s.bad[at+free] == nil; {
				free++
			}
			return s, free, nil
		}
		d.m.mu.Unlock()
		if err := x.wait(ctx); err != nil {
			return nil, 0, err
		}
	}
}

// lockForChange is lockClusters for a slice whose entries can all change: the
// file has storage for it. Else funded gets it.
func (d *disk) lockForChange(ctx context.Context, first, n int64) (s *slice, free int64, err error) {
	if s, free, err = d.lockClusters(ctx, first, n); err != nil {
		return nil, 0, err
	}
	if err := d.mayChange(s); err != nil {
		d.m.mu.Unlock()
		return nil, 0, err
	}
	return s, free, nil
}

// release puts what a mapping entry had into quarantine. With d.m.mu.
func (d *disk) release(c *format.Cluster) {
	switch {
	case c.Compressed:
		d.unlink(space.Ref{Off: c.Host, Len: c.Length})
	case c.HasHost() && !d.g.DataFile:
		d.unlink(space.Ref{Off: c.Host, Len: d.g.ClusterSize})
	}
}

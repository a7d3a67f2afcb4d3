package raw

import (
	"context"
	"errors"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// syncer joins flushes: one fdatasync runs at a time, and serves every flush
// that had arrived when it was submitted.
type syncer struct {
	mu      sync.Mutex
	started uint64        // guarded by mu; number of the last round begun
	done    uint64        // guarded by mu; number of the last round that succeeded
	running bool          // guarded by mu
	changed chan struct{} // guarded by mu; closed when the round ends, nil if nobody waits
}

// Flush makes all writes durable that were answered before it. After a
// failure, it fails for ever.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.usable(); err != nil || d.opt.ReadOnly {
		return err
	}
	s := &d.sync
	s.mu.Lock()
	defer s.mu.Unlock()
	for want := s.started + 1; ; {
		if err := d.poisoned(); err != nil {
			return err
		}
		if s.done >= want {
			return nil
		}
		if !s.running {
			return d.roundLocked(ctx)
		}
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		ch := s.changed
		s.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// roundLocked runs one fdatasync, without the lock, and wakes those who wait
// for it or for their turn.
func (d *Device) roundLocked(ctx context.Context) error {
	s := &d.sync
	if err := ctx.Err(); err != nil {
		return err
	}
	s.running = true
	s.started++
	s.mu.Unlock()
	err := d.fdatasync(context.WithoutCancel(ctx))
	s.mu.Lock()
	s.running = false
	if err == nil {
		s.done = s.started
	}
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
	return err
}

// fdatasync is given a context that does not end: others may wait for its
// result.
func (d *Device) fdatasync(ctx context.Context) error {
	id := d.durables.begin()
	err := d.al.Do(ctx, engine.OpSync, 0, 0)
	if err != nil {
		d.lost("flush", err)
	}
	d.durables.settle(id)
	if err != nil {
		return &backing.Error{Op: "flush", Path: d.opt.Path, Off: -1, Kind: backing.KindOf(err), Err: err}
	}
	return d.poisoned()
}

// writeDurably returns when p is on stable storage. In the page cache a
// failure counts as the report of lost pages, which may be those of others.
func (d *Device) writeDurably(ctx context.Context, p []byte, off int64) error {
	if !d.cached() {
		return d.al.WriteAt(ctx, p, off, true)
	}
	id := d.durables.begin()
	err := d.al.WriteAt(ctx, p, off, true)
	if err != nil && d.lostPages(ctx, p, off, err) {
		d.lost("write", err)
	}
	d.durables.settle(id)
	if err != nil {
		return err
	}
	return d.poisoned()
}

// lostPages reports whether the failure of a durable write may mean that
// pages were lost. Not if there was no room for it in the first place: then a
// plain write finds no room either.
func (d *Device) lostPages(ctx context.Context, p []byte, off int64, err error) bool {
	switch {
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return false
	case backing.KindOf(err) == backing.ErrNoSpace:
		again := d.al.WriteAt(context.WithoutCancel(ctx), p, off, false)
		return backing.KindOf(again) != backing.ErrNoSpace
	}
	return true
}

// cached reports whether written bytes may be in the page cache: the tail of
// a direct file that is not, or was not, a whole number of blocks is.
func (d *Device) cached() bool {
	return !d.geo.direct || d.tail.Load() || d.size.Load()&(d.geo.align-1) != 0
}

// durables orders the verdicts of operations that ask for durability. The
// kernel tells only one of them of lost pages. So one that succeeded waits for
// all that are in flight at that moment, and then looks whether one of them
// was told.
type durables struct {
	mu     sync.Mutex
	cond   sync.Cond
	last   uint64   // guarded by mu; the newest number given
	active []uint64 // guarded by mu; ascending
}

// begin announces an operation.
func (d *durables) begin() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last++
	d.active = append(d.active, d.last)
	return d.last
}

// settle ends the operation, whose failure has poisoned the device by now,
// and waits for those that began before this moment.
func (d *durables) settle(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := 0
	for d.active[at] != id {
		at++
	}
	d.active = append(d.active[:at], d.active[at+1:]...)
	if d.cond.L == nil {
		d.cond.L = &d.mu
	}
	d.cond.Broadcast()
	for mark := d.last; len(d.active) > 0 && d.active[0] <= mark; {
		d.cond.Wait()
	}
}

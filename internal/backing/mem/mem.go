// Package mem is a disk in memory, and a disk that is not there at all.
// Neither survives the process: a flush has nothing to do.
package mem

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

const (
	// pageSize is the unit of allocation.
	pageSize = 32 << 10

	// shards spreads neighbouring pages over locks.
	shards = 64
)

const caps = backing.CanWrite | backing.CanFlush | backing.CanFUA | backing.CanTrim |
	backing.CanZero | backing.CanFastZero | backing.CanCache | backing.CanExtents | backing.CanMultiConn

// Disk is a sparse disk in memory. Pages that were never written, or were
// zeroed or trimmed, take none.
type Disk struct {
	size   int64
	holds  atomic.Int64 // Closes that are to come
	shards [shards]shard
}

type shard struct {
	mu    sync.RWMutex
	pages map[int64]*[pageSize]byte // guarded by mu, contents too; by page number
}

// New makes a disk of size bytes that begins with a copy of initial, which
// may be nil and is cut off at size.
func New(size int64, initial []byte) *Disk {
	d := &Disk{size: size}
	d.holds.Store(1)
	for i := range d.shards {
		d.shards[i].pages = map[int64]*[pageSize]byte{}
	}
	initial = initial[:min(int64(len(initial)), size)]
	d.each(0, int64(len(initial)), func(s *shard, no int64, lo, hi, at int64) {
		copy(s.page(no)[lo:hi], initial[at:])
	})
	return d
}

// Hold is d for one more, who closes it. It is not closed yet.
func (d *Disk) Hold() *Disk {
	d.holds.Add(1)
	return d
}

// Info is the same in every call.
func (d *Disk) Info() backing.Info {
	return backing.Info{Size: d.size, MinBlock: 1, Preferred: 4096, Caps: caps}
}

// page allocates; s.mu is held for writing.
func (s *shard) page(no int64) *[pageSize]byte {
	p := s.pages[no]
	if p == nil {
		p = new([pageSize]byte)
		s.pages[no] = p
	}
	return p
}

// each calls fn for every page of the range: lo and hi delimit the part
// inside the page, at is where that part begins in the range. fn locks.
func (d *Disk) each(off, n int64, fn func(s *shard, no, lo, hi, at int64)) {
	for at := int64(0); at < n; {
		no, lo := (off+at)/pageSize, (off+at)%pageSize
		hi := min(pageSize, lo+n-at)
		fn(&d.shards[no%shards], no, lo, hi, at)
		at += hi - lo
	}
}

// ReadAt fills p; what was never written is zero.
func (d *Disk) ReadAt(_ context.Context, p []byte, off int64) error {
	d.each(off, int64(len(p)), func(s *shard, no, lo, hi, at int64) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if pg := s.pages[no]; pg != nil {
			copy(p[at:], pg[lo:hi])
		} else {
			clear(p[at : at+hi-lo])
		}
	})
	return nil
}

// WriteAt allocates what it needs. FUA changes nothing.
func (d *Disk) WriteAt(_ context.Context, p []byte, off int64, _ backing.Flags) error {
	d.each(off, int64(len(p)), func(s *shard, no, lo, hi, at int64) {
		s.mu.Lock()
		defer s.mu.Unlock()
		copy(s.page(no)[lo:hi], p[at:])
	})
	return nil
}

// Zero frees the pages that it covers, or with NoHole allocates them.
func (d *Disk) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if f&backing.NoHole == 0 {
		d.free(off, n)
		return nil
	}
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		step := min(n, shards*pageSize)
		d.each(off, step, func(s *shard, no, lo, hi, _ int64) {
			s.mu.Lock()
			defer s.mu.Unlock()
			clear(s.page(no)[lo:hi])
		})
		off, n = off+step, n-step
	}
	return nil
}

// Trim frees the pages inside the range, which then reads as zeroes.
func (d *Disk) Trim(_ context.Context, off, n int64, _ backing.Flags) error {
	d.free(off, n)
	return nil
}

// free touches only pages that exist: the range may be the whole of a disk
// larger than any memory.
func (d *Disk) free(off, n int64) {
	for _, no := range d.allocated(off, n) {
		s := &d.shards[no%shards]
		lo, hi := max(off-no*pageSize, 0), min(off+n-no*pageSize, pageSize)
		s.mu.Lock()
		if hi-lo == pageSize {
			delete(s.pages, no)
		} else if p := s.pages[no]; p != nil {
			clear(p[lo:hi])
		}
		s.mu.Unlock()
	}
}

// allocated lists the pages of the range in order. It looks at each page of
// the range or at each page of the disk, whichever are fewer.
func (d *Disk) allocated(off, n int64) []int64 {
	first, last := off/pageSize, (off+n-1)/pageSize
	var list []int64
	if last-first < shards {
		for no := first; no <= last; no++ {
			s := &d.shards[no%shards]
			s.mu.RLock()
			if s.pages[no] != nil {
				list = append(list, no)
			}
			s.mu.RUnlock()
		}
		return list
	}
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.RLock()
		for no := range maps.Keys(s.pages) {
			if first <= no && no <= last {
				list = append(list, no)
			}
		}
		s.mu.RUnlock()
	}
	slices.Sort(list)
	return list
}

// Flush has nothing to do: the disk is as durable as the process.
func (d *Disk) Flush(context.Context) error { return nil }

// Cache has nothing to do.
func (d *Disk) Cache(context.Context, int64, int64) error { return nil }

// Extents reports allocated pages as data and the rest as holes.
func (d *Disk) Extents(_ context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	end := off + n
	list := d.allocated(off, n)
	for off < end {
		x := backing.Extent{Hole: true, Zero: true}
		next := end
		if len(list) > 0 {
			next = min(list[0]*pageSize, end)
		}
		if next <= off { // inside an allocated page: take its neighbours too
			x.Hole, x.Zero = false, false
			next = (list[0] + 1) * pageSize
			for list = list[1:]; len(list) > 0 && list[0]*pageSize == next; list = list[1:] {
				next += pageSize
			}
			next = min(next, end)
		}
		x.Len = next - off
		off = next
		if !yield(x) || f&backing.ReqOne != 0 {
			return nil
		}
	}
	return nil
}

// Map always answers ErrNotMappable: there is no host file.
func (d *Disk) Map(engine.Op, int64, int64, *backing.Mapping) error { return backing.ErrNotMappable }

// Close frees the pages, when all who hold the disk have closed it.
func (d *Disk) Close() error {
	if d.holds.Add(-1) > 0 {
		return nil
	}
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.Lock()
		s.pages = map[int64]*[pageSize]byte{}
		s.mu.Unlock()
	}
	return nil
}

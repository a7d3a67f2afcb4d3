package storetest

import (
	"context"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// hostBlock is the unit in which a Full gives storage.
const hostBlock = 4096

// Full is a file on a host that has little room: what is written or zeroed
// where there was a hole takes storage, and fails with ErrNoSpace when there is
// too little left. Then its bytes are untouched, and it has taken all there was,
// as on ext4 and tmpfs. To Extents storage that was never written to is a hole, as
// to lseek(2) on ext4 and XFS.
type Full struct {
	store.Store
	CannotZero bool // Zero is not supported
	Crowded    bool // others take what is given back

	// order has punches and writes of a block one after the other, as a file system
	// does.
	order sync.RWMutex

	mu   sync.Mutex
	has  map[int64]bool // guarded by mu; blocks with storage, by number: whether one was written
	room int64          // guarded by mu; blocks that are left
}

// NewFull takes st over with the storage that its extents say, on a host with
// no more room.
func NewFull(ctx context.Context, st store.Store) (*Full, error) {
	f := &Full{Store: st, has: map[int64]bool{}}
	size, err := st.Size()
	if err != nil {
		return nil, err
	}
	off := int64(0)
	err = st.Extents(ctx, 0, size, func(e backing.Extent) bool {
		for i := off / hostBlock; !e.Hole && i <= (off+e.Len-1)/hostBlock; i++ {
			f.has[i] = true
		}
		off += e.Len
		return true
	})
	return f, err
}

// SetRoom leaves the host with room for so many bytes.
func (f *Full) SetRoom(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.room = n / hostBlock
}

// take gets storage for a range, from its beginning on as far as there is any.
func (f *Full) take(off, n int64, write bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := off / hostBlock; i <= (off+n-1)/hostBlock; i++ {
		written, ok := f.has[i]
		switch {
		case ok:
		case f.room == 0:
			return backing.ErrNoSpace
		default:
			f.room--
		}
		f.has[i] = written || write
	}
	return nil
}

// Room is how many bytes the host has left.
func (f *Full) Room() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.room * hostBlock
}

// give frees the storage of the whole blocks of [off, end).
func (f *Full) give(off, end int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := (off + hostBlock - 1) / hostBlock; i < end/hostBlock; i++ {
		if _, ok := f.has[i]; ok {
			delete(f.has, i)
			if !f.Crowded {
				f.room++
			}
		}
	}
}

// WriteAt fails when there is no storage for p.
func (f *Full) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	f.order.RLock()
	defer f.order.RUnlock()
	if err := f.take(off, int64(len(p)), true); err != nil {
		return err
	}
	return f.Store.WriteAt(ctx, p, off, durable)
}

// Zero fails when there is no storage for the range.
func (f *Full) Zero(ctx context.Context, off, n int64) error {
	if f.CannotZero {
		return backing.ErrNotSupported
	}
	if err := f.take(off, n, false); err != nil {
		return err
	}
	return f.Store.Zero(ctx, off, n)
}

// Punch gives the host its storage back.
func (f *Full) Punch(ctx context.Context, off, n int64) error {
	f.order.Lock()
	defer f.order.Unlock()
	err := f.Store.Punch(ctx, off, n)
	if err == nil {
		f.give(off, off+n)
	}
	return err
}

// Truncate gives back what is cut off, and takes nothing.
func (f *Full) Truncate(size int64) error {
	old, err := f.Size()
	if err == nil {
		err = f.Store.Truncate(size)
	}
	if err == nil && size < old {
		f.give(size, old+hostBlock-1)
	}
	return err
}

// Extents tells holes by what has storage and was written.
func (f *Full) Extents(_ context.Context, off, n int64, yield func(backing.Extent) bool) error {
	for end := off + n; off < end; {
		e := f.extent(off, end)
		if !yield(e) {
			break
		}
		off += e.Len
	}
	return nil
}

// extent is the one that begins with off, as far as end.
func (f *Full) extent(off, end int64) backing.Extent {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := off / hostBlock
	hole := !f.has[i]
	for i*hostBlock < end && !f.has[i] == hole {
		i++
	}
	return backing.Extent{Len: min(i*hostBlock, end) - off, Hole: hole, Zero: hole}
}

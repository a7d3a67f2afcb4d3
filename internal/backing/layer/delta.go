package layer

import (
	"os"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// Delta is what was written to an overlay, and what says where it is. It can be held
// by others, to go on with it when the overlay is closed: it is forgotten when all
// who hold it have closed it. A quota that it exceeds refuses what takes more.
type Delta struct {
	size  int64              // of the disk
	holds atomic.Int64       // Closes that are to come
	locks backing.RangeLocks // taken before mu
	store clusterStore

	mu    sync.RWMutex // held for no I/O
	table overlayTable // guarded by mu
}

// newDelta is the empty one of a disk of size bytes, with one to hold it. It owns f;
// nil is memory.
func newDelta(f *os.File, size int64) *Delta {
	d := &Delta{size: size, store: &memoryStore{clusters: map[cluster]*[clusterSize]byte{}}}
	if f != nil {
		d.store = fileStore{f}
	}
	d.table.init(size)
	d.holds.Store(1)
	return d
}

// Hold is d for one more, who closes it. Somebody holds it already.
func (d *Delta) Hold() *Delta {
	d.holds.Add(1)
	return d
}

// Close is the end of a Hold.
func (d *Delta) Close() error {
	if d.holds.Add(-1) > 0 {
		return nil
	}
	return d.store.close()
}

// Used is the part of the quota that is used, in bytes.
func (d *Delta) Used() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.table.used
}

func (d *Delta) setQuota(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.table.quota = n
}

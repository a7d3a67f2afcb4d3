package qcow2

import (
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
)

// epoch counts the I/O that began between two commits and uses host clusters
// that the mapping named. It is the lease of that I/O. A cluster that was
// unlinked in an epoch is free when that commit is durable and no I/O of that
// epoch or one before is left.
type epoch struct{ active atomic.Int64 }

// Release ends one use.
func (e *epoch) Release() { e.active.Add(-1) }

// quarantined is what was unlinked in an epoch whose commit is over.
type quarantined struct {
	epoch *epoch
	refs  []space.Ref
}

// lease keeps the host clusters from reuse that the mapping names now. With
// d.m.mu, for reading at least.
func (d *disk) lease() *epoch {
	e := d.epoch
	e.active.Add(1)
	return e
}

// unlink notes that the mapping does not name a range of host clusters any
// more; neighbours of whole clusters become one, so that they are punched at
// once. With d.m.mu.
func (d *disk) unlink(r space.Ref) {
	if n := len(d.unlinked); n > 0 && (r.Off|r.Len)&(d.g.ClusterSize-1) == 0 {
		last := &d.unlinked[n-1]
		if last.Off&(d.g.ClusterSize-1) == 0 && last.Off+last.Len == r.Off {
			last.Len += r.Len
			return
		}
	}
	d.unlinked = append(d.unlinked, r)
}

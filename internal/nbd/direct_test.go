package nbd

import (
	"sync/atomic"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// mapCounter counts what a rate limit would take tokens for.
type mapCounter struct {
	backing.Passthrough
	writes atomic.Int32
}

func (d *mapCounter) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op == engine.OpWrite {
		d.writes.Add(1)
	}
	return d.Next.Map(op, off, n, m)
}

// TestDirectWriteIsMappedOnce: the mapping that says that a write goes past the page
// cache is the one that it goes by.
func TestDirectWriteIsMappedOnce(t *testing.T) {
	r := fileRig(t, 1<<20, "pool", open.CacheNone)
	d := &mapCounter{Passthrough: backing.Passthrough{Next: r.dev}}
	r.exports.dev = d
	c := r.simple()
	const writes = 8
	for i := range uint64(writes) {
		if e := r.ask(c, wire.CmdWrite, i*4096, 4096); e != wire.OK {
			t.Fatalf("write %d: got %v", i, e)
		}
	}
	if n := d.writes.Load(); n != writes {
		t.Errorf("%d writes were mapped %d times", writes, n)
	}
}

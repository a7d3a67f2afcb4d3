package disktest

import (
	"context"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// BrokenSync is a host file that says it has synced and has not, whenever Drop
// of the number of the call, from 0, wants that. It shows that a test would
// see the absence of a barrier.
type BrokenSync struct {
	store.Store
	Drop func(n int) bool

	mu sync.Mutex
	n  int // guarded by mu
}

// Sync does it or does not.
func (b *BrokenSync) Sync(ctx context.Context) error {
	b.mu.Lock()
	n := b.n
	b.n++
	b.mu.Unlock()
	if b.Drop(n) {
		return nil
	}
	return b.Store.Sync(ctx)
}

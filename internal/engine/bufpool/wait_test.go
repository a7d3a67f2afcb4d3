package bufpool

import (
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// TestRefusedTryTakesNothing: a TryGet that gets nothing is not seen by others
// meanwhile: one that fits is served, and nobody is left asleep for its sake.
func TestRefusedTryTakesNothing(t *testing.T) {
	p := New(1 << 20)
	held := mustGet(t, p, limits.TurnBuffer)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if b := p.TryGet(1 << 20); b != nil {
					t.Error("the whole budget was lent beside a part of it")
					return
				}
			}
		})
	}
	for i := range 300_000 {
		b := p.TryGet(512 << 10)
		if b == nil {
			t.Errorf("try %d: no room for 512 KiB beside 256 KiB of 1 MiB", i)
			break
		}
		b.Release()
	}
	close(stop)
	wg.Wait()
	held.Release()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

package layer

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestTokensThatComeBackEndAWait: of a request that found them taken by one that did not
// use them, and would wait as long as if that had.
func TestTokensThatComeBackEndAWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bucket
		b.init()
		b.set(1, 0)
		const n = 64 << 10
		if !b.try(n) {
			t.Fatal("a bucket that is full gives no tokens")
		}
		begun, done := time.Now(), make(chan error, 1)
		go func() { done <- b.take(t.Context(), n) }()
		synctest.Wait()
		b.putBack(n)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(begun); waited > time.Second {
			t.Errorf("who needs %d tokens waited %v for those that came back at once", n, waited)
		}
	})
}

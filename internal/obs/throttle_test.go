package obs

import (
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func TestThrottlePassesABurstAndCountsTheRest(t *testing.T) {
	var x Throttle
	at := time.Unix(1000, 0)
	passed := 0
	for range limits.EventBurst + 5 {
		if ok, _ := x.Allow(at); ok {
			passed++
		}
	}
	if passed != limits.EventBurst {
		t.Errorf("passed: got %d, want %d", passed, limits.EventBurst)
	}
	if ok, cut := x.Allow(at.Add(limits.EventInterval)); !ok || cut != 5 {
		t.Errorf("in the next interval: got %v and %d cut, want true and 5", ok, cut)
	}
	if ok, cut := x.Allow(at.Add(limits.EventInterval)); !ok || cut != 0 {
		t.Errorf("after that: got %v and %d cut, want true and 0", ok, cut)
	}
}

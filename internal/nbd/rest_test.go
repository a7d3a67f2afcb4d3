package nbd

import (
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestPeersThatGetOnlyErrorsRest: each reply comes, and no more of them at a
// time than limits.Refused.
func TestPeersThatGetOnlyErrorsRest(t *testing.T) {
	r := memRig(t, 1<<20)
	c := r.simple()
	const rounds = 5
	var b []byte
	for i := range rounds * limits.Refused {
		b = append(b, message(wire.CmdRead, uint64(i), 1<<40, 4096)...)
	}
	begin := time.Now()
	go func() { _, _ = c.Write(b) }() // what does not arrive is not answered
	for range rounds * limits.Refused {
		if e, _ := r.reply(c); e != wire.EINVAL {
			t.Fatalf("got %v, want %v", e, wire.EINVAL)
		}
	}
	if got, least := time.Since(begin), (rounds-1)*limits.RefusedRest; got < least {
		t.Errorf("%d errors in %v, want %v or more", rounds*limits.Refused, got, least)
	}
	if e := r.ask(c, wire.CmdRead, 0, 4096); e != wire.OK {
		t.Errorf("a good read after that: %v", e)
	}
	r.leave(c)
}

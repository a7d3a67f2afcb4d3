package nbd

import (
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// pace finds out whether writes within the turn hold the connection up. The
// clock is looked at once per write and once per turn.
type pace struct {
	mark time.Time // when the last write ended, or the first of a turn began
	slow time.Time // until then writes are for the engine
}

// quick says that a write may happen in the turn, and begins it.
func (p *pace) quick() bool {
	if p.slow.IsZero() && !p.mark.IsZero() {
		return true
	}
	now := time.Now()
	if now.Before(p.slow) {
		return false
	}
	p.slow, p.mark = time.Time{}, now
	return true
}

// wrote ends a write.
func (p *pace) wrote(now time.Time) {
	if now.Sub(p.mark) > limits.SlowWrite {
		p.slow = now.Add(limits.SlowWriteFor)
	}
	p.mark = now
}

// turn ends the turn: time that passes from now on is not the writes'.
func (p *pace) turn() { p.mark = time.Time{} }

package nbd

import (
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// pace finds out whether writes within the turn hold the connection up. The
// clock is looked at once per write and once per turn.
type pace struct {
	first time.Time // when the first write of the turn began
	mark  time.Time // when the last write ended, or the first of a turn began
	slow  time.Time // until then writes are for the engine
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
	p.slow, p.first, p.mark = time.Time{}, now, now
	return true
}

// wrote ends a write.
func (p *pace) wrote(now time.Time) {
	if now.Sub(p.mark) > limits.SlowWrite {
		p.slow = now.Add(limits.SlowWriteFor)
	}
	p.mark = now
}

// long says that the writes of the turn have kept the connection for so long that it
// shall end.
func (p *pace) long() bool { return p.mark.Sub(p.first) > limits.LongTurn }

// turn ends the turn: time that passes from now on is not the writes'.
func (p *pace) turn() { p.first, p.mark = time.Time{}, time.Time{} }

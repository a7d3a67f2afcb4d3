package nbd

import (
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// poller decides how long a connection looks at its empty socket before it
// sleeps. Going to sleep and being woken costs more time, and about as much
// CPU, as a peer that sends one request at a time takes for its next one. It
// polls only for such a peer, and only while that is so: the window opens when a sleep turns out to have
// been short and closes when polling was in vain, each time for twice as many
// rounds; it stops as soon as another connection wakes up or another thread
// wants the processor.
type poller struct {
	max    time.Duration // longest window; 0 turns polling off
	window time.Duration
	skip   int // rounds to sleep at once
	fails  int // times in a row that polling was in vain
	short  int // sleeps in a row that were short

	requests int // decoded since the socket was last found empty

	// busy counts requests that wait for the storage, whose threads may need
	// this processor. crowd counts wake-ups of all connections.
	busy  *atomic.Int64
	crowd *atomic.Uint32

	until, last instant // of the polling in progress
	seen        uint32  // crowd when it began

	since instant // when the sleep began; 0 when awake

	// Looks at the clock that serve twice. mark is when the last turn ended,
	// until something else has happened; came is when the bytes came that
	// were received last, if that was found out. Both may be 0.
	mark, came instant
}

// marked is now, or a moment ago.
func (p *poller) marked() instant {
	t := p.mark
	if p.mark = 0; t == 0 {
		t = now()
	}
	return t
}

// maxSkip bounds the rounds without polling: it is tried now and then.
const maxSkip = 1 << 10

// pays tells whether to poll.
func (p *poller) pays() bool {
	n := p.requests
	p.requests = 0
	if p.window == 0 || n != 1 || p.busy.Load() > 0 {
		return false
	}
	if p.skip > 0 {
		p.skip--
		return false
	}
	return true
}

// begin begins polling.
func (p *poller) begin(now instant) {
	p.until, p.last, p.seen = now+instant(p.window), now, p.crowd.Load()
}

// again tells whether to go on polling, after another look in vain. A look
// that took long says that somebody else wanted this processor and got it.
func (p *poller) again(now instant) bool {
	crowded := now.sub(p.last) > limits.PollCrowded || p.crowd.Load() != p.seen
	if p.last = now; now < p.until && !crowded {
		return true
	}
	p.vain()
	return false
}

// found ends polling well.
func (p *poller) found() { p.fails = 0 }

// vain ends polling without a request.
func (p *poller) vain() {
	p.fails++
	p.skip = min(1<<p.fails, maxSkip)
	if p.skip == maxSkip {
		p.fails--
	}
	p.window, p.short = 0, 0
}

// sleep begins a sleep.
func (p *poller) sleep(now instant) { p.since = now }

// wake ends one, if there was one. Several short ones in a row open the
// window.
func (p *poller) wake(now instant) {
	if p.since == 0 {
		return
	}
	p.crowd.Add(1)
	if now.sub(p.since) >= limits.PollPays {
		p.short = 0
	} else if p.short++; p.short >= limits.PollAfter {
		p.window = p.max
	}
	p.since = 0
}

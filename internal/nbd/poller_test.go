package nbd

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// clock is a poller with a time of its own.
type clock struct {
	poller
	now   instant
	busy  atomic.Int64
	crowd atomic.Uint32
}

func newClock() *clock {
	c := &clock{now: instant(time.Hour)}
	c.poller = poller{max: limits.Poll, busy: &c.busy, crowd: &c.crowd}
	return c
}

func (c *clock) pass(d time.Duration) instant {
	c.now += instant(d)
	return c.now
}

// rest is as many sleeps of d as it takes, each ended by one request.
func (c *clock) rest(d time.Duration) {
	for range limits.PollAfter {
		c.sleep(c.now)
		c.wake(c.pass(d))
	}
	c.requests = 1
}

// polls begins polling if that pays.
func (c *clock) polls() bool {
	if !c.pays() {
		return false
	}
	c.begin(c.now)
	return true
}

func TestPollingBeginsAfterShortSleepsOnly(t *testing.T) {
	c := newClock()
	c.requests = 1
	if c.polls() {
		t.Error("polls before it knows the peer")
	}
	c.rest(limits.PollPays)
	if c.polls() {
		t.Error("polls after a long sleep")
	}
	c.sleep(c.now)
	c.wake(c.pass(1))
	if c.requests = 1; c.polls() {
		t.Error("polls after a single short sleep")
	}
	c.rest(limits.PollPays - 1)
	if !c.polls() {
		t.Error("does not poll after short sleeps")
	}
}

func TestPollingIsForSingleRequestsWithoutStorage(t *testing.T) {
	c := newClock()
	c.rest(1)
	c.requests = 2
	if c.polls() {
		t.Error("polls for a peer that pipelines")
	}
	c.requests = 1
	c.busy.Store(1)
	if c.polls() {
		t.Error("polls while a request waits for the storage")
	}
}

func TestPollingEndsByTimeCrowdAndContention(t *testing.T) {
	for _, tt := range []struct {
		name string
		step time.Duration
		also func(*clock)
		want bool
	}{
		{"in time", time.Microsecond, func(*clock) {}, true},
		{"window over", limits.PollCrowded, func(c *clock) { c.until = c.now }, false},
		{"another connection woke up", time.Microsecond, func(c *clock) { c.crowd.Add(1) }, false},
		{"another thread had the processor", limits.PollCrowded + 1, func(*clock) {}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClock()
			c.rest(1)
			if !c.polls() {
				t.Fatal("does not poll")
			}
			tt.also(c)
			if got := c.again(c.pass(tt.step)); got != tt.want {
				t.Errorf("goes on: got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestPollingInVainBacksOffWithinBounds(t *testing.T) {
	c := newClock()
	rounds := 0
	for polls := 0; polls < 20; rounds++ {
		if rounds > 20*maxSkip {
			t.Fatal("polling has ended for good")
		}
		c.rest(1)
		if c.polls() {
			polls++
			c.vain()
		}
	}
	if rounds < 2*maxSkip {
		t.Errorf("20 polls in vain took %d rounds only", rounds)
	}
	for {
		c.rest(1)
		if c.polls() {
			break
		}
	}
	c.found()
	if c.requests = 1; !c.polls() {
		t.Error("success does not end the backing off")
	}
}

func TestPollingCanBeTurnedOff(t *testing.T) {
	c := newClock()
	c.max = 0
	c.rest(1)
	if c.polls() {
		t.Error("polls")
	}
}

func TestPollingConnectionsAnswer(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Poll = time.Millisecond
	a, b := r.simple(), r.simple()
	for i := range uint64(2000) {
		c := a
		if i%64 == 0 {
			c = b
		}
		r.send(c, message(wire.CmdRead, i, 0, 1))
		if e, cookie := r.reply(c); e != wire.OK || cookie != i {
			t.Fatalf("request %d: got %v for %d", i, e, cookie)
		}
		r.expect(c, 1)
	}
}

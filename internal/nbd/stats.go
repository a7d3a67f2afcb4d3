package nbd

import (
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// opOf maps commands to what is counted.
var opOf = [...]obs.Op{
	wire.CmdRead:    obs.Read,
	wire.CmdWrite:   obs.Write,
	wire.CmdDisc:    obs.NoOp,
	wire.CmdFlush:   obs.Flush,
	wire.CmdTrim:    obs.Trim,
	wire.CmdCache:   obs.Cache,
	wire.CmdZero:    obs.Zero,
	wire.CmdExtents: obs.Extents,
}

func countedAs(c wire.Cmd) obs.Op {
	if int(c) < len(opOf) {
		return opOf[c]
	}
	return obs.NoOp
}

// epoch makes instants comparable as numbers, and reads the monotonic clock
// alone, which is half the price of time.Now.
var epoch = time.Now()

// instant is a reading of the monotonic clock; 0 is never.
type instant int64

func now() instant { return instant(time.Since(epoch)) | 1 }

func (t instant) sub(u instant) time.Duration { return time.Duration(t - u) }

// tally counts what a turn answers by itself. The requests of a turn share its
// beginning and its end: that is two looks at the clock for all of them, and
// a few atomic additions.
type tally struct {
	begun atomic.Int64 // instant of the turn's first request, or 0

	ops     [obs.Ops]tallyRow
	touched uint8        // a bit for each row that is not zero
	last    wire.Request // of those counted

	// What the session has not yet told of itself, see tell.
	requests, in, out uint64
}

// tallyRow is one operation's part of a tally.
type tallyRow struct{ done, failed, bytes uint64 }

// count counts a request that the turn has answered.
func (t *tally) count(req *wire.Request, failed bool) {
	op := countedAs(req.Cmd)
	if op == obs.NoOp {
		return
	}
	r := &t.ops[op]
	r.done++
	if failed {
		r.failed++
	} else {
		r.bytes += req.Len
	}
	t.touched |= 1 << op
	t.last = *req
}

// begin is the instant at which the turn began; if it has not yet, that is
// when its bytes came.
func (s *session) begin() instant {
	if b := s.tally.begun.Load(); b != 0 {
		return instant(b)
	}
	b := s.poll.came
	if s.poll.came, s.poll.mark = 0, 0; b == 0 {
		b = now()
	}
	s.tally.begun.Store(int64(b))
	return b
}

// tellAfter is how many requests a busy session is silent about.
const tellAfter = 64

// tell adds what the session has counted privately to what others see.
func (s *session) tell() {
	t := &s.tally
	s.requests.Add(t.requests)
	s.bytesIn.Add(t.in)
	s.bytesOut.Add(t.out)
	t.requests, t.in, t.out = 0, 0, 0
}

// settle ends the turn's counting.
func (s *session) settle() {
	t := &s.tally
	if t.requests >= tellAfter {
		s.tell()
	}
	begun := instant(t.begun.Load())
	if begun == 0 {
		return
	}
	t.begun.Store(0)
	if t.touched == 0 {
		return
	}
	end := now()
	took := end.sub(begun)
	s.poll.mark = end
	n := 0
	for op := range obs.Ops {
		if r := &t.ops[op]; t.touched&(1<<op) != 0 {
			s.stats.Done(op, r.done, r.failed, r.bytes, took)
			n += int(r.done)
			*r = tallyRow{}
		}
	}
	t.touched = 0
	if slow := s.slow.Load(); slow > 0 && int64(took) >= slow {
		s.reportSlow(&t.last, n, took)
	}
}

// landed counts a request that outlived its turn, when its reply is known.
func (r *request) landed(failed bool) {
	s := r.s
	op := countedAs(r.req.Cmd)
	if op == obs.NoOp {
		return
	}
	took, bytes, errs := now().sub(instant(r.begun.Load())), r.req.Len, uint64(0)
	if failed {
		bytes, errs = 0, 1
	}
	s.stats.Done(op, 1, errs, bytes, took)
	if slow := s.slow.Load(); slow > 0 && int64(took) >= slow {
		s.reportSlow(&r.req, 1, took)
	}
}

// throttles of the events that a connection causes.
type throttles struct{ ioError, slow, stuck obs.Throttle }

// report publishes an event of this connection unless too many went before. The
// line in the log is written in any case: the log counts its own, of all
// connections.
func (s *session) report(e obs.Event, t *obs.Throttle) {
	at := time.Now()
	s.mu.Lock()
	pass, cut := t.Allow(at)
	s.mu.Unlock()
	if pass {
		e.Time, e.Suppressed = at, cut
		s.publish(e)
	}
}

// publish publishes an event of this connection.
func (s *session) publish(e obs.Event) {
	if !s.opt.Events.Active() {
		return
	}
	e.Export, e.Client, e.Peer = s.name, s.id, s.conn.Peer().String()
	s.opt.Events.Publish(e)
}

// about is an event about n requests, of which req stands for all.
func about(k obs.Kind, req *wire.Request, n int) obs.Event {
	return obs.Event{Kind: k, Command: countedAs(req.Cmd).String(), Off: req.Off, Len: req.Len, Count: n}
}

func (s *session) reportFailed(req *wire.Request, e wire.Errno, err error) {
	v := about(obs.IOError, req, 1)
	v.Reason = e.String()
	s.report(v, &s.throttles.ioError)
	s.opt.Log.Warn("request failed", "peer", s.conn.Peer(), "export", s.name, "command", v.Command,
		"offset", req.Off, "length", req.Len, "error", err)
}

func (s *session) reportSlow(req *wire.Request, n int, took time.Duration) {
	e := about(obs.SlowRequest, req, n)
	e.Took = took
	s.report(e, &s.throttles.slow)
	s.opt.Log.Warn("slow request", "peer", s.conn.Peer(), "export", s.name, "command", e.Command,
		"offset", req.Off, "length", req.Len, "took", took, "count", n)
}

// watchStuck reports, each once, the requests that are still not answered
// after limits.StuckFactor times the threshold of slow ones: those that wait
// for the storage, and the turn itself.
func (s *session) watchStuck() {
	slow := s.slow.Load()
	if slow == 0 || slow > int64(now())/limits.StuckFactor {
		return // off, or longer than the program runs
	}
	before := now() - instant(slow*limits.StuckFactor)
	var oldest wire.Request
	age, n := instant(0), 0
	s.mu.Lock()
	for r := s.flying; r != nil; r = r.next {
		b := instant(r.begun.Load())
		if b == 0 || b > before || r.reported || r.answered.Load() {
			continue
		}
		r.reported = true
		if n++; age == 0 || b < age {
			age, oldest = b, r.req
		}
	}
	s.mu.Unlock()
	if n > 0 {
		s.reportStuck(about(obs.StuckRequest, &oldest, n), age)
	}
	if b := instant(s.tally.begun.Load()); b != 0 && b <= before && b != s.stuckTurn {
		s.stuckTurn = b
		s.reportStuck(obs.Event{Kind: obs.StuckRequest, Count: 1, Reason: "answering within the turn"}, b)
	}
}

func (s *session) reportStuck(e obs.Event, begun instant) {
	e.Took = now().sub(begun)
	s.report(e, &s.throttles.stuck)
	s.opt.Log.Warn("request is stuck", "peer", s.conn.Peer(), "export", s.name, "command", e.Command,
		"offset", e.Off, "length", e.Len, "age", e.Took, "count", e.Count)
}

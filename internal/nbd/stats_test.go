package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"regexp"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// leave ends the session in good order and waits until the server has
// counted everything.
func (r *rig) leave(c net.Conn) {
	r.t.Helper()
	r.send(c, message(wire.CmdDisc, 0, 0, 0))
	if err := <-r.errs; err != nil {
		r.t.Errorf("the session ended with %v", err)
	}
}

// ask sends one request, with a payload if it is a write, and reads its
// simple reply, and the data of a read that went well.
func (r *rig) ask(c net.Conn, cmd wire.Cmd, off, n uint64) wire.Errno {
	r.t.Helper()
	b := message(cmd, 1, off, n)
	if cmd == wire.CmdWrite {
		b = append(b, make([]byte, n)...)
	}
	r.send(c, b)
	e, _ := r.reply(c)
	if cmd == wire.CmdRead && e == wire.OK {
		r.expect(c, int(n))
	}
	return e
}

func TestRequestsAreCountedByCommand(t *testing.T) {
	type want struct{ requests, errors, bytes uint64 }
	for _, kind := range []string{"mem", "file", "direct"} {
		t.Run(kind, func(t *testing.T) {
			var r *rig
			switch kind {
			case "mem":
				r = memRig(t, 8<<20)
			case "file":
				r = fileRig(t, 8<<20, "pool", "")
			case "direct":
				r = fileRig(t, 8<<20, "uring", "none")
			}
			c := r.simple()
			for range 3 {
				r.ask(c, wire.CmdRead, 4096, 4096)
			}
			r.ask(c, wire.CmdRead, 0, 1<<20)
			r.ask(c, wire.CmdRead, 8<<20, 4096) // beyond the end
			r.ask(c, wire.CmdWrite, 0, 4096)
			r.ask(c, wire.CmdWrite, 0, 1<<20)
			r.ask(c, wire.CmdWrite, 8<<20, 4096)
			r.ask(c, wire.CmdFlush, 0, 0)
			r.ask(c, wire.CmdFlush, 1, 0) // takes no range
			r.ask(c, wire.CmdZero, 0, 1<<16)
			r.ask(c, wire.CmdTrim, 0, 1<<17)
			r.ask(c, wire.CmdCache, 0, 1<<18)
			r.ask(c, wire.CmdExtents, 0, 4096) // no context was negotiated
			r.ask(c, wire.Cmd(99), 0, 0)
			r.leave(c)

			all := r.exports.stats.Snapshot()
			for op, w := range map[obs.Op]want{
				obs.Read:    {5, 1, 3*4096 + 1<<20},
				obs.Write:   {3, 1, 4096 + 1<<20},
				obs.Flush:   {2, 1, 0},
				obs.Zero:    {1, 0, 1 << 16},
				obs.Trim:    {1, 0, 1 << 17},
				obs.Cache:   {1, 0, 1 << 18},
				obs.Extents: {1, 1, 0},
			} {
				s := all[op]
				if got := (want{s.Requests, s.Errors, s.Bytes}); got != w {
					t.Errorf("%v: counted %+v, want %+v", op, got, w)
				}
				if s.InFlight != 0 || s.Total <= 0 {
					t.Errorf("%v: in flight %d, want 0; total latency %v, want more than 0", op, s.InFlight, s.Total)
				}
			}
		})
	}
}

func TestWaitingRequestsAreInFlight(t *testing.T) {
	r, g := gateRig(t)
	defer g.release()
	c := r.simple()
	r.send(c, append(message(wire.CmdFlush, 1, 0, 0), message(wire.CmdFlush, 2, 0, 0)...))
	<-g.entered
	<-g.entered
	all := r.exports.stats.Snapshot()
	if s := all[obs.Flush]; s.InFlight != 2 || s.Requests != 0 {
		t.Errorf("while two flushes wait: in flight %d, answered %d, want 2 and 0", s.InFlight, s.Requests)
	}
	if l := r.server.Clients(); len(l) != 1 || l[0].InFlight != 2 {
		t.Errorf("client while two flushes wait: got %+v, want 2 in flight", l)
	}
	g.release()
	r.reply(c)
	r.reply(c)
	r.leave(c)
	all = r.exports.stats.Snapshot()
	if s := all[obs.Flush]; s.InFlight != 0 || s.Requests != 2 {
		t.Errorf("afterwards: in flight %d, answered %d, want 0 and 2", s.InFlight, s.Requests)
	}
}

// events makes the server publish its events to the test, which takes them one
// by one.
func (r *rig) events() func(want obs.Kind) obs.Event {
	r.t.Helper()
	r.opt.Events = new(obs.Bus)
	sub, err := r.opt.Events.Subscribe()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(sub.Close)
	ctx, cancel := context.WithTimeout(context.Background(), hangLimit)
	r.t.Cleanup(cancel)
	var queue []obs.Event
	return func(want obs.Kind) obs.Event {
		r.t.Helper()
		if len(queue) == 0 {
			if queue, _, err = sub.Next(ctx); err != nil {
				r.t.Fatalf("waiting for %s: %v", want, err)
			}
		}
		e := queue[0]
		if queue = queue[1:]; e.Kind != want {
			r.t.Fatalf("event: got %+v, want one of kind %s", e, want)
		}
		return e
	}
}

func TestComingAndLeavingAreEvents(t *testing.T) {
	r := memRig(t, 1<<20)
	next := r.events()
	for id := uint64(1); id <= 2; id++ {
		c := r.simple()
		if e := next(obs.ClientConnected); e.Client != id || e.Export != "disk" || e.Peer == "" {
			t.Errorf("connected: got %+v, want client %d of export disk and its peer", e, id)
		}
		r.leave(c)
		if e := next(obs.ClientLeft); e.Client != id || e.Reason != "" {
			t.Errorf("left: got %+v, want client %d without a reason", e, id)
		}
	}
	c := r.simple()
	next(obs.ClientConnected)
	r.send(c, make([]byte, wire.RequestSize))
	if e := next(obs.ClientLeft); e.Reason != errBadMagic.Error() {
		t.Errorf("left after nonsense: got reason %q, want %q", e.Reason, errBadMagic)
	}
}

// broken is a disk that cannot be read.
type broken struct{ backing.Device }

func (broken) ReadAt(context.Context, []byte, int64) error {
	return backing.Wrap("read", 0, 0, syscall.EIO)
}
func (broken) Map(engine.Op, int64, int64, *backing.Mapping) error { return backing.ErrNotMappable }

func TestStorageErrorsAreEventsAndBounded(t *testing.T) {
	r := newRig(t, broken{mem.New(1<<20, nil)}, engine.NewPool(1), bufpool.New(limits.BufferBudget))
	next := r.events()
	c := r.simple()
	next(obs.ClientConnected)
	for range limits.EventBurst {
		if e := r.ask(c, wire.CmdRead, 512, 1024); e != wire.EIO {
			t.Fatalf("read: got %v, want EIO", e)
		}
		if e := next(obs.IOError); e.Command != "read" || e.Off != 512 || e.Len != 1024 || e.Client != 1 {
			t.Errorf("event: got %+v, want the read of 1024 bytes at 512 by client 1", e)
		}
	}
	r.ask(c, wire.CmdWrite, 1<<20, 512) // the client's own mistake
	r.leave(c)
	next(obs.ClientLeft)
	all := r.exports.stats.Snapshot()
	if s := all[obs.Read]; s.Requests != limits.EventBurst || s.Errors != s.Requests || s.Bytes != 0 {
		t.Errorf("counted %+v, want %d errors and no bytes", s, limits.EventBurst)
	}
}

// lines collects what is logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestFailureIsLoggedWithTheExport: with all that a line about a slow request says
// of it; the log cuts floods, which it can count by the export alone.
func TestFailureIsLoggedWithTheExport(t *testing.T) {
	r := newRig(t, broken{mem.New(1<<20, nil)}, engine.NewPool(1), bufpool.New(limits.BufferBudget))
	log := new(lines)
	r.opt.Log = slog.New(slog.NewTextHandler(log, nil))
	c := r.simpleOf("disk")
	const requests = 2 * limits.EventBurst
	for range requests {
		if e := r.ask(c, wire.CmdRead, 512, 1024); e != wire.EIO {
			t.Fatalf("read: got %v, want EIO", e)
		}
	}
	r.leave(c)
	want := regexp.MustCompile(`level=WARN msg="request failed" peer=\S+ export=disk command=read offset=512 length=1024 error="`)
	if got := log.String(); len(want.FindAllString(got, -1)) != requests {
		t.Errorf("log says %q, want %d lines like %q", got, requests, want)
	}
}

func TestSlowRequestsAreReportedAboveTheThreshold(t *testing.T) {
	r := memRig(t, 1<<20)
	next := r.events()
	c := r.simple()
	next(obs.ClientConnected)
	r.ask(c, wire.CmdRead, 0, 512)
	r.server.SetSlow(1)
	r.ask(c, wire.CmdZero, 512, 1024)
	if e := next(obs.SlowRequest); e.Command != "zero" || e.Off != 512 || e.Len != 1024 || e.Took <= 0 || e.Count != 1 {
		t.Errorf("event: got %+v, want the zero of 1024 bytes at 512", e)
	}
	r.server.SetSlow(0)
	r.ask(c, wire.CmdZero, 512, 1024)
	r.leave(c)
	next(obs.ClientLeft)
}

func TestSlowTurnIsReportedOnce(t *testing.T) {
	r := fileRig(t, 1<<20, "pool", "")
	r.opt.Slow = 1
	next := r.events()
	c := r.simple()
	next(obs.ClientConnected)
	r.ask(c, wire.CmdRead, 4096, 512)
	if e := next(obs.SlowRequest); e.Command != "read" || e.Off != 4096 || e.Count != 1 {
		t.Errorf("event: got %+v, want the read at 4096", e)
	}
	r.leave(c)
	next(obs.ClientLeft)
}

func TestStuckRequestIsReportedOnce(t *testing.T) {
	r, g := gateRig(t)
	defer g.release()
	next := r.events()
	r.opt.Stall = 8 * time.Millisecond // ticks of a millisecond
	r.opt.Slow = time.Microsecond
	c := r.simple()
	next(obs.ClientConnected)
	// The second is only found by a later tick than the first, which would
	// find the first once more.
	for i := range uint64(2) {
		r.send(c, message(wire.CmdFlush, i, 0, 0))
		<-g.entered
		if e := next(obs.StuckRequest); e.Command != "flush" || e.Count != 1 || e.Took < limits.StuckFactor*r.opt.Slow {
			t.Errorf("event: got %+v, want one flush that waits for ten times the threshold", e)
		}
	}
	g.release()
	next(obs.SlowRequest)
	next(obs.SlowRequest)
	r.reply(c)
	r.reply(c)
	r.leave(c)
	next(obs.ClientLeft)
}

// partial waits until the only session waits for the rest of a message.
func (r *rig) partial() *session {
	return r.await(func(s *session) bool { return s.receiving.waiting.Load() })
}

// stuckCache is an engine whose page cache answers when it is opened.
type stuckCache struct {
	engine.Engine
	entered, open chan struct{}
}

func (c stuckCache) ReadNow(f *engine.File, p []byte, off int64) int {
	c.entered <- struct{}{}
	<-c.open
	return c.Engine.ReadNow(f, p, off)
}

func TestStuckTurnIsReportedOnce(t *testing.T) {
	r := fileRig(t, 1<<20, "pool", "")
	stuck := stuckCache{r.opt.Engine, make(chan struct{}), make(chan struct{})}
	r.opt.Engine = stuck
	r.opt.Slow = time.Nanosecond
	r.opt.Stall = time.Hour
	next := r.events()
	c := r.simple()
	next(obs.ClientConnected)
	r.send(c, message(wire.CmdRead, 1, 0, 512))
	<-stuck.entered
	x := r.server.sessions()[0]
	x.watchStuck()
	x.watchStuck()
	if e := next(obs.StuckRequest); e.Took <= 0 || e.Count != 1 {
		t.Errorf("event: got %+v, want one stuck turn", e)
	}
	close(stuck.open)
	r.expect(c, wire.SimpleReplySize+512)
	next(obs.SlowRequest)
	r.leave(c)
	next(obs.ClientLeft)
}

func TestTimeOfThePeerIsNotTheRequests(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Slow = time.Nanosecond
	r.opt.Stall = time.Hour
	next := r.events()
	c := r.simple()
	next(obs.ClientConnected)
	const n = 2 * limits.InlineReply
	r.send(c, append(message(wire.CmdWrite, 1, 0, n), make([]byte, n/2)...))
	r.partial().watchStuck()
	r.send(c, make([]byte, n/2))
	r.reply(c)
	if e := next(obs.SlowRequest); e.Command != "write" {
		t.Errorf("event: got %+v, want the write", e)
	}
	r.leave(c)
	next(obs.ClientLeft)
}

func TestStalledPeerIsSeen(t *testing.T) {
	r := fileRig(t, 1<<20, "pool", "")
	r.opt.Stall = time.Hour
	c := r.simple()
	r.send(c, message(wire.CmdWrite, 1, 0, 4096))
	x := r.partial()
	if x.watch(false); r.server.Clients()[0].Stalled {
		t.Error("the client counts as stalled at the first look")
	}
	if x.watch(false); !r.server.Clients()[0].Stalled {
		t.Error("a client that sent half a request does not count as stalled at the second look")
	}
	r.send(c, make([]byte, 4096))
	r.reply(c)
	if x.watch(false); r.server.Clients()[0].Stalled {
		t.Error("the client counts as stalled although it has gone on")
	}
	r.leave(c)
	all := r.exports.stats.Snapshot()
	if s := all[obs.Write]; s.Requests != 1 || s.Bytes != 4096 || s.Total <= 0 {
		t.Errorf("a write in two parts was counted as %+v, want one of 4096 bytes", s)
	}
}

// TestRefusalOfALatePayloadIsCounted: a BLOCK_STATUS that names a context that was
// not negotiated, in a payload that comes by itself, behind its header.
func TestRefusalOfALatePayloadIsCounted(t *testing.T) {
	r := memRig(t, 1<<20)
	c := r.haggle()
	r.option(c, wire.OptExtendedHeaders, "")
	r.option(c, wire.OptSetMeta, metaRequest("disk", wire.ContextAllocation))
	r.option(c, wire.OptGo, infoRequest("disk"))
	payload := binary.BigEndian.AppendUint64(nil, 4096)
	payload = binary.BigEndian.AppendUint32(payload, 77)
	header := wire.AppendExtRequest(nil, wire.Request{Flags: wire.FlagPayloadLen, Cmd: wire.CmdExtents, Len: uint64(len(payload))})
	r.send(c, header)
	r.partial()
	r.send(c, payload)
	r.expect(c, wire.ExtChunkSize)
	r.send(c, header[:1]) // of the next one, which waits for the rest when this one is over
	r.partial()
	if s := r.exports.stats.Snapshot()[obs.Extents]; s.Requests != 1 || s.Errors != 1 {
		t.Errorf("counted %d and %d errors, want 1 and 1", s.Requests, s.Errors)
	}
}

func TestTurnBeginsWhenItsBytesCame(t *testing.T) {
	x := &session{opt: &Options{}}
	x.poll.came, x.poll.mark = 5, 4
	if got := x.begin(); got != 5 {
		t.Errorf("turn with bytes that came at 5: begins at %d", got)
	}
	if got := x.begin(); got != 5 {
		t.Errorf("second request of the turn: begins at %d, want 5", got)
	}
	x.slow = new(atomic.Int64)
	x.settle() // nothing was counted
	before := now()
	if got := x.begin(); got < before {
		t.Errorf("next turn: begins at %d, want the present, %d", got, before)
	}
	x.tally.count(&wire.Request{Cmd: wire.CmdRead, Len: 1}, false)
	x.settle()
	if got := x.poll.marked(); got < before || x.poll.mark != 0 {
		t.Errorf("end of the turn: marked as %d, want at least %d, and once", got, before)
	}
}

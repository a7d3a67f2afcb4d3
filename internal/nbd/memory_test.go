package nbd

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// hold takes all memory but for n buffers of a turn; what it returns gives it back.
func (r *rig) hold(n int) (release func()) {
	var held []*bufpool.Buf
	for b := r.opt.Buffers.TryGet(limits.TurnBuffer); b != nil; b = r.opt.Buffers.TryGet(limits.TurnBuffer) {
		held = append(held, b)
	}
	for range n {
		held[0].Release()
		held = held[1:]
	}
	return func() {
		for _, b := range held {
			b.Release()
		}
	}
}

// awaitShortage returns when somebody waits for memory.
func (r *rig) awaitShortage() {
	for r.opt.Buffers.Waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
}

// TestWaitForMemoryHoldsUpNoPause: a read that has no memory for its reply has
// no part of the disk either.
func TestWaitForMemoryHoldsUpNoPause(t *testing.T) {
	r, pause, _ := pausableRig(t, "writeback")
	c := r.simple()
	release := r.hold(1) // for the request
	r.send(c, message(wire.CmdRead, 1, 0, 4096))
	r.awaitShortage()
	mustPause(t, pause)
	release()
	if e, _ := r.reply(c); e != wire.OK {
		t.Errorf("read: got %v", e)
	}
	r.expect(c, 4096)
}

// TestWaitForMemoryBeginsWhatIsReady: what a request waits for may be what others
// of its turn have.
func TestWaitForMemoryBeginsWhatIsReady(t *testing.T) {
	r, _, want := pausableRig(t, "none")
	c := r.simple()
	release := r.hold(1 + 4) // for the requests, and one read
	r.send(c, append(message(wire.CmdRead, 1, 0, 4*limits.TurnBuffer), message(99, 2, 0, 0)...))
	if e, cookie := r.reply(c); e != wire.OK || cookie != 1 {
		t.Errorf("read: got %v for request %d", e, cookie)
	}
	if got := r.expect(c, 4*limits.TurnBuffer); string(got) != string(want[:len(got)]) {
		t.Error("other bytes than the disk has")
	}
	release()
	if e, cookie := r.reply(c); e != wire.EINVAL || cookie != 2 {
		t.Errorf("unknown command: got %v for request %d", e, cookie)
	}
}

// TestPeerThatHoldsMemoryOthersWaitForIsDropped: only when somebody waits, and not
// before it was seen twice.
func TestPeerThatHoldsMemoryOthersWaitForIsDropped(t *testing.T) {
	r, _, _ := pausableRig(t, "none")
	c := r.simple()
	for i := range uint64(8) {
		r.send(c, message(wire.CmdRead, i, 0, unreadSize))
	}
	var x *session
	for x == nil {
		r.server.each(func(k *session) { x = k }, func(transport.Conn) error { return nil })
	}
	for !x.sending.waiting.Load() {
		time.Sleep(time.Millisecond)
	}
	for _, short := range []bool{true, false, false} {
		if x.watch(short); x.dead.Load() {
			t.Fatalf("dropped, short %v: %v", short, x.why())
		}
	}
	if x.watch(true); x.why() != errDrags {
		t.Errorf("ended by %v, want %v", x.why(), errDrags)
	}
}

// TestPeerThatIsReadLateForWantOfMemoryStays: it has sent all of its request, and what
// is not received is not its fault, however much it has in flight.
func TestPeerThatIsReadLateForWantOfMemoryStays(t *testing.T) {
	r := memRig(t, 1<<20)
	c := r.simple()
	r.send(c, message(wire.CmdWrite, 1, 0, 4096))
	x := r.await(func(s *session) bool {
		n, _ := r.opt.Buffers.Outstanding()
		return s.receiving.waiting.Load() && n == 0
	})
	x.take(1, 2*limits.TurnBuffer)
	release := r.hold(0)
	r.send(c, make([]byte, 4096))
	r.awaitShortage()
	for range watchTicks + 1 {
		x.watch(true)
	}
	if x.dead.Load() {
		t.Errorf("ended by %v", x.why())
	}
	x.give(1, 2*limits.TurnBuffer)
	release()
	if e, _ := r.reply(c); e != wire.OK {
		t.Errorf("write: got %v", e)
	}
}

// TestBuffersCountAsWhatTheyTake: a peer's budget is one of memory, not of bytes
// that were asked for.
func TestBuffersCountAsWhatTheyTake(t *testing.T) {
	r, _, _ := pausableRig(t, "none")
	c := r.simple()
	r.send(c, message(wire.CmdRead, 1, 0, 5<<20))
	var got int64
	for since := time.Now(); got != 8<<20; {
		r.server.each(func(k *session) { got = k.peer.bytes.Load() }, func(transport.Conn) error { return nil })
		if time.Since(since) > hangLimit {
			t.Fatalf("a read of 5 MiB counts as %d bytes, want 8 MiB", got)
		}
	}
}

// TestBlockStatusIsHeldToThePeersBudget: of a peer that asks for the largest reply on
// each of many connections, while the disk answers none.
func TestBlockStatusIsHeldToThePeersBudget(t *testing.T) {
	pause := layer.NewPause(backing.NewEmulate(described{mem.New(1<<20, nil)}))
	hold, err := pause.Begin(limits.PauseLongest)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, pause, engine.NewPool(1), bufpool.New(limits.BufferBudget))
	for i := range limits.MaxContexts {
		r.exports.contexts = append(r.exports.contexts, fmt.Sprintf("qemu:dirty-bitmap:b%d", i))
	}
	const clients = 100
	var all sync.WaitGroup
	for range clients {
		s, err := client.Negotiate(t.Context(), r.dial(t), client.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Go(t.Context(), "disk", r.exports.contexts)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			if _, err := c.Extents(t.Context(), 0, 1<<20, 0); err == nil {
				t.Error("a disk that has none of the contexts described them")
			}
			c.Close()
		})
	}
	b := r.server.sessions()[0].peer
	for since := time.Now(); b.requests.Load()+int64(b.waiters.Load()) < clients; time.Sleep(time.Millisecond) {
		if time.Since(since) > hangLimit {
			t.Fatal("requests neither run nor wait")
		}
	}
	const most = limits.BytesPerPeerAlone + 4<<20 // and one request
	if n := b.bytes.Load(); n > most {
		t.Errorf("the peer has replies of %d bytes in flight, want no more than %d", n, most)
	}
	if _, n := r.opt.Buffers.Outstanding(); n < limits.BytesPerPeerAlone {
		t.Errorf("buffers of %d bytes are lent, want what the peer's budget counts", n)
	}
	if err := hold.Resume(); err != nil {
		t.Fatal(err)
	}
	all.Wait()
}

package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/transporttest"
)

// simple opens a session with simple replies.
func (r *rig) simple() net.Conn {
	r.t.Helper()
	return r.simpleOf("")
}

// simpleOf is simple for the export of that name.
func (r *rig) simpleOf(name string) net.Conn {
	r.t.Helper()
	c := r.dial(r.t)
	r.greet(c, name)
	return c
}

// greet opens a session of the export of that name on c.
func (r *rig) greet(c net.Conn, name string) {
	r.t.Helper()
	c.SetDeadline(time.Now().Add(hangLimit))
	r.expect(c, 18)
	r.send(c, wire.AppendOption(clientFlags(nil), wire.OptExportName, []byte(name)))
	r.expect(c, 10)
}

func (r *rig) send(c net.Conn, p []byte) {
	r.t.Helper()
	if _, err := c.Write(p); err != nil {
		r.t.Fatalf("send: %v", err)
	}
}

func (r *rig) expect(c net.Conn, n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if k, err := io.ReadFull(c, b); err != nil {
		r.t.Fatalf("after %d of %d bytes: %v", k, n, err)
	}
	return b
}

// reply reads a simple reply without payload.
func (r *rig) reply(c net.Conn) (wire.Errno, uint64) {
	r.t.Helper()
	e, cookie, err := wire.DecodeSimpleReply(r.expect(c, wire.SimpleReplySize))
	if err != nil {
		r.t.Fatal(err)
	}
	return e, cookie
}

func message(cmd wire.Cmd, cookie, off, n uint64) []byte {
	return wire.AppendRequest(nil, wire.Request{Cmd: cmd, Cookie: cookie, Off: off, Len: n})
}

// gate is a device whose Flush waits until it is opened.
type gate struct {
	backing.Device
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate(size int64) *gate {
	return &gate{Device: mem.New(size, nil), entered: make(chan struct{}, 1024), open: make(chan struct{})}
}

func (g *gate) Flush(context.Context) error {
	g.entered <- struct{}{}
	<-g.open
	return nil
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func gateRig(t *testing.T) (*rig, *gate) {
	g := newGate(1 << 20)
	return newRig(t, g, engine.NewPool(1), bufpool.New(limits.BufferBudget)), g
}

// TestPeersBudgetLeavesEveryConnectionOne: guests of one user share the bound of
// what a peer has in flight, and none of them can use it up.
func TestPeersBudgetLeavesEveryConnectionOne(t *testing.T) {
	r, g := gateRig(t)
	defer g.release()
	for sent := 0; sent < limits.RequestsPerPeer; sent += limits.RequestsPerConn {
		c := r.simple()
		for i := range uint64(limits.RequestsPerConn) {
			r.send(c, message(wire.CmdFlush, i, 0, 0))
		}
	}
	for range limits.RequestsPerPeer {
		<-g.entered
	}
	c := r.simple()
	if e := r.ask(c, wire.CmdRead, 0, 4096); e != wire.OK {
		t.Errorf("read of another connection: got %v", e)
	}
	r.send(c, message(wire.CmdFlush, 1, 0, 0))
	<-g.entered
	g.release()
	if e, cookie := r.reply(c); e != wire.OK || cookie != 1 {
		t.Errorf("flush of another connection: got %v for %d, want OK for 1", e, cookie)
	}
}

// TestPeersBudgetLeavesEveryConnectionALargeOne: the disks of other guests of one
// user are paused, and have all that the peer may have in flight.
func TestPeersBudgetLeavesEveryConnectionALargeOne(t *testing.T) {
	const piece = limits.BytesPerConn / 16
	r := memRig(t, piece)
	pause := layer.NewPause(r.dev)
	hold, err := pause.Pause(t.Context(), limits.PauseLongest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := hold.Resume(); err != nil {
			t.Error(err)
		}
	}()
	r.exports.large = pause
	const guests = limits.BytesPerPeer / limits.BytesPerConn
	for range guests {
		c := r.simpleOf("large")
		for i := range uint64(limits.BytesPerConn / piece) {
			r.send(c, message(wire.CmdRead, i, 0, piece))
		}
	}
	for used := int64(0); used < limits.BytesPerPeer; _, used = r.opt.Buffers.Outstanding() {
		time.Sleep(time.Millisecond)
	}
	c := r.simple()
	for range 3 {
		if e := r.ask(c, wire.CmdWrite, 0, piece); e != wire.OK {
			t.Errorf("a large write to a disk that is not paused: got %v", e)
		}
	}
}

// TestPeersBudgetBoundsLargeRequests: of a peer that begins a large write on
// each of many connections, and finishes none. Others go on.
func TestPeersBudgetBoundsLargeRequests(t *testing.T) {
	r := memRig(t, limits.MaxIO)
	const hogs = 2 * limits.BytesPerPeerAlone / limits.MaxIO
	for i := range uint64(hogs) {
		r.send(r.simple(), message(wire.CmdWrite, i, 0, limits.MaxIO))
	}
	c := r.simple()
	for used := int64(0); used < limits.BytesPerPeerAlone; _, used = r.opt.Buffers.Outstanding() {
		time.Sleep(time.Millisecond)
	}
	for range 50 { // all the while
		if e := r.ask(c, wire.CmdRead, 0, 4096); e != wire.OK {
			t.Fatalf("a small read: got %v", e)
		}
		if _, used := r.opt.Buffers.Outstanding(); used > limits.BytesPerPeerAlone+limits.MaxIO {
			t.Fatalf("the peer has buffers of %d bytes, want no more than %d and one request", used, limits.BytesPerPeerAlone)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestDrainFinishesWhatIsInFlight(t *testing.T) {
	r, g := gateRig(t)
	c := r.simple()
	r.send(c, message(wire.CmdFlush, 1, 0, 0))
	<-g.entered
	down := make(chan error)
	server := r.server
	r.server = nil
	go func() { down <- server.Shutdown(context.Background()) }()
	// The session has seen the drain when a further request is not answered
	// any more; the one in flight is.
	g.release()
	if e, cookie := r.reply(c); e != wire.OK || cookie != 1 {
		t.Errorf("reply in flight: got %v for %d, want OK for 1", e, cookie)
	}
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the drain: got %d, %v, want EOF", n, err)
	}
	c.Close()
	if err := <-down; err != nil {
		t.Errorf("shutdown: %v", err)
	}
}

// lateConn calls before where its first deadline is set.
type lateConn struct {
	transport.Conn
	before func()
}

func (c *lateConn) SetDeadline(t time.Time) error {
	if f := c.before; f != nil {
		c.before = nil
		f()
	}
	return c.Conn.SetDeadline(t)
}

// TestShutdownDoesNotWaitForANewcomer who says nothing.
func TestShutdownDoesNotWaitForANewcomer(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Handshake = time.Hour
	for range 40 { // what is chosen from may be chosen by chance
		srv := NewServer(r.opt)
		ours, theirs := socketpair(t)
		defer ours.Close()
		c, err := transport.FileConn(theirs)
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		down := make(chan error, 1)
		go srv.Serve(context.Background(), &lateConn{Conn: c, before: func() {
			go func() { down <- srv.Shutdown(context.Background()) }()
			<-srv.quit
			time.Sleep(time.Millisecond) // for all to be told that are there
		}})
		select {
		case <-down:
		case <-time.After(hangLimit):
			t.Fatal("the shutdown waits for a client that says nothing")
		}
	}
}

func TestForcedStopAnswersWithShutdown(t *testing.T) {
	r, g := gateRig(t)
	c := r.simple()
	r.send(c, append(message(wire.CmdFlush, 1, 0, 0), message(wire.CmdFlush, 2, 0, 0)...))
	<-g.entered
	<-g.entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	server := r.server
	r.server = nil
	down := make(chan error)
	go func() { down <- server.Shutdown(ctx) }()
	seen := map[uint64]bool{}
	for range 2 {
		e, cookie := r.reply(c)
		if e != wire.ESHUTDOWN {
			t.Errorf("request %d: got %v, want ESHUTDOWN", cookie, e)
		}
		seen[cookie] = true
	}
	if !seen[1] || !seen[2] {
		t.Errorf("answered were %v, want 1 and 2", seen)
	}
	g.release()
	c.Close()
	if err := <-down; err != ErrUnanswered {
		t.Errorf("shutdown: got %v, want %v", err, ErrUnanswered)
	}
	<-r.errs
}

func TestPeerThatStopsReadingIsDropped(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Stall = 200 * time.Millisecond
	c := r.simple()
	go func() {
		for {
			if _, err := c.Write(message(wire.CmdRead, 0, 0, 1<<20)); err != nil {
				return
			}
		}
	}()
	if err := <-r.errs; !errors.Is(err, errStalled) {
		t.Errorf("session ended with %v, want %v", err, errStalled)
	}
}

// TestPeerThatOnlyAsksIsDropped: requests that come say nothing of the replies
// that are left unread.
func TestPeerThatOnlyAsksIsDropped(t *testing.T) {
	r := fileRig(t, 8<<20, "pool", "")
	r.opt.Stall = time.Hour // the looks are the test's own
	c := r.simple()
	flushes := func() uint64 { return r.exports.stats.Snapshot()[obs.Flush].Requests }
	r.send(c, message(wire.CmdRead, 0, 0, 8<<20))
	x := r.unread()
	for i := uint64(0); i <= watchTicks && !x.dead.Load(); i++ {
		r.send(c, message(wire.CmdFlush, i, 0, 0))
		for flushes() == i {
			time.Sleep(time.Millisecond)
		}
		x.watch(false)
	}
	select {
	case err := <-r.errs:
		if !errors.Is(err, errStalled) {
			t.Errorf("session ended with %v, want %v", err, errStalled)
		}
	case <-time.After(hangLimit):
		t.Error("the client is still there")
	}
}

func TestHalfSentPayloadIsDropped(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Stall = 200 * time.Millisecond
	for _, n := range []uint64{100, 1 << 20} {
		c := r.simple()
		r.send(c, append(message(wire.CmdWrite, 0, 0, n), "ten bytes."...))
		if err := <-r.errs; !errors.Is(err, errStalled) {
			t.Errorf("write of %d: session ended with %v, want %v", n, err, errStalled)
		}
	}
	var b [10]byte
	if err := r.dev.ReadAt(context.Background(), b[:], 0); err != nil || b != [10]byte{} {
		t.Errorf("disk holds %q, %v; nothing of the payload may be written", b, err)
	}
}

func TestIdleConnectionIsLeftAlone(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Stall = 20 * time.Millisecond
	idle := r.simple()
	busy := r.simple()
	// A peer that is dropped for stalling shows that the watch has run its
	// whole course meanwhile.
	r.send(busy, message(wire.CmdWrite, 0, 0, 100))
	if err := <-r.errs; !errors.Is(err, errStalled) {
		t.Fatalf("session ended with %v, want %v", err, errStalled)
	}
	r.send(idle, message(wire.CmdFlush, 5, 0, 0))
	if e, cookie := r.reply(idle); e != wire.OK || cookie != 5 {
		t.Errorf("idle connection: got %v for %d, want OK for 5", e, cookie)
	}
}

func TestRequestsInFlightAreBounded(t *testing.T) {
	r, g := gateRig(t)
	r.opt.Requests = 3
	c := r.simple()
	for i := range 10 {
		r.send(c, message(wire.CmdFlush, uint64(i), 0, 0))
	}
	for range 3 {
		<-g.entered
	}
	select {
	case <-g.entered:
		t.Error("a fourth request was begun")
	default:
	}
	g.release()
	for range 10 {
		if e, _ := r.reply(c); e != wire.OK {
			t.Errorf("got %v, want OK", e)
		}
	}
}

func TestHandshakeHasOneDeadlineInAll(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Handshake = 100 * time.Millisecond
	c := r.dial(r.t)
	r.expect(c, 18)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for _, b := range wire.AppendOption(clientFlags(nil), 77, make([]byte, 4096)) {
			select {
			case <-stop:
				return
			case <-tick.C:
				c.Write([]byte{b})
			}
		}
	}()
	var timeout net.Error
	if err := <-r.errs; !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("handshake ended with %v, want a timeout", err)
	}
	if r.exports.opened.Load() != 0 {
		t.Error("the export was opened")
	}
}

func TestExportIsOpenedByItsOptionsOnly(t *testing.T) {
	for _, tt := range []struct {
		name           string
		p              []byte
		opened, looked int32
	}{
		{"nothing", clientFlags(nil), 0, 0},
		{"LIST", wire.AppendOption(clientFlags(nil), wire.OptList, nil), 0, 0},
		{"SET_META_CONTEXT", metaOption(wire.AppendOption(clientFlags(nil), wire.OptStructuredReply, nil)), 0, 0},
		{"INFO", wire.AppendOption(clientFlags(nil), wire.OptInfo, []byte(infoRequest("disk"))), 0, 1},
		{"GO", goOption(clientFlags(nil)), 1, 0},
		{"EXPORT_NAME", sessionPrefixes[0], 1, 0},
		{"unknown name", wire.AppendOption(clientFlags(nil), wire.OptExportName, []byte("x")), 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := memRig(t, 1<<20)
			r.feed(t, tt.p)
			if n := r.exports.opened.Load(); n != tt.opened {
				t.Errorf("exports opened: got %d, want %d", n, tt.opened)
			}
			if n := r.exports.looked.Load(); n != tt.looked {
				t.Errorf("exports looked at: got %d, want %d", n, tt.looked)
			}
		})
	}
}

// TestRightsAreAskedAgainBeforeTheFirstRequest: when the session is in the list
// of clients, so that whoever changes grants and then disconnects misses none.
func TestRightsAreAskedAgainBeforeTheFirstRequest(t *testing.T) {
	for _, may := range []bool{true, false} {
		r := memRig(t, 1<<20)
		asked, listed := 0, 0
		r.exports.still = func() bool {
			asked++
			listed = len(r.server.Clients())
			return may
		}
		p := append(goOption(clientFlags(nil)), message(wire.CmdWrite, 1, 0, 4)...)
		r.feed(t, append(p, "data"...))
		if asked != 1 || listed != 1 {
			t.Errorf("may %v: asked %d times, with %d clients, want once with 1", may, asked, listed)
		}
		var b [4]byte
		if err := r.dev.ReadAt(t.Context(), b[:], 0); err != nil || (string(b[:]) == "data") != may {
			t.Errorf("may %v: the disk holds %q, %v", may, b, err)
		}
		if n := r.exports.open.Load(); n != 0 {
			t.Errorf("may %v: the export has %d uses afterwards", may, n)
		}
	}
}

func TestSelectiveTLSHidesTheExportFromPlaintext(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.TLS = TLSOn
	r.exports.needTLS = true
	b := r.feed(t, goOption(clientFlags(nil)))
	h, err := wire.DecodeOptReply(b[18:])
	if err != nil || h.Rep != wire.RepErrTLSReqd {
		t.Errorf("GO got %v, %v; want %v", h.Rep, err, wire.RepErrTLSReqd)
	}
	if b := r.feed(t, sessionPrefixes[0]); len(b) != 18 {
		t.Errorf("EXPORT_NAME got %d bytes behind the greeting, want none", len(b)-18)
	}
	if b := r.feed(t, wire.AppendOption(clientFlags(nil), wire.OptList, nil)); bytes.Contains(b, []byte("disk")) {
		t.Errorf("LIST got %q", b)
	}
	off := memRig(t, 1<<20)
	off.exports.needTLS = true
	if h, err := wire.DecodeOptReply(off.feed(t, goOption(clientFlags(nil)))[18:]); err != nil || h.Rep != wire.RepErrUnknown {
		t.Errorf("GO where there is no TLS got %v, %v; want %v", h.Rep, err, wire.RepErrUnknown)
	}
	if r.exports.opened.Load() != 0 || off.exports.opened.Load() != 0 {
		t.Error("the export was opened")
	}
}

// TestExportThatDemandsTLSSinceItWasFoundIsNotOpened: a name is looked up again to
// open what it stands for.
func TestExportThatDemandsTLSSinceItWasFoundIsNotOpened(t *testing.T) {
	for _, tt := range []struct {
		name string
		mode TLSMode
		want wire.Rep
	}{
		{"TLS is possible", TLSOn, wire.RepErrTLSReqd},
		{"TLS is not possible", TLSOff, wire.RepErrUnknown},
	} {
		for opt, p := range map[wire.Opt][]byte{wire.OptGo: goOption(clientFlags(nil)), wire.OptExportName: sessionPrefixes[0]} {
			r := memRig(t, 1<<20)
			r.opt.TLS = tt.mode
			r.exports.found = func() { r.exports.needTLS = true }
			b := r.feed(t, p)[18:]
			if h, err := wire.DecodeOptReply(b); opt == wire.OptGo && (err != nil || h.Rep != tt.want) {
				t.Errorf("%s: %v got %v, %v, want %v", tt.name, opt, h.Rep, err, tt.want)
			}
			if opt == wire.OptExportName && len(b) != 0 {
				t.Errorf("%s: %v got %d bytes behind the greeting, want none", tt.name, opt, len(b))
			}
			if n := r.exports.open.Load(); n != 0 {
				t.Errorf("%s: %v leaves %d uses of the export", tt.name, opt, n)
			}
		}
	}
}

// enter is that of an admission, with one guest for each peer.
func enter(t *testing.T, a *admission, key string) *slot {
	t.Helper()
	s, err := a.enter(key, key, func() {})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// has tells whether the handshake of s may begin.
func (s *slot) has() bool {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	return s.stage == inHandshake
}

func TestHandshakesOfAPeerWaitTheirTurn(t *testing.T) {
	a := newAdmission()
	never := make(chan struct{})
	over := make(chan time.Time)
	close(over)
	var slots []*slot
	for range limits.HandshakingPerPeer {
		s := enter(t, a, "uid:1")
		if err := s.handshake(nil, never); err != nil {
			t.Fatal(err)
		}
		slots = append(slots, s)
	}
	late := enter(t, a, "uid:1")
	if err := late.handshake(over, never); !errors.Is(err, errTooManyHandshaking) {
		t.Errorf("one more in handshake: got %v, want %v", err, errTooManyHandshaking)
	}
	other := enter(t, a, "uid:2")
	if err := other.handshake(nil, never); err != nil {
		t.Errorf("another peer: %v", err)
	}
	done := make(chan error)
	go func() { done <- late.handshake(nil, never) }()
	slots[0].established()
	if err := <-done; err != nil {
		t.Errorf("when one was established: %v", err)
	}
	for _, s := range append(slots, late, other) {
		s.leave()
	}
	wantNobody(t, a)
}

func wantNobody(t *testing.T, a *admission) {
	t.Helper()
	if len(a.peers)+len(a.guests)+a.all+a.turns+len(a.early) != 0 {
		t.Errorf("after all left: %d peers, %d guests, %d connections, %d half open, %d in handshake; want none",
			len(a.peers), len(a.guests), a.all, len(a.early), a.turns)
	}
}

// TestSilentPeersMakeRoom: once their grace is over, and for those with fewer
// half-open connections.
func TestSilentPeersMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission()
		var many, few []*slot
		for range limits.HandshakingPerPeer {
			many = append(many, enter(t, a, "many"))
			time.Sleep(time.Microsecond)
		}
		for i := range limits.Handshaking - len(many) {
			few = append(few, enter(t, a, fmt.Sprint("few", i/4)))
		}
		late := enter(t, a, "late")
		if late.has() || many[0].madeRoom() {
			t.Error("the oldest made room within its grace")
		}
		time.Sleep(limits.HandshakeGrace)
		if !late.has() || !many[0].madeRoom() {
			t.Error("the oldest of the peer that has most did not make room")
		}
		again := enter(t, a, "many")
		time.Sleep(time.Hour)
		if again.has() {
			t.Error("the peer that has most was given a place of another")
		}
		for _, s := range append(many[1:], few...) {
			if s.madeRoom() {
				t.Fatal("more than one made room")
			}
		}
		for _, s := range slices.Concat(many, few, []*slot{late, again}) {
			s.leave()
		}
		wantNobody(t, a)
	})
}

// TestPlaceForAHandshakeIsEquallyShared: with a half-open connection each, the
// oldest makes room for another peer.
func TestPlaceForAHandshakeIsEquallyShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission()
		var all []*slot
		for i := range limits.Handshaking {
			all = append(all, enter(t, a, fmt.Sprint(i)))
			time.Sleep(time.Microsecond)
		}
		time.Sleep(limits.HandshakeGrace)
		late := enter(t, a, "late")
		if !late.has() || !all[0].madeRoom() || all[1].madeRoom() {
			t.Error("a peer that had none was not given the place of the oldest")
		}
	})
}

func TestConnectionsAreBoundedPerPeerAndInAll(t *testing.T) {
	a := newAdmission()
	for range limits.ConnectionsPerPeer {
		enter(t, a, "uid:1").established()
	}
	if _, err := a.enter("uid:1", "uid:1", nil); !errors.Is(err, errTooManyPeerConns) {
		t.Errorf("one more of the peer: got %v, want %v", err, errTooManyPeerConns)
	}
	for i := a.all; i < limits.Connections; i++ {
		enter(t, a, strconv.Itoa(i)).established()
	}
	if _, err := a.enter("uid:2", "uid:2", nil); !errors.Is(err, errTooManyConns) {
		t.Errorf("one more in all: got %v, want %v", err, errTooManyConns)
	}
	if len(a.peers) != 1+limits.Connections-limits.ConnectionsPerPeer {
		t.Errorf("peers: got %d; one that was refused left a trace", len(a.peers))
	}
}

// TestHalfOpenConnectionsMakeRoom: for another guest of their peer, and for
// another peer, but not for whoever has most of them.
func TestHalfOpenConnectionsMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // no grace is over
		a := newAdmission()
		var flood []*slot
		for i := range limits.Connections {
			flood = append(flood, enter(t, a, fmt.Sprint("uid:", i/limits.ConnectionsPerPeer)))
		}
		for i, tt := range []struct{ key, guest, of string }{
			{"uid:1", "uid:1,pid:2", "uid:1"},
			{"uid:9", "uid:9", "uid:0"},
		} {
			s, err := a.enter(tt.key, tt.guest, func() {})
			if err != nil {
				t.Fatalf("%s: %v", tt.guest, err)
			}
			spare := slices.IndexFunc(flood, (*slot).madeRoom)
			if spare < 0 || flood[spare].peer.key != tt.of || spare%limits.ConnectionsPerPeer != limits.HandshakingPerPeer {
				t.Errorf("%s: connection %d made room, want the first of %s that waits", tt.guest, spare, tt.of)
			}
			if err := flood[max(spare, 0)].handshake(nil, nil); err != nil {
				t.Errorf("connection %d waits on: %v", spare, err)
			}
			flood = slices.Delete(flood, spare, spare+1)
			flood = append(flood, s)
			if a.all != limits.Connections {
				t.Errorf("after %d: got %d connections, want %d", i+1, a.all, limits.Connections)
			}
		}
		if _, err := a.enter("uid:2", "uid:2", nil); !errors.Is(err, errTooManyPeerConns) {
			t.Errorf("one more of a peer that has most: got %v, want %v", err, errTooManyPeerConns)
		}
	})
}

// fromAddr is a connection from a TCP address.
type fromAddr struct {
	transport.Conn
	peer transport.Peer
}

func (c *fromAddr) Peer() *transport.Peer { return &c.peer }

// dialFrom connects to the server from a TCP address; the rig closes both ends.
func (r *rig) dialFrom(t *testing.T, addr string) net.Conn {
	t.Helper()
	server, client := transporttest.Pair(t)
	c := &fromAddr{server, transport.Peer{Kind: transport.TCP, Addr: addr + ":1"}}
	go func() { _ = r.server.Serve(context.Background(), c) }()
	return client
}

// TestFloodOfHalfOpenConnectionsHoldsNobodyUp: the time for a handshake is never
// over, and a client that speaks is served, from an address of its own.
func TestFloodOfHalfOpenConnectionsHoldsNobodyUp(t *testing.T) {
	for _, addrs := range []int{2, 40, 250} {
		t.Run(strconv.Itoa(addrs), func(t *testing.T) {
			r := memRig(t, 1<<20)
			r.opt.Handshake = time.Hour
			r.server = NewServer(r.opt)
			for i := range min(addrs*limits.ConnectionsPerPeer, limits.Connections+100) {
				r.dialFrom(t, fmt.Sprint("10.0.0.", i%addrs))
			}
			for range 3 {
				c := r.dialFrom(t, "10.0.1.1")
				c.SetDeadline(time.Now().Add(hangLimit))
				r.expect(c, 18)
				r.send(c, wire.AppendOption(clientFlags(nil), wire.OptExportName, nil))
				r.expect(c, 10)
			}
		})
	}
}

func TestErrnoFitsCommandAndFlags(t *testing.T) {
	for _, tt := range []struct {
		err   error
		cmd   wire.Cmd
		flags wire.CmdFlags
		want  wire.Errno
	}{
		{backing.ErrOutOfRange, wire.CmdWrite, 0, wire.ENOSPC},
		{backing.ErrOutOfRange, wire.CmdZero, 0, wire.ENOSPC},
		{backing.ErrOutOfRange, wire.CmdRead, 0, wire.EINVAL},
		{backing.ErrOutOfRange, wire.CmdTrim, 0, wire.EINVAL},
		{backing.ErrReadOnly, wire.CmdTrim, 0, wire.EPERM},
		{backing.ErrNotSupported, wire.CmdZero, wire.FlagFastZero, wire.ENOTSUP},
		{backing.ErrNotSupported, wire.CmdZero, 0, wire.EINVAL},
		{backing.ErrPoisoned, wire.CmdWrite, 0, wire.EIO},
		{backing.ErrNoSpace, wire.CmdWrite, 0, wire.ENOSPC},
		{io.ErrUnexpectedEOF, wire.CmdRead, 0, wire.EIO},
		{&backing.Error{Op: "read", Path: "/etc/secret", Kind: backing.ErrIO, Err: io.EOF}, wire.CmdRead, 0, wire.EIO},
		{errBadFlags, wire.CmdRead, 0, wire.EINVAL},
	} {
		req := &wire.Request{Cmd: tt.cmd, Flags: tt.flags}
		if got := errnoOf(tt.err, req); got != tt.want {
			t.Errorf("%v on %v: got %v, want %v", tt.err, tt.cmd, got, tt.want)
		}
		if text := errorText(tt.err, tt.want); len(text) > limits.MaxErrorText || text == "" ||
			text == "/etc/secret" {
			t.Errorf("text for %v: %q", tt.err, text)
		}
	}
}

func TestExtentsMergeAndStayBelow32Bits(t *testing.T) {
	hole := func(n int64) backing.Status { return backing.Status{Len: n, Value: wire.StateHole | wire.StateZero} }
	data := func(n int64) backing.Status { return backing.Status{Len: n} }
	for _, tt := range []struct {
		name     string
		wide     bool
		in, want []backing.Status
	}{
		{"equal neighbours", false, []backing.Status{data(1), data(2), hole(3), hole(4)}, []backing.Status{data(3), hole(7)}},
		{"compact split", false, []backing.Status{data(1 << 32)}, []backing.Status{data(maxCompactExtent), data(1<<32 - maxCompactExtent)}},
		{"compact merge then split", false, []backing.Status{data(1 << 31), data(1 << 31)}, []backing.Status{data(maxCompactExtent), data(1<<32 - maxCompactExtent)}},
		{"extended keeps", true, []backing.Status{hole(1 << 40)}, []backing.Status{hole(1 << 40)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := statusList{wide: tt.wide}
			for _, x := range tt.in {
				if !e.add(x) {
					t.Fatal("list is full")
				}
			}
			if len(e.list) != len(tt.want) {
				t.Fatalf("got %v, want %v", e.list, tt.want)
			}
			for i := range e.list {
				if e.list[i] != tt.want[i] {
					t.Errorf("extent %d: got %v, want %v", i, e.list[i], tt.want[i])
				}
			}
		})
	}
}

func TestOneRequestedExtentIsCutNotSplit(t *testing.T) {
	e := statusList{one: true}
	if e.add(backing.Status{Len: 1 << 33}) || len(e.list) != 1 || e.list[0].Len != maxCompactExtent {
		t.Errorf("got %v, want one extent of %d", e.list, int64(maxCompactExtent))
	}
}

func TestExtentListIsBounded(t *testing.T) {
	e := statusList{}
	n := 0
	for e.add(backing.Status{Len: 512, Value: uint32(n % 2)}) {
		if n++; n > limits.MaxExtents {
			t.Fatal("list grows without bound")
		}
	}
	if len(e.list) != limits.MaxExtents {
		t.Errorf("descriptors: got %d, want %d", len(e.list), limits.MaxExtents)
	}
}

func TestUnreadReplyIsNotLostWhenTheSessionEnds(t *testing.T) {
	r := memRig(t, 1<<20)
	p := append(clientFlags(nil), sessionPrefixes[0][4:]...)
	p = append(p, message(wire.CmdRead, 3, 0, 4096)...)
	p = append(p, message(wire.CmdDisc, 0, 0, 0)...)
	b := r.feed(t, p)
	if want := 18 + 10 + wire.SimpleReplySize + 4096; len(b) != want {
		t.Errorf("bytes from the server: got %d, want %d", len(b), want)
	}
	if m := binary.BigEndian.Uint32(b[28:]); m != wire.MagicReply {
		t.Errorf("reply magic: got %#x", m)
	}
}

package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// session is one connection in transmission. Fields without a remark belong
// to the connection's goroutine, the one that runs serve.
type session struct {
	opt    *Options
	conn   transport.Conn
	dev    *backing.Checked
	ctx    context.Context
	cancel context.CancelFunc
	given  <-chan struct{} // closed when what has not begun is given up: when ctx ends
	id     uint64
	name   string    // of the export
	since  time.Time // when the session was made
	stats  *obs.ExportStats
	slow   *atomic.Int64 // see Server
	kept   chan *request // see Server
	chatty bool          // the log wants every request
	always wire.CmdFlags // flags that every command takes

	structured bool // chunks may be sent, compact or extended
	extended   bool
	contexts   []metaContext
	payloads   bool // BLOCK_STATUS may carry a payload

	in    input
	req   wire.Request // the one being looked at
	out   []byte       // replies of this turn, in outBuf
	outB  *bufpool.Buf // nil when there are none
	batch []*engine.IO // transfers of this turn
	m     backing.Mapping
	pace  pace
	poll  poller
	tally tally // of this turn

	refused int // replies with an error since it rested

	sender  sender         // see there
	own     budget         // what this connection has in flight
	peer    *budget        // what its peer has
	owner   engine.Owner   // of all transfers
	work    sync.WaitGroup // requests, queued turns, writeLoop
	lookout lookout

	// For whoever wants to know; requests are those of former turns.
	requests, bytesIn, bytesOut atomic.Uint64
	stalled                     atomic.Bool

	mu        sync.Mutex
	flying    *request    // guarded by mu; requests that outlive their turn
	cause     error       // guarded by mu; why this side ended the connection
	throttles throttles   // guarded by mu
	patience  *time.Timer // guarded by mu; of a forced stop with the peer

	dead    atomic.Bool // the connection was ended from this side
	parted  atomic.Bool // the peer has sent a DISC
	leaving atomic.Bool // no further requests are read

	// The watch over stalls.
	receiving, sending half
	moved              uint64 // owned by the watch: bytes either way at its last look
	holds              bool   // owned by the watch: the peer had much memory then

	stuckTurn instant // owned by the watch; the turn that was reported
}

var (
	errStalled  = errors.New("peer does not read or write any more")
	errDrags    = errors.New("peer takes its time with memory that others wait for")
	errUntaken  = errors.New("peer did not take its replies")
	errTooLong  = errors.New("write is too long to be skipped")
	errBadMagic = errors.New("request has a wrong magic")
)

// newSession makes the session that was negotiated.
func newSession(srv *Server, n *negotiation) *session {
	o := &srv.opt
	s := &session{
		id:         srv.ids.Add(1),
		name:       n.export.Name,
		since:      time.Now(),
		stats:      n.export.Stats,
		slow:       &srv.slow,
		kept:       srv.kept,
		opt:        o,
		conn:       n.conn,
		dev:        n.export.Device,
		chatty:     o.Log.Enabled(context.Background(), slog.LevelDebug),
		structured: n.agreed.structured || n.agreed.extended,
		extended:   n.agreed.extended,
		contexts:   n.agreed.meta.forExport(n.export.Name),
		peer:       &n.slot.peer.budget,
		owner:      engine.OwnerOf(n.conn.Peer().Guest()),
	}
	if s.dev.Info().Caps.Has(backing.CanFUA) {
		// proto.md, "Command flags": on every command once it is offered.
		s.always |= wire.FlagFUA
	}
	s.payloads = s.extended && len(s.contexts) > 0
	s.own.init(int64(o.Requests), o.Bytes)
	s.poll = poller{max: o.Poll, busy: &s.own.requests, crowd: &srv.wakes}
	s.sender.init(s, newLink(n.conn, &s.poll, 4*s.keeps()))
	s.batch = make([]*engine.IO, 0, s.keeps())
	s.lookout.init(s, n.conn)
	s.in.init(s, n.early())
	s.ctx, s.cancel = context.WithCancel(engine.WithOwner(context.Background(), s.owner))
	s.given = s.ctx.Done()
	return s
}

// keeps is for how many requests of this connection all is there.
func (s *session) keeps() int { return min(s.opt.Keep, s.opt.Requests) }

// serve answers requests until the peer disconnects. What is in flight then is
// finished and sent before it returns; of a peer that is gone without a DISC, only
// what has begun. orderly tells that both sides know of the end: the connection can
// linger.
func (s *session) serve(ctx context.Context) (orderly bool, err error) {
	stop := context.AfterFunc(ctx, s.drain)
	defer stop()
	s.lookout.start()
	defer s.lookout.stop()
	err = s.readLoop()
	if e := s.endTurn(); err == nil {
		err = e
	}
	s.tell()
	s.finish(err)
	s.endPatience()
	s.m.Release() // of a read whose reply was cut off
	s.in.release()
	s.releaseOut()
	s.cancel()

	switch {
	case s.dead.Load():
		return false, s.why()
	case err == nil, errors.Is(err, io.EOF), s.leaving.Load():
		return true, nil
	}
	return errors.Is(err, errTooLong), err
}

// finish waits for what is in flight when err, nil after a DISC, has ended readLoop.
// "The server MUST handle all outstanding requests" after a DISC (proto.md,
// "NBD_CMD_DISC"), wherever its sender is.
func (s *session) finish(err error) {
	if err != nil && !s.own.empty() {
		if errors.Is(err, io.ErrUnexpectedEOF) { // TLS: no close_notify
			s.fail(errGone)
		}
		s.lookout.begin()
		defer s.lookout.end()
		s.lookout.look()
	}
	s.work.Wait()
}

// magicSize is the size of a request's magic.
const magicSize = 4

// readLoop decodes and dispatches until the peer says DISC (nil), leaves
// (io.EOF) or breaks the protocol.
func (s *session) readLoop() error {
	size, magic := wire.RequestSize, uint32(wire.MagicRequest)
	if s.extended {
		size, magic = wire.ExtRequestSize, wire.MagicExtRequest
	}
	for {
		if err := s.waitForRoom(); err != nil {
			return err
		}
		// The magic first: what is no request must not make the peer wait
		// until as many bytes have come as a request has.
		b, err := s.in.header(magicSize)
		if err != nil {
			return err
		}
		if binary.BigEndian.Uint32(b) != magic {
			return errBadMagic
		}
		if b, err = s.in.header(size); err != nil {
			return err
		}
		if s.req, err = s.decode(b); err != nil {
			return err
		}
		s.in.skip(size)
		s.poll.requests++
		s.tally.requests++
		if s.req.Cmd == wire.CmdDisc {
			s.parted.Store(true)
			return nil
		}
		if err := s.dispatch(&s.req); err != nil {
			return err
		}
		if err := s.rest(); err != nil {
			return err
		}
	}
}

// rest slows down a peer that gets nothing but errors. They are answered at
// once, so that its goroutine would never wait for anything, and the scheduler
// would look for what other peers send, one request at a time, every 10 ms
// only.
func (s *session) rest() error {
	if s.refused < limits.Refused {
		return nil
	}
	s.refused = 0
	if err := s.endTurn(); err != nil {
		return err
	}
	t := time.NewTimer(limits.RefusedRest)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
	return nil
}

func (s *session) decode(b []byte) (wire.Request, error) {
	if s.extended {
		return wire.DecodeExtRequest(b)
	}
	return wire.DecodeRequest(b)
}

// endTurn hands the turn's transfers to the engine and its replies to the
// peer.
func (s *session) endTurn() error {
	s.pace.turn()
	if len(s.batch) > 0 {
		s.opt.Engine.Submit(s.batch)
		clear(s.batch)
		s.batch = s.batch[:0]
	}
	err := s.flushOut()
	s.settle()
	if err != nil {
		return err
	}
	s.sender.Flush()
	return nil
}

// park is what happens before the connection's goroutine waits for the peer:
// the turn ends, and an idle connection holds no buffers.
func (s *session) park() error {
	if err := s.endTurn(); err != nil {
		return err
	}
	s.releaseOut()
	s.tell()
	if s.in.empty() {
		s.in.release()
	}
	return nil
}

// waitForRoom bounds what is in flight: the next request is not looked at
// before there is room for it. A connection with nothing in flight does not
// wait for the others of its peer, who may be other guests of one user; but see
// earmark.
func (s *session) waitForRoom() error {
	for _, b := range [...]*budget{&s.own, s.peer} {
		if !b.full() {
			continue
		}
		stop := s.dead.Load
		if b == s.peer {
			stop = s.unbound
		}
		if stop() {
			continue
		}
		if err := s.waitFor(b, stop); err != nil {
			return err
		}
	}
	if s.dead.Load() {
		return net.ErrClosed
	}
	return nil
}

// waitFor waits until b has room or stop says so, with all that is ready on its
// way.
func (s *session) waitFor(b *budget, stop func() bool) error {
	if err := s.endTurn(); err != nil {
		return err
	}
	s.tell()
	s.lookout.begin()
	b.wait(stop)
	s.lookout.end()
	s.poll.mark = 0
	if s.dead.Load() {
		return net.ErrClosed
	}
	return nil
}

// unbound tells that the connection need not wait for its peer's budget. What
// it has in flight it gives back to that one last, which wakes who waits.
func (s *session) unbound() bool { return s.dead.Load() || s.own.empty() }

func (s *session) take(requests, bytes int) {
	s.own.take(requests, bytes)
	s.peer.take(requests, bytes)
}

func (s *session) give(requests, bytes int) {
	s.own.give(requests, bytes)
	s.peer.give(requests, bytes)
}

// reserve makes room for n bytes of replies in this turn's buffer; n is at
// most limits.TurnBuffer. What it returns is appended to s.out by extending
// it. It may wait for memory: with no lease, and everything that the turn has
// ready leaves first, as what it holds may be what is waited for.
func (s *session) reserve(n int) error {
	if ok, err := s.tryReserve(n); ok || err != nil {
		return err
	}
	if err := s.endTurn(); err != nil {
		return err
	}
	b, err := s.buffer(limits.TurnBuffer)
	if err != nil {
		return err
	}
	s.outB, s.out = b, b.Bytes()[:0]
	return nil
}

// buffer lends n bytes, which it may wait for.
func (s *session) buffer(n int) (*bufpool.Buf, error) {
	if b := s.opt.Buffers.TryGet(n); b != nil {
		return b, nil
	}
	s.lookout.begin()
	defer s.lookout.end()
	return s.opt.Buffers.Get(s.ctx, n)
}

// tryReserve is reserve for who has a lease: it does not wait, and tells whether
// there is room.
func (s *session) tryReserve(n int) (ok bool, err error) {
	if s.outB != nil && len(s.out)+n > cap(s.out) {
		if err := s.flushOut(); err != nil {
			return false, err
		}
	}
	if s.outB != nil {
		return true, nil
	}
	b := s.opt.Buffers.TryGet(limits.TurnBuffer)
	if b == nil {
		return false, nil
	}
	s.outB, s.out = b, b.Bytes()[:0]
	return true, nil
}

// flushOut sends the turn's replies, or queues what does not fit.
func (s *session) flushOut() error {
	if len(s.out) == 0 {
		return nil
	}
	if !s.sender.claim() {
		s.sender.push(s.takeOut(0))
		return s.sender.broken()
	}
	n, err := s.sender.link.trySend(s.out, false)
	switch {
	case err != nil:
		s.sender.yield()
		s.fail(err)
		return err
	case n < len(s.out):
		s.sender.yield(s.takeOut(n))
	default:
		s.out = s.out[:0]
		s.sender.yield()
		s.sending.moved()
	}
	s.tally.out += uint64(n)
	return nil
}

// takeOut makes a segment of the replies from n on and hands their buffer
// over to it.
func (s *session) takeOut(n int) segment {
	g := segment{body: s.out[n:], turn: s.outB}
	s.out, s.outB = nil, nil
	s.work.Add(1)
	s.take(0, limits.TurnBuffer)
	return g
}

func (s *session) releaseOut() {
	if s.outB != nil {
		s.outB.Release()
		s.out, s.outB = nil, nil
	}
}

// half is one direction of a connection, as the watch sees it. Progress in the
// one says nothing of the other: a peer may ask for more and more, and take none
// of it.
type half struct {
	waiting atomic.Bool   // in the hands of the peer: inside a message
	moves   atomic.Uint32 // signs of progress
	seen    uint32        // owned by the watch
	ticks   int           // owned by the watch
}

func (h *half) moved() { h.moves.Add(1) }

// still counts the looks in a row at which the peer was waited for and nothing
// had moved.
func (h *half) still() int {
	if moves := h.moves.Load(); moves != h.seen || !h.waiting.Load() {
		h.seen, h.ticks = moves, 0
	} else {
		h.ticks++
	}
	return h.ticks
}

// watch is called once a tick by the server; short says that memory is waited for
// that long.
func (s *session) watch(short bool) {
	s.watchStuck()
	still := max(s.receiving.still(), s.sending.still())
	s.stalled.Store(still > 0)
	switch slow := s.drags(); {
	case still >= watchTicks:
		s.fail(errStalled)
	case slow && short:
		s.fail(errDrags)
	}
}

// drags tells that the peer has had much memory in its hands since the last look,
// and took or sent little.
func (s *session) drags() bool {
	moved := s.bytesOut.Load() + uint64(s.receiving.moves.Load())*limits.StallBytes
	held := (s.sending.waiting.Load() || s.receiving.waiting.Load()) && s.own.bytes.Load() > limits.TurnBuffer
	slow := held && s.holds && moved-s.moved < limits.ShortBytes
	s.moved, s.holds = moved, held
	return slow
}

// fail ends the connection at once; replies that are not out are dropped, and
// requests that wait for their turn are given up, unless they came before a DISC: see
// finish.
func (s *session) fail(err error) {
	s.mu.Lock()
	if s.cause == nil {
		s.cause = err
	}
	s.mu.Unlock()
	s.dead.Store(true)
	s.sender.fail(err)
	if !s.parted.Load() {
		s.cancel()
	}
	// Not Close: it would wait for the call that may be running fail.
	s.conn.SetDeadline(time.Unix(1, 0))
	s.own.wake()
	s.peer.wake()
}

func (s *session) why() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// drain stops reading requests; those that were read are answered.
func (s *session) drain() {
	s.leaving.Store(true)
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

// abandon is a forced stop: what has not been answered gets ESHUTDOWN
// (proto.md, "Terminating the transmission phase"), what waits for its turn is
// given up, and whatever the storage still says is not waited for. What the peer
// has not taken limits.Linger later is dropped. It returns how many requests had
// no answer.
func (s *session) abandon() int {
	s.drain()
	defer s.cancel()
	s.mu.Lock()
	var late []*request
	for r := s.flying; r != nil; r = r.next {
		if r.answered.CompareAndSwap(false, true) {
			late = append(late, r)
		}
	}
	heads := make([][]byte, len(late))
	for i, r := range late {
		heads[i] = s.appendError(nil, &r.req, wire.ESHUTDOWN, "server is shutting down", -1)
	}
	s.work.Add(len(late)) // they are in flight: the count is not zero
	if s.patience == nil {
		s.patience = time.AfterFunc(limits.Linger, s.cutOff)
	}
	s.mu.Unlock()
	defer s.work.Add(-len(late))
	for _, h := range heads {
		s.sender.push(segment{head: h})
	}
	s.sender.Flush()
	return len(late)
}

// cutOff ends a forced stop.
func (s *session) cutOff() {
	if s.sending.waiting.Load() {
		s.fail(errUntaken)
	} else {
		s.fail(ErrUnanswered)
	}
}

func (s *session) endPatience() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.patience != nil {
		s.patience.Stop()
	}
}

package nbd

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// request is a request that outlives its turn: it waits for the engine or
// runs on a goroutine of its own. Requests that are answered within the turn
// never have one.
type request struct {
	s   *session
	req wire.Request

	buf *bufpool.Buf // payload, or nil
	p   []byte       // the payload's bytes
	m   backing.Mapping

	ios   [backing.MaxRuns]engine.IO
	at    [backing.MaxRuns]int64 // guest offset of each transfer
	left  atomic.Int32           // transfers that are not done
	mu    sync.Mutex
	err   error // guarded by mu until left is 0; the first error
	errAt int64 // guarded by mu until left is 0; where it happened

	hole     bool          // a read that is answered by a hole chunk
	head     [64]byte      // the reply's header
	charge   int           // bytes taken from the budgets
	contexts []metaContext // of a BLOCK_STATUS
	answered atomic.Bool   // a reply is queued
	begun    atomic.Int64  // instant when it was looked at; 0 while its payload is received
	op       obs.Op        // as what it is counted
	reported bool          // guarded by session.mu; it was found stuck

	prev, next *request // in session.flying, guarded by session.mu

	ioDoneFn func(*engine.IO)
	runFn    func()
}

// requests keeps requests for reuse by any session.
var requests sync.Pool

func makeRequest() *request {
	r := new(request)
	r.ioDoneFn, r.runFn = r.ioDone, r.run
	return r
}

// getRequest takes one that is kept, if there is one.
func (s *session) getRequest() *request {
	select {
	case r := <-s.kept:
		return r
	default:
	}
	if r, ok := requests.Get().(*request); ok {
		return r
	}
	return makeRequest()
}

func (s *session) putRequest(r *request) {
	select {
	case s.kept <- r:
	default:
		requests.Put(r)
	}
}

// newRequest takes req out of the turn; charge is the size of its buffer.
// answered says that its reply has begun.
func (s *session) newRequest(req *wire.Request, charge int, answered bool) *request {
	r := s.getRequest()
	r.s, r.req, r.charge = s, *req, 0
	if charge > 0 {
		r.charge = bufpool.Charge(charge)
	}
	r.err, r.errAt, r.hole = nil, -1, false
	r.left.Store(1) // the turn's own share, see transferred
	r.answered.Store(answered)
	r.begun.Store(int64(s.begin()))
	if r.op = countedAs(req.Cmd); r.op != obs.NoOp {
		s.stats.Fly(r.op, 1)
	}
	s.take(1, r.charge)
	s.work.Add(1)
	s.mu.Lock()
	r.prev, r.next, r.reported = nil, s.flying, false
	if s.flying != nil {
		s.flying.prev = r
	}
	s.flying = r
	s.mu.Unlock()
	return r
}

// earmark takes a buffer of n bytes from the peer's budget, if it has room, ahead of
// newRequest, which takes them too; then unmark gives these back. What is not
// large need not ask: waitForRoom lets a connection with nothing in flight pass,
// and a peer has many, but together they take little. With something large such
// a connection may go beyond the peer's budget, see mostOfPeer.
func (s *session) earmark(n int) bool {
	return n <= limits.TurnBuffer || s.peer.reserve(bufpool.Charge(n), s.mostOfPeer())
}

// mostOfPeer is how many bytes of the peer's budget may be taken before this
// connection makes a large request: others of its peer, who may be other guests
// whose disks are paused, do not stop one with nothing in flight.
func (s *session) mostOfPeer() int64 {
	if s.own.empty() {
		return limits.BytesPerPeerAlone
	}
	return limits.BytesPerPeer
}

// fits tells whether earmark is worth trying, or nothing is any more.
func (s *session) fits() bool {
	return s.dead.Load() || s.peer.bytes.Load() < s.mostOfPeer()
}

func (s *session) unmark(n int) {
	if n > limits.TurnBuffer {
		s.peer.give(0, bufpool.Charge(n))
	}
}

// tryBuffer lends n bytes, marked for the request that buffered makes, or nil
// if the peer's budget or the memory has no room: whoever has a lease does not
// wait for it. unlend takes them back.
func (s *session) tryBuffer(n int) *bufpool.Buf {
	if !s.earmark(n) {
		return nil
	}
	b := s.opt.Buffers.TryGet(n)
	if b == nil {
		s.unmark(n)
	}
	return b
}

func (s *session) unlend(b *bufpool.Buf) {
	s.unmark(len(b.Bytes()))
	b.Release()
}

// buffered is newRequest with a buffer of tryBuffer.
func (s *session) buffered(req *wire.Request, b *bufpool.Buf, answered bool) *request {
	p := b.Bytes()
	r := s.newRequest(req, len(p), answered)
	s.unmark(len(p))
	r.buf, r.p = b, p
	return r
}

// newBuffered is newRequest with a buffer of n bytes, which it waits for.
func (s *session) newBuffered(req *wire.Request, n int) (*request, error) {
	for !s.earmark(n) {
		if err := s.waitFor(s.peer, s.fits); err != nil {
			return nil, err
		}
	}
	r := s.newRequest(req, n, false)
	s.unmark(n)
	if n == 0 {
		return r, nil
	}
	if err := r.lend(n); err != nil {
		r.finish()
		return nil, err
	}
	return r, nil
}

// finish gives back all that r holds, after its reply has left.
func (r *request) finish() {
	s := r.s
	s.mu.Lock()
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		s.flying = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	}
	s.mu.Unlock()
	r.m.Release()
	if r.op != obs.NoOp {
		s.stats.Fly(r.op, -1)
	}
	if r.buf != nil {
		r.buf.Release()
	}
	charge := r.charge
	r.s, r.buf, r.p, r.contexts, r.prev, r.next = nil, nil, nil, nil, nil, nil
	s.putRequest(r)
	s.give(1, charge)
	s.work.Done()
}

// lend gives r a buffer of n bytes. It may wait for memory: everything that
// the turn has ready leaves first.
func (r *request) lend(n int) error {
	r.buf = r.s.opt.Buffers.TryGet(n)
	if r.buf == nil {
		if err := r.s.endTurn(); err != nil {
			return err
		}
		b, err := r.s.buffer(n)
		if err != nil {
			return err
		}
		r.buf = b
	}
	r.p = r.buf.Bytes()
	return nil
}

// copyFile makes the range of a file in g, which answers r, a body in the buffer
// that r was given for that, and ends the lease.
func (r *request) copyFile(g *segment) error {
	t := &engine.IO{Op: engine.OpRead, File: g.file, Buf: r.p[:g.n], Off: g.off}
	err := engine.Do(context.WithoutCancel(r.s.ctx), r.s.opt.Engine, t)
	if err == nil && t.N < g.n {
		err = errShortFile
	}
	if err != nil {
		return err
	}
	g.body, g.n = t.Buf, 0
	r.m.Release()
	return nil
}

// transfer queues I/O i of r for the end of the turn: bytes [from, to) of the
// payload, at off of file f.
func (r *request) transfer(i int, op engine.Op, f *engine.File, from, to, off int64) {
	t := &r.ios[i]
	r.at[i] = int64(r.req.Off) + from
	t.Op, t.File, t.Owner, t.Buf, t.Off = op, f, r.s.owner, r.p[from:to], off
	t.N, t.Err, t.Cancel, t.Done, t.After = 0, nil, r.s.given, r.ioDoneFn, &r.s.sender
	r.left.Add(1)
	r.s.batch = append(r.s.batch, t)
}

// ioDone runs on a goroutine of the engine.
func (r *request) ioDone(t *engine.IO) {
	err := t.Err
	if err == nil && t.N < len(t.Buf) {
		// The file has become shorter: never zeroes, always an error.
		err = io.ErrUnexpectedEOF
	}
	if err = t.File.Failed(t.Op, err); err != nil {
		r.mu.Lock()
		if r.err == nil {
			r.err, r.errAt = err, r.guestOffset(t)
		}
		r.mu.Unlock()
	}
	r.transferred()
}

// transferred counts down, each transfer and the turn that queued them once;
// the last one answers.
func (r *request) transferred() {
	if r.left.Add(-1) == 0 {
		r.answer(backing.Wrap(r.req.Cmd.String(), int64(r.req.Off), int64(r.req.Len), r.err))
	}
}

// guestOffset is where in the disk transfer t stopped.
func (r *request) guestOffset(t *engine.IO) int64 {
	for i := range r.ios {
		if t == &r.ios[i] {
			return r.at[i] + int64(t.N)
		}
	}
	return int64(r.req.Off)
}

// answer queues the reply to r, unless a forced stop has sent one already.
func (r *request) answer(err error) {
	if !r.answered.CompareAndSwap(false, true) {
		r.landed(true) // with ESHUTDOWN
		r.finish()
		return
	}
	r.landed(err != nil)
	r.m.Release() // the peer may leave the reply unread
	g := segment{req: r}
	switch {
	case err != nil:
		g.head = r.s.appendFailure(r.head[:0], &r.req, err, r.errAt)
	case r.hole:
		g.head = r.s.appendReadHole(r.head[:0], &r.req)
	case r.req.Cmd == wire.CmdRead:
		g.head, g.body = r.s.appendReadHead(r.head[:0], &r.req), r.p
	case r.req.Cmd == wire.CmdExtents:
		g.head = r.p
	default:
		g.head = r.s.appendDone(r.head[:0], &r.req)
	}
	r.s.sender.push(g)
}

// start runs r on a goroutine of its own.
func (r *request) start() { go r.runFn() }

// run is for what may block: calls that cannot be mapped.
func (r *request) run() {
	err := r.s.ctx.Err()
	if err == nil {
		err = r.call()
	}
	o := &r.s.sender // r is gone with its answer
	r.answer(err)
	o.Flush()
}

// call asks the disk.
func (r *request) call() (err error) {
	dev, ctx := r.s.dev, r.s.ctx
	off, n := device(&r.req)
	switch r.req.Cmd {
	case wire.CmdRead:
		if r.hole = r.s.isHole(&r.req); !r.hole {
			err = dev.ReadAt(ctx, r.p, off)
		}
	case wire.CmdWrite:
		err = dev.WriteAt(ctx, r.p, off, deviceFlags(r.req.Flags))
	case wire.CmdFlush:
		err = dev.Flush(ctx)
	case wire.CmdTrim:
		err = dev.Trim(ctx, off, n, deviceFlags(r.req.Flags))
	case wire.CmdCache:
		err = dev.Cache(ctx, off, n)
	case wire.CmdZero:
		err = dev.Zero(ctx, off, n, deviceFlags(r.req.Flags))
	case wire.CmdExtents:
		r.p, err = r.s.collectExtents(r.p[:0], &r.req, r.contexts)
	}
	return err
}

var flagMap = [...]struct {
	wire wire.CmdFlags
	dev  backing.Flags
}{
	{wire.FlagFUA, backing.FUA},
	{wire.FlagNoHole, backing.NoHole},
	{wire.FlagFastZero, backing.FastZero},
	{wire.FlagReqOne, backing.ReqOne},
}

func deviceFlags(f wire.CmdFlags) (d backing.Flags) {
	for _, m := range flagMap {
		if f&m.wire != 0 {
			d |= m.dev
		}
	}
	return d
}

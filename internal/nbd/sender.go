package nbd

import (
	"errors"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// segment is a piece of the outgoing stream: head, then body, then a range of
// a file. Each may be empty.
type segment struct {
	head, body []byte

	file *engine.File
	off  int64
	n    int

	// What ends with the segment, both may be nil: the request that it
	// answers, and the turn's reply buffer.
	req  *request
	turn *bufpool.Buf
}

func (g *segment) size() int { return len(g.head) + len(g.body) + g.n }

// skip forgets the first n bytes, which were sent.
func (g *segment) skip(n int) {
	k := min(n, len(g.head))
	g.head, n = g.head[k:], n-k
	k = min(n, len(g.body))
	g.body, n = g.body[k:], n-k
	g.off, g.n = g.off+int64(n), g.n-n
}

// sender owns the outgoing half of a connection. One goroutine at a time owns
// the socket: the connection's own when it claims an idle sender at the end
// of a turn, one of the engine's that flushes, or writeLoop, which exists only
// while the peer does not take what is queued.
type sender struct {
	link link
	s    *session
	loop func() // writeLoop, made once

	mu     sync.Mutex
	q      []segment // guarded by mu
	busy   bool      // guarded by mu; somebody owns the socket
	bound  bool      // guarded by mu; writeLoop has limits.Unread
	unread bool      // guarded by mu; that is over
	err    error     // guarded by mu; nothing is sent any more

	// Owned by whoever owns the socket.
	spare []segment
	bufs  [][]byte
}

func (o *sender) init(s *session, l link) {
	o.s, o.link, o.loop = s, l, o.writeLoop
	n := 2 * s.keeps() // a turn's replies may stand between two requests
	o.q, o.spare, o.bufs = make([]segment, 0, n), make([]segment, 0, n), make([][]byte, 0, 2*n)
}

// claim makes the caller the owner if the sender is idle. Then it must end
// with yield.
func (o *sender) claim() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.busy || o.err != nil {
		return false
	}
	o.busy = true
	return true
}

// yield gives up what claim took. What the owner could not send goes ahead of
// what was queued meanwhile.
func (o *sender) yield(rest ...segment) {
	o.mu.Lock()
	o.q = slices.Insert(o.q, 0, rest...)
	o.startLocked(len(o.q) > 0)
	o.mu.Unlock()
}

// push queues segments, with none of others between them: the parts of one
// reply go in one call (proto.md, "Transmission": replies are not interleaved).
// It never waits, and does not send: Flush does. On a broken connection the
// segments end at once.
func (o *sender) push(list ...segment) {
	o.mu.Lock()
	if o.err != nil {
		o.mu.Unlock()
		o.endAll(list)
		return
	}
	o.q = append(o.q, list...)
	o.mu.Unlock()
}

// pushFile is push for the range of a file, while the peer takes what it is
// sent: else nothing is queued, and it reports false.
func (o *sender) pushFile(list ...segment) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.unread || o.err != nil {
		return false
	}
	o.q = append(o.q, list...)
	o.boundLocked(true)
	return true
}

// Flush sends what is queued, as far as the peer takes it at once, and leaves
// the rest to writeLoop. It does nothing while somebody owns the socket, who
// will find what is queued.
func (o *sender) Flush() {
	o.mu.Lock()
	if o.busy || len(o.q) == 0 {
		o.mu.Unlock()
		return
	}
	o.busy = true
	batch := o.takeLocked()
	o.mu.Unlock()

	n, err := o.tryAll(batch)
	if err != nil {
		o.endAll(batch)
		o.s.fail(err)
		o.yield()
		return
	}
	rest := o.sent(batch, n)
	o.spare = batch[:0] // yield copies rest before anybody reuses it
	o.yield(rest...)
}

// takeLocked takes all that is queued; the owner gives the slice back as spare.
func (o *sender) takeLocked() []segment {
	batch := o.q
	o.q, o.spare = o.spare[:0], nil
	return batch
}

// tryAll sends the segments of batch up to the first range of a file.
func (o *sender) tryAll(batch []segment) (int, error) {
	n, err := o.link.trySendAll(o.gather(batch, math.MaxInt))
	o.letGo()
	if n > 0 {
		o.s.sending.moved()
		o.s.bytesOut.Add(uint64(n))
	}
	return n, err
}

// gather collects up to most bytes of what batch begins with, up to the first
// range of a file. letGo forgets them.
func (o *sender) gather(batch []segment, most int) [][]byte {
	for i := range batch {
		g := &batch[i]
		for _, b := range [...][]byte{g.head, g.body} {
			if b = b[:min(len(b), most)]; len(b) > 0 {
				o.bufs = append(o.bufs, b)
				most -= len(b)
			}
		}
		if g.n > 0 || most == 0 {
			break
		}
	}
	return o.bufs
}

func (o *sender) letGo() {
	clear(o.bufs)
	o.bufs = o.bufs[:0]
}

// sent ends what the first n bytes of batch were the whole of, and returns the
// rest.
func (o *sender) sent(batch []segment, n int) (rest []segment) {
	for len(batch) > 0 && n >= batch[0].size() {
		n -= batch[0].size()
		o.end(&batch[0])
		batch = batch[1:]
	}
	if len(batch) > 0 {
		batch[0].skip(n)
	}
	return batch
}

func (o *sender) endAll(batch []segment) {
	for i := range batch {
		o.end(&batch[i])
	}
}

// startLocked makes writeLoop the owner, or nobody.
func (o *sender) startLocked(work bool) {
	o.busy = work
	if work {
		o.s.work.Add(1)
		go o.loop()
	}
}

// fail drops what is queued and will be.
func (o *sender) fail(err error) {
	o.mu.Lock()
	var q []segment
	if o.err == nil {
		o.err = err
		q, o.q = o.q, nil
	}
	o.mu.Unlock()
	o.endAll(q)
}

// broken tells why nothing is sent any more, or nil.
func (o *sender) broken() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// end settles a segment that was sent or dropped.
func (o *sender) end(g *segment) {
	if g.turn != nil {
		g.turn.Release()
		o.s.give(0, limits.TurnBuffer)
		o.s.work.Done()
	}
	if g.req != nil {
		g.req.finish()
	}
	*g = segment{}
}

// writeLoop sends what is queued, as much as there is in one system call, and
// leaves when nothing is.
func (o *sender) writeLoop() {
	defer o.s.work.Done()
	for {
		o.mu.Lock()
		o.unread = false
		o.boundLocked(false)
		if len(o.q) == 0 {
			o.busy = false
			o.mu.Unlock()
			return
		}
		batch := o.takeLocked()
		o.boundLocked(slices.ContainsFunc(batch, func(g segment) bool { return g.n > 0 }))
		o.mu.Unlock()

		o.s.sending.waiting.Store(true)
		batch, err := o.sendAll(batch)
		o.s.sending.waiting.Store(false)
		o.spare = batch[:0]
		if err != nil {
			o.s.fail(err)
		}
	}
}

// sendPiece bounds what is sent between two signs of progress.
const sendPiece = 1 << 20

// sendAll sends batch, ends each segment when it is out, and returns the batch,
// all ended, with what it has taken from the queue.
//
// What the peer leaves unread for longer than limits.Unread, whether it takes
// nothing or takes its time, holds no part of the disk any more: a pause of the
// disk, with all its clients, would wait for it.
func (o *sender) sendAll(batch []segment) ([]segment, error) {
	rest, err := o.sendRest(batch)
	if errors.Is(err, os.ErrDeadlineExceeded) && !o.s.dead.Load() {
		batch = o.takeUnread(batch, rest)
		rest = batch
		if err = copyFiles(batch); err == nil {
			rest, err = o.sendRest(batch)
		}
	}
	o.endAll(rest)
	return batch, err
}

// sendRest sends batch piece by piece and returns what is not out.
func (o *sender) sendRest(batch []segment) (rest []segment, err error) {
	for rest = batch; len(rest) > 0 && err == nil; {
		var n int
		n, err = o.sendSome(rest)
		rest = o.sent(rest, n)
		o.s.bytesOut.Add(uint64(n))
		if err == nil {
			o.s.sending.moved()
		}
	}
	return rest, err
}

// sendSome sends one piece of what batch begins with.
func (o *sender) sendSome(batch []segment) (int, error) {
	if g := &batch[0]; g.n > 0 && g.n == g.size() {
		return o.link.sendFile(g.file, g.off, min(g.n, sendPiece))
	}
	defer o.letGo()
	return o.link.send(o.gather(batch, sendPiece))
}

// boundLocked bounds the waits for the peer, from the first range of a file that
// is queued on, or ends that. A session that has failed stays without time.
func (o *sender) boundLocked(on bool) {
	if o.bound == on {
		return
	}
	var t time.Time
	if o.bound = on; on {
		t = time.Now().Add(limits.Unread)
	}
	o.s.conn.SetWriteDeadline(t)
	if o.s.dead.Load() {
		o.s.conn.SetWriteDeadline(time.Unix(1, 0))
	}
}

// takeUnread makes a batch, in the memory of the last, of its rest and of all
// that is queued. From now on no range of a file is.
func (o *sender) takeUnread(batch, rest []segment) []segment {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.unread = true
	o.boundLocked(false)
	batch = append(slices.Delete(batch, 0, len(batch)-len(rest)), o.q...)
	clear(o.q)
	o.q = o.q[:0]
	return batch
}

// copyFiles exchanges the ranges of files in batch for copies.
func copyFiles(batch []segment) error {
	for i := range batch {
		if g := &batch[i]; g.n > 0 {
			if err := g.req.copyFile(g); err != nil {
				return err
			}
		}
	}
	return nil
}

package nbd

import (
	"errors"
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

// size is what head and body have to send.
func (g *segment) size() int { return len(g.head) + len(g.body) }

// skip forgets the first n bytes of head and body, which were sent.
func (g *segment) skip(n int) {
	k := min(n, len(g.head))
	g.head, g.body = g.head[k:], g.body[n-k:]
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
	unread bool      // guarded by mu; the peer takes its time
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
	rest := batch
	for len(rest) > 0 && n >= rest[0].size() && rest[0].n == 0 {
		n -= rest[0].size()
		o.end(&rest[0])
		rest = rest[1:]
	}
	if len(rest) > 0 {
		rest[0].skip(n)
	}
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
	for i := range batch {
		o.bufs = append(o.bufs, batch[i].head, batch[i].body)
		if batch[i].n > 0 {
			break
		}
	}
	n, err := o.link.trySendAll(o.bufs)
	clear(o.bufs)
	o.bufs = o.bufs[:0]
	if n > 0 {
		o.s.sending.moved()
		o.s.bytesOut.Add(uint64(n))
	}
	return n, err
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
		if len(o.q) == 0 {
			o.busy = false
			o.mu.Unlock()
			return
		}
		batch := o.takeLocked()
		o.mu.Unlock()

		o.s.sending.waiting.Store(true)
		batch, err := o.sendAll(batch)
		o.s.sending.waiting.Store(false)
		o.endAll(batch)
		o.spare = batch[:0]
		if err != nil {
			o.s.fail(err)
		}
	}
}

// sendPiece bounds what is sent between two signs of progress.
const sendPiece = 1 << 20

// sendAll sends batch, and returns it with what it has taken from the queue.
func (o *sender) sendAll(batch []segment) ([]segment, error) {
	o.bufs = o.bufs[:0]
	defer func() { clear(o.bufs); o.bufs = o.bufs[:0] }()
	queued := 0
	flush := func() error {
		err := o.link.send(o.bufs)
		o.s.bytesOut.Add(uint64(queued))
		o.bufs, queued = o.bufs[:0], 0
		o.s.sending.moved()
		return err
	}
	add := func(b []byte) error {
		for len(b) > 0 {
			k := min(len(b), sendPiece-queued)
			o.bufs = append(o.bufs, b[:k])
			b = b[k:]
			if queued += k; queued == sendPiece {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		return nil
	}
	for i := 0; i < len(batch); i++ {
		g := &batch[i]
		if err := add(g.head); err != nil {
			return batch, err
		}
		if err := add(g.body); err != nil {
			return batch, err
		}
		if g.n == 0 {
			continue
		}
		if err := flush(); err != nil {
			return batch, err
		}
		err := o.sendFile(g, time.Now().Add(limits.Unread))
		if errors.Is(err, os.ErrDeadlineExceeded) && !o.s.dead.Load() {
			batch = o.copyFiles(batch, i)
			if g = &batch[i]; g.n > 0 {
				err = o.sendFile(g, time.Time{})
			} else {
				err = add(g.body)
			}
		}
		if err != nil {
			return batch, err
		}
	}
	return batch, flush()
}

// sendFile sends the range of a file, for as long as until, which may be never.
func (o *sender) sendFile(g *segment, until time.Time) error {
	o.setDeadline(until)
	defer o.setDeadline(time.Time{})
	for g.n > 0 {
		k, err := o.link.sendFile(g.file, g.off, min(g.n, sendPiece))
		g.off, g.n = g.off+int64(k), g.n-k
		if k > 0 {
			o.s.bytesOut.Add(uint64(k))
			o.s.sending.moved()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// setDeadline bounds the next sends, unless the session has failed meanwhile:
// its deadline is over.
func (o *sender) setDeadline(t time.Time) {
	o.s.conn.SetWriteDeadline(t)
	if o.s.dead.Load() {
		o.s.conn.SetWriteDeadline(time.Unix(1, 0))
	}
}

// copyFiles exchanges the ranges of files that are still to be sent, from
// segment i on, for copies: the peer takes its time, and a pause of the disk,
// with all its clients, would wait for their leases. What there is no memory for
// stays.
func (o *sender) copyFiles(batch []segment, i int) []segment {
	o.mu.Lock()
	o.unread = true
	batch = append(batch, o.q...)
	clear(o.q)
	o.q = o.q[:0]
	o.mu.Unlock()
	for ; i < len(batch); i++ {
		if g := &batch[i]; g.n > 0 {
			g.req.copyFile(g)
		}
	}
	return batch
}

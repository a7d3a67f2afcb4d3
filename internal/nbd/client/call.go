package client

import (
	"context"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// call is one request in flight.
type call struct {
	req  wire.Request
	done chan struct{} // closed when err is final

	// These belong to readLoop, and to the waiter after done.
	covered spans
	fault   *Error // the first error of the reply
	faults  int
	lists   [][]Extent
	err     error

	// mu guards buf, which is nil when nobody waits for it any more.
	mu  sync.Mutex
	buf []byte
}

// finish gives the call its result.
func (k *call) finish(err error) {
	k.err = err
	close(k.done)
}

// abandon takes the buffer away from readLoop.
func (k *call) abandon() {
	k.mu.Lock()
	k.buf = nil
	k.mu.Unlock()
}

// put copies p into the buffer at off.
func (k *call) put(p []byte, off uint64) {
	k.mu.Lock()
	if k.buf != nil {
		copy(k.buf[off:], p)
	}
	k.mu.Unlock()
}

// zero clears n bytes of the buffer at off.
func (k *call) zero(off, n uint64) {
	k.mu.Lock()
	if k.buf != nil {
		clear(k.buf[off : off+n])
	}
	k.mu.Unlock()
}

// do sends k with its payload and waits for the reply.
func (c *Client) do(ctx context.Context, k *call, payload []byte) error {
	if err := c.begin(ctx, k, payload); err != nil {
		return err
	}
	select {
	case <-k.done:
	case <-ctx.Done():
		k.abandon()
		return ctx.Err()
	}
	return k.err
}

// begin sends k; its result follows on k.done unless begin fails.
func (c *Client) begin(ctx context.Context, k *call, payload []byte) error {
	k.done = make(chan struct{})
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.failed:
		return c.cause()
	}
	c.mu.Lock()
	if c.err != nil || c.leaving {
		leaving := c.err == nil
		c.mu.Unlock()
		<-c.slots
		if leaving {
			return ErrClosed
		}
		return c.cause()
	}
	c.cookie++
	k.req.Cookie = c.cookie
	c.pending[c.cookie] = k
	c.mu.Unlock()
	err := c.write(ctx, k, payload)
	if err != nil {
		k.abandon()
		c.forget(k)
	}
	return err
}

// forget takes a call off the list that was never sent, or whose reply is
// complete. It reports whether the call was there: its result is then the
// caller's to give.
func (c *Client) forget(k *call) bool {
	c.mu.Lock()
	_, there := c.pending[k.req.Cookie]
	delete(c.pending, k.req.Cookie)
	c.mu.Unlock()
	if there {
		<-c.slots
	}
	return there
}

// write sends a request. When it fails with bytes of it sent, the connection
// has ended.
func (c *Client) write(ctx context.Context, k *call, payload []byte) error {
	select {
	case c.sender <- struct{}{}:
		defer func() { <-c.sender }()
	case <-ctx.Done():
		return ctx.Err()
	case <-c.failed:
		return c.cause()
	}
	interrupted := make(chan struct{})
	stop := func() bool { return true }
	if ctx.Done() != nil {
		stop = context.AfterFunc(ctx, func() {
			c.conn.SetWriteDeadline(past)
			close(interrupted)
		})
	}
	err := c.send(k.req, payload)
	if !stop() {
		<-interrupted
		if err == nil {
			c.conn.SetWriteDeadline(time.Time{})
		}
	}
	if err != nil {
		c.fail(err)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return c.cause()
	}
	return nil
}

// send writes the header and as much payload as fits beside it at once, so
// that no header travels alone. The caller is the sender.
func (c *Client) send(r wire.Request, payload []byte) error {
	p := c.header[:0]
	if c.replies == Extended {
		p = wire.AppendExtRequest(p, r)
	} else {
		p = wire.AppendRequest(p, r)
	}
	n := min(len(payload), cap(p)-len(p))
	p = append(p, payload[:n]...)
	if _, err := c.conn.Write(p); err != nil {
		return err
	}
	if n == len(payload) {
		return nil
	}
	_, err := c.conn.Write(payload[n:])
	return err
}

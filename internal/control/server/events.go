package server

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// events sends a line for each event, from now on, until the peer leaves or
// the server ends.
func (c *call) events() (any, error) {
	ch, cancel := c.s.service.Subscribe(limits.ControlEventQueue)
	defer cancel()
	c.sentStatus = http.StatusOK
	c.w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(c.w)
	if err := c.flush(rc); err != nil {
		return sent{}, nil
	}
	enc := json.NewEncoder(c.w)
	for {
		select {
		case <-c.ctx.Done():
			return sent{}, nil
		case e, ok := <-ch:
			if !ok || c.writeDeadline() != nil || enc.Encode(e) != nil || c.flush(rc) != nil {
				return sent{}, nil
			}
		}
	}
}

func (c *call) flush(rc *http.ResponseController) error {
	if err := c.writeDeadline(); err != nil {
		return err
	}
	return rc.Flush()
}

// Events hands each event to every listener, as Service.Subscribe promises.
// Its zero value is ready for use. Publish never waits for a listener.
type Events struct {
	mu        sync.Mutex
	listeners map[*listening]struct{} // guarded by mu
	closed    bool                    // guarded by mu
}

// listening is one listener. Its goroutine, which ends with stop, owns out.
type listening struct {
	out  chan api.Event
	stop chan struct{}
	wake chan struct{} // has room for one
	most int

	mu    sync.Mutex
	queue []api.Event // guarded by mu
	lost  uint64      // guarded by mu; since the queue was full
}

// Publish adds an event for all listeners. Time is set if it is zero.
func (h *Events) Publish(e api.Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.listeners {
		l.put(e)
	}
}

// Subscribe is Service.Subscribe.
func (h *Events) Subscribe(n int) (<-chan api.Event, func()) {
	l := &listening{out: make(chan api.Event), stop: make(chan struct{}), wake: make(chan struct{}, 1), most: max(n, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		close(l.out)
		return l.out, func() {}
	}
	if h.listeners == nil {
		h.listeners = map[*listening]struct{}{}
	}
	h.listeners[l] = struct{}{}
	go l.deliverLoop()
	return l.out, func() { h.leave(l) }
}

// leave returns when the listener's channel is closed.
func (h *Events) leave(l *listening) {
	h.mu.Lock()
	if _, ok := h.listeners[l]; ok {
		delete(h.listeners, l)
		close(l.stop)
	}
	h.mu.Unlock()
	for range l.out {
	}
}

// Close ends all listeners, and those to come. What waits for them is lost.
func (h *Events) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for l := range h.listeners {
		delete(h.listeners, l)
		close(l.stop)
	}
}

// put keeps e if there is room. Once an event is lost, so are those that
// follow until the queue is empty: they come after the gap, of which the
// listener is told then.
func (l *listening) put(e api.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost > 0 || len(l.queue) >= l.most {
		l.lost++
		return
	}
	l.queue = append(l.queue, e)
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// next is the oldest event, or how many are missing.
func (l *listening) next() (api.Event, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case len(l.queue) > 0:
		e := l.queue[0]
		l.queue = l.queue[1:]
		return e, true
	case l.lost > 0:
		e := api.Event{Time: time.Now(), Kind: "lost", Lost: l.lost}
		l.lost = 0
		return e, true
	}
	return api.Event{}, false
}

func (l *listening) deliverLoop() {
	defer close(l.out)
	for {
		e, ok := l.next()
		if !ok {
			select {
			case <-l.wake:
				continue
			case <-l.stop:
				return
			}
		}
		select {
		case l.out <- e:
		case <-l.stop:
			return
		}
	}
}

package obs

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Kind says what happened.
type Kind string

// The kinds of events.
const (
	ClientConnected Kind = "client-connected" // transmission begins
	ClientLeft      Kind = "client-left"      // Reason says why, "" in good order
	IOError         Kind = "io-error"         // the storage failed a request
	SlowRequest     Kind = "slow-request"     // a request was answered late
	StuckRequest    Kind = "stuck-request"    // a request is still not answered
	ExportState     Kind = "export-state"     // Reason is the new state, as the control API has it
	ExportPoisoned  Kind = "export-poisoned"  // a failed flush: writes are refused from now on
	WriteThreshold  Kind = "threshold"        // a write went beyond that of an export, which is disarmed
	Reloaded        Kind = "reloaded"         // the configuration; Reason says what has changed
)

// Event is something that an operator may want to know at once. Fields that
// its kind has no use for are zero. Texts of a peer are in it as they came.
type Event struct {
	Seq  uint64    `json:"seq"` // rises by one from event to event
	Time time.Time `json:"time"`
	Kind Kind      `json:"kind"`

	Export string `json:"export,omitempty"`
	Client uint64 `json:"client,omitempty"` // ID of the connection
	Peer   string `json:"peer,omitempty"`   // its address in printable form
	Reason string `json:"reason,omitempty"` // for people; the bus cuts it at limits.EventText

	// The request, of several the one that stands for them.
	Command string        `json:"command,omitempty"`
	Off     uint64        `json:"offset,omitempty"` // bytes
	Len     uint64        `json:"length,omitempty"` // bytes
	Took    time.Duration `json:"took_ns,omitempty"`

	// Of a threshold, in bytes: the offset, and how far beyond it the write ends.
	Threshold int64 `json:"write-threshold,omitempty"`
	Exceeded  int64 `json:"amount-exceeded,omitempty"`

	Count      int `json:"count,omitempty"`      // requests that the event is about
	Suppressed int `json:"suppressed,omitempty"` // events of this kind that were left out before it
}

// ErrTooManySubscribers is the answer to a Subscribe beyond
// limits.EventSubscribers.
var ErrTooManySubscribers = errors.New("too many subscribers")

// Bus carries events to subscribers. Publishing never waits: who reads too
// slowly loses its oldest events and is told how many. The methods may be
// called at any time. Its zero value is ready.
type Bus struct {
	listening atomic.Int32 // subscribers

	mu   sync.Mutex
	seq  uint64                     // guarded by mu
	subs map[*Subscription]struct{} // guarded by mu
}

// Active tells whether anybody listens, for publishers to whom making an
// event costs something. It is false for a nil Bus.
func (b *Bus) Active() bool { return b != nil && b.listening.Load() > 0 }

// Publish gives e a number, and the present time unless it has one, and
// queues it for every subscriber. It does nothing for a nil Bus.
func (b *Bus) Publish(e Event) {
	if b == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	if len(e.Reason) > limits.EventText {
		e.Reason = strings.ToValidUTF8(e.Reason[:limits.EventText], "")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq++
	e.Seq = b.seq
	for s := range b.subs {
		s.putLocked(e)
	}
}

// Subscribe begins to collect events for the caller, who ends that with
// Close. It fails with ErrTooManySubscribers.
func (b *Bus) Subscribe() (*Subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.subs) >= limits.EventSubscribers {
		return nil, ErrTooManySubscribers
	}
	s := &Subscription{bus: b, ready: make(chan struct{}, 1)}
	if b.subs == nil {
		b.subs = make(map[*Subscription]struct{})
	}
	b.subs[s] = struct{}{}
	b.listening.Add(1)
	return s, nil
}

// Subscription is one listener's queue of at most limits.EventQueue events.
type Subscription struct {
	bus   *Bus
	ready chan struct{} // has a token when there may be something new

	// Guarded by bus.mu.
	ring  []Event // grows up to limits.EventQueue
	first int     // where the oldest event is, once the ring is full
	lost  int
	ended bool
}

// putLocked appends e, at the cost of the oldest event when the queue is full.
func (s *Subscription) putLocked(e Event) {
	if len(s.ring) < limits.EventQueue {
		s.ring = append(s.ring, e)
	} else {
		s.ring[s.first] = e
		s.first = (s.first + 1) % len(s.ring)
		s.lost++
	}
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// ErrClosed is what Next says after Close.
var ErrClosed = errors.New("subscription is closed")

// Next waits for events and takes all that there are, in order, behind lost
// ones that the queue had no room for. It fails with ErrClosed or as ctx
// does. One caller at a time.
func (s *Subscription) Next(ctx context.Context) (events []Event, lost int, err error) {
	for {
		events, lost, ended := s.take()
		if len(events) > 0 {
			return events, lost, nil
		}
		if ended {
			return nil, 0, ErrClosed
		}
		select {
		case <-s.ready:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
}

func (s *Subscription) take() (events []Event, lost int, ended bool) {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	events = append(s.ring[s.first:len(s.ring):len(s.ring)], s.ring[:s.first]...)
	lost, s.lost = s.lost, 0
	s.ring, s.first = nil, 0
	return events, lost, s.ended
}

// Close ends the subscription; a Next that waits returns. It may be called
// more than once.
func (s *Subscription) Close() {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	delete(s.bus.subs, s)
	s.bus.listening.Add(-1)
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

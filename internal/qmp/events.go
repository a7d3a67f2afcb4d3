package qmp

import (
	"context"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Subscription is a bounded queue of a monitor's events from the moment of
// Subscribe. Safe for concurrent use.
type Subscription struct {
	m    *Monitor
	wake chan struct{} // holds a token when the queue may have something

	mu      sync.Mutex
	queue   []Event // guarded by mu, at most limits.QMPEventQueue
	dropped uint64  // guarded by mu
}

// Subscribe begins a queue of events. A monitor that is not connected yet may
// be subscribed to. The caller calls Close. With limits.QMPSubscribers open
// the error is ErrTooMany.
func (m *Monitor) Subscribe() (*Subscription, error) {
	s := &Subscription{m: m, wake: make(chan struct{}, 1)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.subs) >= limits.QMPSubscribers {
		return nil, ErrTooMany
	}
	m.subs[s] = struct{}{}
	return s, nil
}

// Close ends the queue. A Next that waits is not woken.
func (s *Subscription) Close() {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	delete(s.m.subs, s)
}

// Next waits for the oldest event that was not taken. When the monitor has
// ended and the queue is empty, the error is the monitor's.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	for {
		if e, ok := s.take(); ok {
			return e, nil
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return Event{}, ctx.Err()
		case <-s.m.done:
			if e, ok := s.take(); ok {
				return e, nil
			}
			return Event{}, s.m.Err()
		}
	}
}

// Dropped is the number of events that were lost because nobody took older
// ones in time, or because they were longer than limits.QMPEvent.
func (s *Subscription) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

func (s *Subscription) take() (Event, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return Event{}, false
	}
	e := s.queue[0]
	s.queue[0] = Event{}
	s.queue = s.queue[1:]
	if len(s.queue) > 0 {
		s.signal()
	}
	return e, true
}

// put never blocks.
func (s *Subscription) put(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(e.Data) > limits.QMPEvent {
		s.dropped++
		s.signal()
		return
	}
	if len(s.queue) == limits.QMPEventQueue {
		s.queue[0] = Event{}
		s.queue = s.queue[1:]
		s.dropped++
	}
	s.queue = append(s.queue, e)
	s.signal()
}

func (s *Subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

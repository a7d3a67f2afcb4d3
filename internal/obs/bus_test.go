package obs

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func subscribe(t *testing.T, b *Bus) *Subscription {
	t.Helper()
	s, err := b.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func next(t *testing.T, s *Subscription) ([]Event, int) {
	t.Helper()
	events, lost, err := s.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return events, lost
}

func TestEverySubscriberGetsEveryEventInOrder(t *testing.T) {
	var b Bus
	b.Publish(Event{Kind: ClientLeft}) // nobody listens
	s, u := subscribe(t, &b), subscribe(t, &b)
	for range 10 {
		b.Publish(Event{Kind: ClientConnected})
	}
	for _, x := range []*Subscription{s, u} {
		events, lost := next(t, x)
		if len(events) != 10 || lost != 0 {
			t.Fatalf("got %d events and %d lost, want 10 and 0", len(events), lost)
		}
		for i, e := range events {
			if e.Seq != uint64(i)+2 || e.Time.IsZero() || e.Kind != ClientConnected {
				t.Errorf("event %d: got %+v, want number %d and a time", i, e, i+2)
			}
		}
	}
}

func TestSlowSubscriberLosesItsOldestEventsAndIsTold(t *testing.T) {
	var b Bus
	s := subscribe(t, &b)
	for range limits.EventQueue + 7 {
		b.Publish(Event{})
	}
	events, lost := next(t, s)
	if lost != 7 || len(events) != limits.EventQueue {
		t.Fatalf("got %d events and %d lost, want %d and 7", len(events), lost, limits.EventQueue)
	}
	for i, e := range events {
		if e.Seq != uint64(i)+8 {
			t.Fatalf("event %d has number %d, want %d", i, e.Seq, i+8)
		}
	}
	b.Publish(Event{})
	if events, lost := next(t, s); len(events) != 1 || lost != 0 {
		t.Errorf("afterwards: got %d events and %d lost, want 1 and 0", len(events), lost)
	}
}

func TestEventsThatWereTakenAreNotOverwritten(t *testing.T) {
	var b Bus
	s := subscribe(t, &b)
	b.Publish(Event{})
	events, _ := next(t, s)
	for range 2 * limits.EventQueue {
		b.Publish(Event{})
	}
	if events[0].Seq != 1 {
		t.Errorf("event has become number %d, want 1", events[0].Seq)
	}
}

// TestTextsAreCut: an event is a line, which who reads it bounds.
func TestTextsAreCut(t *testing.T) {
	var b Bus
	s := subscribe(t, &b)
	text := strings.Repeat("x", limits.EventText-1)
	b.Publish(Event{Reason: text})
	b.Publish(Event{Reason: text + "ä and more"})
	events, _ := next(t, s)
	for i, e := range events {
		if e.Reason != text {
			t.Errorf("event %d has a text of %d bytes, which ends with %q", i, len(e.Reason), e.Reason[len(e.Reason)-4:])
		}
	}
}

func TestNextEndsWithItsContextAndWithClose(t *testing.T) {
	var b Bus
	s := subscribe(t, &b)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("next with a cancelled context: got %v", err)
	}
	done := make(chan error)
	go func() {
		_, _, err := s.Next(t.Context())
		done <- err
	}()
	s.Close()
	s.Close()
	if err := <-done; err != ErrClosed {
		t.Errorf("next at close: got %v, want %v", err, ErrClosed)
	}
	if b.Active() {
		t.Error("the bus is active without subscribers")
	}
}

func TestSubscribersAreBounded(t *testing.T) {
	var b Bus
	for range limits.EventSubscribers {
		subscribe(t, &b)
	}
	if _, err := b.Subscribe(); !errors.Is(err, ErrTooManySubscribers) {
		t.Errorf("one more: got %v, want %v", err, ErrTooManySubscribers)
	}
}

func TestPublishersAndSubscribersMeetSafely(t *testing.T) {
	var b Bus
	s := subscribe(t, &b)
	const publishers, each = 4, 500
	var all sync.WaitGroup
	for range publishers {
		all.Go(func() {
			for range each {
				b.Publish(Event{})
				if s, err := b.Subscribe(); err == nil {
					s.Close()
				}
			}
		})
	}
	for got := 0; got < publishers*each; {
		events, lost := next(t, s)
		got += len(events) + lost
	}
	all.Wait()
}

func TestNoBusIsQuiet(t *testing.T) {
	var b *Bus
	if b.Publish(Event{}); b.Active() {
		t.Error("a nil bus is active")
	}
}

package libvirtd

import (
	"context"

	libvirt "github.com/digitalocean/go-libvirt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// Kind is what has happened to a device.
type Kind string

// Kinds of changes.
const (
	Added         Kind = "added"
	Removed       Kind = "removed"
	RemovalFailed Kind = "removal failed" // the guest said no
)

// Change is what has happened to a domain's device.
type Change struct {
	Kind   Kind
	Device string // its alias
}

// Watch is a bounded queue of the changes of a domain's devices since it was
// made: the oldest are lost when nobody takes them.
type Watch struct {
	s       *Session
	domain  libvirt.UUID
	changes chan Change
}

// Watch begins to watch the domain's devices. The caller calls Close. With
// limits.QMPSubscribers watches the error is qmp.ErrTooMany.
func (s *Session) Watch(ctx context.Context, d Domain) (*Watch, error) {
	if err := s.subscribe(ctx); err != nil {
		return nil, err
	}
	w := &Watch{s: s, domain: d.handle.UUID, changes: make(chan Change, limits.QMPEventQueue)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.watches) >= limits.QMPSubscribers {
		return nil, qmp.ErrTooMany
	}
	s.watches[w] = struct{}{}
	return w, nil
}

// deviceEvents are what a session asks libvirt for.
var deviceEvents = []libvirt.DomainEventID{libvirt.DomainEventIDDeviceAdded, libvirt.DomainEventIDDeviceRemoved, libvirt.DomainEventIDDeviceRemovalFailed}

// subscribe asks once for the events of all domains. go-libvirt stands still
// for good when an event comes while its stream is being given up, so streams
// stay until the connection ends.
func (s *Session) subscribe(ctx context.Context) error {
	select {
	case s.subscribing <- struct{}{}:
		defer func() { <-s.subscribing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for s.subscribed < len(deviceEvents) {
		id := deviceEvents[s.subscribed]
		events, err := call(ctx, s, "watch devices", func() (<-chan any, error) {
			return s.l.SubscribeEvents(context.Background(), id, nil)
		})
		if err != nil {
			return err
		}
		s.subscribed++
		s.own(func() { s.feed(events) })
	}
	return nil
}

// feed takes all events of a stream until it is closed: go-libvirt keeps what
// is not taken, without bound.
func (s *Session) feed(events <-chan any) {
	for e := range events {
		var c Change
		var of libvirt.Domain
		switch e := e.(type) {
		case *libvirt.DomainEventCallbackDeviceAddedMsg:
			of, c = e.Dom, Change{Added, e.DevAlias}
		case *libvirt.DomainEventCallbackDeviceRemovedMsg:
			of, c = e.Msg.Dom, Change{Removed, e.Msg.DevAlias}
		case *libvirt.DomainEventCallbackDeviceRemovalFailedMsg:
			of, c = e.Dom, Change{RemovalFailed, e.DevAlias}
		}
		if c.Kind == "" || len(c.Device) > limits.QMPName {
			continue
		}
		s.mu.Lock()
		for w := range s.watches {
			if w.domain == of.UUID {
				put(w.changes, c)
			}
		}
		s.mu.Unlock()
	}
}

// put loses the oldest in a full queue.
func put[T any](queue chan T, v T) {
	for {
		select {
		case queue <- v:
			return
		default:
		}
		select {
		case <-queue:
		default:
		}
	}
}

// Next waits for a change, until ctx is done or the session ends.
func (w *Watch) Next(ctx context.Context) (Change, error) {
	select {
	case c := <-w.changes:
		return c, nil
	default:
	}
	select {
	case c := <-w.changes:
		return c, nil
	case <-ctx.Done():
		return Change{}, ctx.Err()
	case <-w.s.conn.done:
		return Change{}, qmp.ErrLost
	}
}

// Close ends the watch. A Next that waits is not woken.
func (w *Watch) Close() {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	delete(w.s.watches, w)
}

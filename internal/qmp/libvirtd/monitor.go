package libvirtd

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	libvirt "github.com/digitalocean/go-libvirt"
	upstream "github.com/digitalocean/go-qemu/qmp"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

var (
	_ upstream.Monitor = (*Monitor)(nil)
	_ qmp.Executor     = (*Monitor)(nil)
)

// Monitor is the monitor of a domain's QEMU by way of libvirt. libvirt marks
// the domain as tainted and does not see what a command changes: it is for
// questions, and for what libvirt has no call for.
type Monitor struct {
	s *Session
	d Domain
}

// Monitor belongs to the session.
func (s *Session) Monitor(d Domain) *Monitor { return &Monitor{s: s, d: d} }

// Connect does nothing: the session is connected.
func (m *Monitor) Connect() error { return nil }

// Disconnect does nothing: the session is closed by its owner.
func (m *Monitor) Disconnect() error { return nil }

// Execute is as that of qmp.Monitor, but when ctx is done the session is
// closed, and files are refused: go-libvirt cannot pass them.
func (m *Monitor) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	if len(files) > 0 {
		return nil, fmt.Errorf("%s: %w: no descriptors go through libvirt", command, qmp.ErrInvalid)
	}
	line, err := qmp.EncodeCommand(command, arguments)
	if err != nil {
		return nil, err
	}
	reply, err := call(ctx, m.s, command, func() (string, error) {
		return m.s.l.QEMUDomainMonitorCommand(m.d.handle, string(line), 0)
	})
	if err != nil {
		return nil, err
	}
	return qmp.DecodeReply(command, []byte(reply))
}

// Run is as that of qmp.Monitor.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	return qmp.RunWith(context.Background(), m, command)
}

// stream is the events of one domain's QEMU, which libvirt sends once per
// connection. It lasts as long as the connection, as Session.subscribe says.
type stream struct {
	readers map[chan upstream.Event]struct{} // guarded by Session.mu
}

// Events streams QEMU's events until ctx is done or the session ends; then the
// channel is closed. A slow reader loses the oldest. With
// limits.QMPSubscribers open the error is qmp.ErrTooMany.
func (m *Monitor) Events(ctx context.Context) (<-chan upstream.Event, error) {
	st, err := m.stream(ctx)
	if err != nil {
		return nil, err
	}
	out := make(chan upstream.Event, limits.QMPEventQueue)
	m.s.mu.Lock()
	if len(st.readers) >= limits.QMPSubscribers {
		m.s.mu.Unlock()
		return nil, qmp.ErrTooMany
	}
	st.readers[out] = struct{}{}
	m.s.mu.Unlock()
	m.s.own(func() {
		select {
		case <-ctx.Done():
		case <-m.s.conn.done:
		}
		m.s.mu.Lock()
		defer m.s.mu.Unlock()
		delete(st.readers, out)
		close(out)
	})
	return out, nil
}

// stream asks libvirt for the domain's events, once.
func (m *Monitor) stream(ctx context.Context) (*stream, error) {
	select {
	case m.s.subscribing <- struct{}{}:
		defer func() { <-m.s.subscribing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if st := m.s.streams[m.d.UUID]; st != nil {
		return st, nil
	}
	in, err := call(ctx, m.s, "watch events", func() (<-chan libvirt.DomainEvent, error) {
		return m.s.l.SubscribeQEMUEvents(context.Background(), m.d.Name)
	})
	if err != nil {
		return nil, err
	}
	st := &stream{readers: map[chan upstream.Event]struct{}{}}
	m.s.streams[m.d.UUID] = st
	m.s.own(func() { m.s.spread(in, st) })
	return st, nil
}

// spread takes all events of a domain until the connection ends.
func (s *Session) spread(in <-chan libvirt.DomainEvent, st *stream) {
	for e := range in {
		if len(e.Event) > limits.QMPName || len(e.Details) > limits.QMPEvent {
			continue
		}
		u := upstream.Event{Event: e.Event}
		if len(e.Details) > 0 && json.Unmarshal(e.Details, &u.Data) != nil {
			continue // data that is no object is no event
		}
		u.Timestamp.Seconds, u.Timestamp.Microseconds = int64(e.Seconds), int64(e.Microseconds)
		s.mu.Lock()
		for out := range st.readers {
			put(out, u)
		}
		s.mu.Unlock()
	}
}

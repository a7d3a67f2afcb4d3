package qmp

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	upstream "github.com/digitalocean/go-qemu/qmp"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var _ upstream.Monitor = (*Monitor)(nil)

// Monitor is one connection to a QEMU's monitor. It is connected once. Safe
// for concurrent use; commands are sent in the order of the calls and may be
// in flight together.
type Monitor struct {
	path    string
	done    chan struct{} // closed when the connection has ended
	reader  sync.WaitGroup
	writing chan struct{} // holds a token while a command is written

	mu      sync.Mutex
	conn    *net.UnixConn              // guarded by mu; nil before Connect
	version Version                    // guarded by mu
	pending map[string]*call           // guarded by mu, by id
	lastID  uint64                     // guarded by mu
	foreign int                        // guarded by mu; how many replies may still be to the client before
	subs    map[*Subscription]struct{} // guarded by mu
	err     error                      // guarded by mu; why done is closed
	schema  *Schema                    // guarded by mu; answer of query-qmp-schema
}

// call is a command without a reply. Nobody may be waiting for it.
type call struct {
	asks  bool
	reply chan message // has room for the one reply
}

// New returns a monitor that Connect connects to the socket at path. Subscribe
// before Connect sees every event.
func New(path string) *Monitor {
	return &Monitor{
		path:    path,
		done:    make(chan struct{}),
		writing: make(chan struct{}, 1),
		pending: map[string]*call{},
		lastID:  rand.Uint64N(1 << 40), // not the numbers of an earlier client
		foreign: limits.QMPForeign,
		subs:    map[*Subscription]struct{}{},
	}
}

// Dial connects to the monitor at path, up to the greeting and the
// negotiation, within limits.QMPDial and ctx. A monitor that is in use by
// somebody else is ErrNoGreeting. The caller calls Close.
func Dial(ctx context.Context, path string) (*Monitor, error) {
	m := New(path)
	if err := m.ConnectContext(ctx); err != nil {
		return nil, err
	}
	return m, nil
}

// Connect is ConnectContext without an earlier deadline, for go-qemu.
func (m *Monitor) Connect() error { return m.ConnectContext(context.Background()) }

// ConnectContext connects a new monitor; for a connected one it does
// nothing. After an error or Close the monitor stays closed.
func (m *Monitor) ConnectContext(ctx context.Context) error {
	m.mu.Lock()
	connected, ended := m.conn != nil, m.err
	m.mu.Unlock()
	if connected || ended != nil {
		return ended
	}
	ctx, cancel := context.WithTimeout(ctx, limits.QMPDial)
	defer cancel()
	conn, err := DialSocket(ctx, m.path)
	if err == nil {
		err = m.start(ctx, conn)
	}
	if err != nil {
		m.fail(err)
		return fmt.Errorf("monitor %q: %w", m.path, err)
	}
	return nil
}

// start owns conn from the call on.
func (m *Monitor) start(ctx context.Context, conn *net.UnixConn) error {
	m.mu.Lock()
	if m.conn != nil || m.err != nil {
		err := m.err
		m.mu.Unlock()
		conn.Close()
		return err
	}
	m.conn = conn
	m.reader.Add(1)
	m.mu.Unlock()

	lines := newLineReader(conn, limits.QMPGreeting)
	if err := m.greet(ctx, conn, lines); err != nil {
		m.reader.Done()
		return err
	}
	lines.max, lines.arm, lines.rest = limits.QMPLine, conn.SetReadDeadline, limits.QMPRest
	go m.readLoop(lines)
	_, err := m.Execute(ctx, "qmp_capabilities", nil)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.foreign = 0
	return err
}

// greet reads up to the greeting; events may come before it.
func (m *Monitor) greet(ctx context.Context, conn *net.UnixConn, lines *lineReader) error {
	defer until(ctx, conn.SetReadDeadline)()
	for range limits.QMPEventQueue {
		line, err := lines.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%w: %w", ErrNoGreeting, because(ctx, err))
		}
		if err != nil {
			return lost(err)
		}
		msg, err := parseMessage(line)
		switch {
		case err != nil:
			return err
		case msg.Event != "":
			m.publish(msg.event())
		case msg.Greeting != nil:
			m.mu.Lock()
			m.version = msg.Greeting.Version.QEMU
			m.mu.Unlock()
			return nil
		default:
			return fmt.Errorf("%w: a reply before the greeting", ErrProtocol)
		}
	}
	return fmt.Errorf("%w: no greeting among %d events", ErrProtocol, limits.QMPEventQueue)
}

// lost says what an error of the connection means.
func lost(err error) error {
	if errors.Is(err, ErrProtocol) {
		return err
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w: the rest of a line did not come", ErrProtocol)
	}
	if errors.Is(err, io.EOF) {
		return ErrLost
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}

// readLoop lives as long as the connection.
func (m *Monitor) readLoop(lines *lineReader) {
	defer m.reader.Done()
	for {
		line, err := lines.next()
		if err == nil {
			err = m.dispatch(line)
		} else {
			err = lost(err)
		}
		if err != nil {
			m.fail(err)
			return
		}
	}
}

// dispatch hands one message to those who wait for it.
func (m *Monitor) dispatch(line []byte) error {
	msg, err := parseMessage(line)
	if err != nil {
		return err
	}
	if msg.Greeting != nil {
		return fmt.Errorf("%w: a second greeting", ErrProtocol)
	}
	if msg.Event != "" {
		m.publish(msg.event())
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.pending[string(msg.ID)]
	switch {
	case ok:
		delete(m.pending, string(msg.ID))
		c.reply <- msg // which has room for it
		return nil
	case m.foreign > 0:
		m.foreign--
		return nil
	}
	return fmt.Errorf("%w: a reply to no command: %q", ErrProtocol, head(line))
}

func (m *Monitor) publish(e Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := range m.subs {
		s.put(e)
	}
}

// fail ends the connection for the reason; the first one stays.
func (m *Monitor) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = err
	if m.conn != nil {
		m.conn.Close()
	}
	close(m.done)
}

// Err is why the monitor is of no use any more, or nil.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Done is closed when the monitor is of no use any more.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Ended reports, within limits.QMPDial and ctx, whether the machine is no more: its
// side of the connection is closed, and nobody listens at its socket. One that is
// ending closes the two one after the other.
func (m *Monitor) Ended(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, limits.QMPDial)
	defer cancel()
	for {
		conn, err := DialSocket(ctx, m.path)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
			select {
			case <-m.done:
				return errors.Is(m.Err(), ErrLost)
			case <-ctx.Done():
				return false
			}
		case err != nil:
			return false
		}
		conn.Close()
		if !errors.Is(m.Err(), ErrLost) {
			return false
		}
		select {
		case <-time.After(limits.AttachPoll):
		case <-ctx.Done():
			return false
		}
	}
}

// Version is QEMU's, as its greeting says.
func (m *Monitor) Version() Version {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.version
}

// Close ends the connection and waits for the monitor's goroutine. Commands
// that wait fail with ErrClosed.
func (m *Monitor) Close() error {
	m.fail(ErrClosed)
	m.reader.Wait()
	return nil
}

// Disconnect is Close, for go-qemu.
func (m *Monitor) Disconnect() error { return m.Close() }

// Execute sends a command with its arguments, a value that encodes to a JSON
// object or nil, and returns what the reply holds. files go along as
// descriptors and stay the caller's. Without an earlier deadline in ctx the
// reply must come within limits.QMPQuery or QMPChange, as the command is.
//
// QEMU's refusal is *Error. ErrUnanswered says that the command may still be
// carried out; the monitor remains usable. ErrTooMany and ErrInvalid say that
// it was not sent.
func (m *Monitor) Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, m.patience(command))
	defer cancel()
	c, err := m.send(ctx, command, arguments, files)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	select {
	case msg := <-c.reply:
		return msg.Return, msg.refusal(command)
	case <-m.done:
	case <-ctx.Done():
	}
	select { // a reply that has come counts, whatever else did
	case msg := <-c.reply:
		return msg.Return, msg.refusal(command)
	default:
	}
	if err := m.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", command, ErrUnanswered, err)
	}
	return nil, fmt.Errorf("%s: %w: %w", command, ErrUnanswered, ctx.Err())
}

// asks tells commands that change nothing, which QEMU answers at once.
func asks(command string) bool {
	return strings.HasPrefix(command, "query-") || command == "qom-list" || command == "qom-get" || command == "qmp_capabilities"
}

// patience is how long QEMU may take for a command that is sent now. It answers
// in the order of the commands: a question waits for the changes before it, those
// that nobody waits for any more included.
func (m *Monitor) patience(command string) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !asks(command) {
		return limits.QMPChange
	}
	for _, c := range m.pending {
		if !c.asks {
			return limits.QMPChange
		}
	}
	return limits.QMPQuery
}

// send registers the command and writes it.
func (m *Monitor) send(ctx context.Context, command string, arguments any, files []*os.File) (*call, error) {
	select {
	case m.writing <- struct{}{}:
		defer func() { <-m.writing }()
	case <-m.done:
		return nil, m.Err()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	id, c, conn, err := m.register(command)
	if err != nil {
		return nil, err
	}
	b, err := encode(command, arguments, id)
	if err == nil {
		var sent bool
		sent, err = write(ctx, conn, b, files)
		if err != nil && sent {
			// Half a command makes nonsense of whatever follows.
			m.fail(fmt.Errorf("%w: a command was cut: %w", ErrLost, err))
			return nil, fmt.Errorf("%w: %w", ErrUnanswered, err)
		}
	}
	if err != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.pending, id)
		return nil, cmp.Or(m.err, err) // a connection that is closed cannot be written to
	}
	return c, nil
}

// register makes room for the reply.
func (m *Monitor) register(command string) (string, *call, *net.UnixConn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.err != nil:
		return "", nil, nil, m.err
	case m.conn == nil:
		return "", nil, nil, errors.New("monitor not connected")
	case len(m.pending) >= limits.QMPPending:
		return "", nil, nil, fmt.Errorf("%w: %d commands without a reply", ErrTooMany, len(m.pending))
	}
	m.lastID++
	id := strconv.FormatUint(m.lastID, 10)
	c := &call{asks: asks(command), reply: make(chan message, 1)}
	m.pending[id] = c
	return id, c, m.conn, nil
}

// encode is the line of a command; id is a JSON number or empty.
func encode(command string, arguments any, id string) ([]byte, error) {
	b, err := json.Marshal(struct {
		Execute   string          `json:"execute"`
		Arguments any             `json:"arguments,omitempty"`
		ID        json.RawMessage `json:"id,omitempty"`
	}{command, arguments, json.RawMessage(id)})
	if err != nil {
		return nil, fmt.Errorf("%w arguments: %w", ErrInvalid, err)
	}
	if len(b) >= limits.QMPCommand {
		return nil, fmt.Errorf("%w: a command of %d bytes, at most %d", ErrInvalid, len(b), limits.QMPCommand)
	}
	return append(b, '\n'), nil
}

// Run sends a command in go-qemu's form, with execute and arguments, and
// returns {"return": ...}. Every other member is refused with ErrInvalid.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	return RunWith(context.Background(), m, command)
}

// Executor runs commands: a Monitor, or libvirt on a domain's behalf.
type Executor interface {
	// Execute is as Monitor's.
	Execute(ctx context.Context, command string, arguments any, files ...*os.File) (json.RawMessage, error)
}

// RunWith is go-qemu's Run by x's Execute.
func RunWith(ctx context.Context, x Executor, command []byte) ([]byte, error) {
	var c struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
	}
	if err := strictly(command, &c); err != nil || c.Execute == "" {
		return nil, fmt.Errorf("%w command: %q", ErrInvalid, head(command))
	}
	var arguments any
	if len(c.Arguments) > 0 && string(c.Arguments) != "null" {
		arguments = c.Arguments
	}
	out, err := x.Execute(ctx, c.Execute, arguments)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]json.RawMessage{"return": out})
}

// Events streams events in go-qemu's form until ctx is done or the monitor
// ends; then the channel is closed. It holds back nobody: a slow reader loses
// the oldest events.
func (m *Monitor) Events(ctx context.Context) (<-chan upstream.Event, error) {
	s, err := m.Subscribe()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		delete(m.subs, s)
		return nil, m.err
	}
	out := make(chan upstream.Event)
	m.reader.Add(1)
	go m.eventLoop(ctx, s, out)
	return out, nil
}

// eventLoop lives until ctx is done or the monitor ends.
func (m *Monitor) eventLoop(ctx context.Context, s *Subscription, out chan<- upstream.Event) {
	defer m.reader.Done()
	defer close(out)
	defer s.Close()
	for {
		e, err := s.Next(ctx)
		if err != nil {
			return
		}
		u := upstream.Event{Event: e.Name}
		if len(e.Data) > 0 && json.Unmarshal(e.Data, &u.Data) != nil {
			continue // data that is no object is no event
		}
		u.Timestamp.Seconds = e.Time.Unix()
		u.Timestamp.Microseconds = int64(e.Time.Nanosecond() / 1000)
		select {
		case out <- u:
		case <-ctx.Done():
			return
		case <-m.done:
			return
		}
	}
}

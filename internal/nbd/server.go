// Package nbd is the server's side of the NBD protocol: negotiation, then
// transmission. A connection is one goroutine on Go's poller. It reads what
// is there, decodes every whole request of it, answers what the page cache
// holds, hands the rest to the engine as one batch and sends all replies that
// are ready with one system call. Section names in comments are those of the
// protocol document, proto.md.
package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/obs"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// ErrUnknownExport is what Exports answers for a name that does not exist or
// that the peer may not see: the two cannot be told apart.
var ErrUnknownExport = errors.New("no such export")

// ExportInfo is what a peer may know of an export before it is opened.
type ExportInfo struct {
	Name        string // canonical
	Description string
	NeedTLS     bool // SELECTIVETLS: not listed, nor opened, without TLS

	// Contexts are the metadata contexts beyond base:allocation, which the
	// device describes.
	Contexts []string
}

// Export is an open export, seen by one connection.
type Export struct {
	ExportInfo
	Device *backing.Checked

	// Gone ends when the connection shall finish what is in flight and leave;
	// nil is never.
	Gone context.Context

	// Cut ends when what is in flight is not waited for any more, after Gone:
	// it is answered with ESHUTDOWN; nil is never.
	Cut context.Context

	// Still tells whether the peer may do what it could when the export was
	// opened; nil is always. It is asked once, when the negotiation is over: a
	// client may take long to read its last reply.
	Still func() bool

	// Stats counts its requests, over all of its connections; nil for none.
	Stats *obs.ExportStats

	// Flush is called when a connection that has come to its requests has
	// answered the last of them, before Close; nil for nothing to do.
	Flush func()

	// Close ends the use, also one that has asked for nothing but information.
	Close func()
}

// Exports decides what a peer may see and open.
type Exports interface {
	// List names what the peer may see.
	List(p *transport.Peer) []ExportInfo

	// Find resolves a name, "" being the default export, or fails with
	// ErrUnknownExport. The name may hold a secret: it is for nobody else, and
	// that of the ExportInfo for the log.
	Find(name string, p *transport.Peer) (ExportInfo, error)

	// Open opens what Find found.
	Open(ctx context.Context, name string, p *transport.Peer) (*Export, error)

	// Inspect is Open for a peer that asks for information alone: it is no client,
	// and takes nobody's place.
	Inspect(ctx context.Context, name string, p *transport.Peer) (*Export, error)
}

// TLSMode says when a connection must be encrypted (proto.md, "TLS support").
type TLSMode uint8

const (
	TLSOff     TLSMode = iota // NOTLS
	TLSOn                     // SELECTIVETLS: as each export wants it
	TLSRequire                // FORCEDTLS
)

// Options of a Server. The degrade switches make old clients' fallbacks
// testable.
type Options struct {
	Exports Exports
	Engine  engine.Engine
	Buffers *bufpool.Pool
	Log     *slog.Logger

	TLS TLSMode

	// Encrypt shakes hands with a client that has asked for TLS, as
	// transport.ServerTLS does.
	Encrypt func(transport.Conn) (transport.Conn, error)

	Oldstyle      bool   // speak the oldstyle handshake
	MaskHandshake uint16 // handshake flags that may be offered
	NoStructured  bool   // refuse structured replies and extended headers
	NoMeta        bool   // refuse metadata contexts

	// Requests bounds what one connection may have in flight; 0 is
	// limits.RequestsPerConn.
	Requests int

	// Bytes bounds the data of what one connection has in flight; 0 is
	// limits.BytesPerConn. One request may exceed it.
	Bytes int64

	// Keep is how many requests, of all connections, are made before the
	// first comes, with room for them in each connection: up to so many in
	// flight take nothing of the heap.
	Keep int

	// Poll is how long a connection looks at its empty socket before it
	// sleeps, where that pays; 0 turns polling off.
	Poll time.Duration

	// Handshake and Stall replace limits.Handshake and limits.Stall when
	// they are not zero.
	Handshake time.Duration
	Stall     time.Duration

	// Events is told who comes and leaves, and what goes wrong; nil for
	// nobody.
	Events *obs.Bus

	// Slow is how long a request may take before it is reported; 0 turns that
	// off. Server.SetSlow changes it.
	Slow time.Duration
}

// Server speaks NBD on the connections that Serve is given.
type Server struct {
	opt   Options
	admt  *admission
	kept  chan *request // that nobody uses; nil without Options.Keep
	wakes atomic.Uint32 // of all sessions
	slow  atomic.Int64  // Options.Slow at present
	ids   atomic.Uint64 // of sessions, the last one given

	mu       sync.Mutex
	conns    map[*connection]struct{} // guarded by mu
	draining bool                     // guarded by mu
	idle     chan struct{}            // guarded by mu; closed when draining and conns is empty

	quit     chan struct{} // closed when draining begins
	stop     chan struct{} // closed when the watch shall end
	watching sync.WaitGroup
}

// connection is what the server knows of one Serve.
type connection struct {
	conn    transport.Conn
	session *session // nil during negotiation; guarded by Server.mu
}

// NewServer starts the watch over stalled peers; Shutdown ends it.
func NewServer(o Options) *Server {
	if o.Handshake == 0 {
		o.Handshake = limits.Handshake
	}
	if o.Requests == 0 {
		o.Requests = limits.RequestsPerConn
	}
	if o.Bytes == 0 {
		o.Bytes = limits.BytesPerConn
	}
	if o.Stall == 0 {
		o.Stall = limits.Stall
	}
	s := &Server{
		opt:   o,
		admt:  newAdmission(),
		conns: make(map[*connection]struct{}),
		quit:  make(chan struct{}),
		stop:  make(chan struct{}),
	}
	if o.Keep > 0 {
		s.kept = make(chan *request, o.Keep)
		for range o.Keep {
			s.kept <- makeRequest()
		}
	}
	s.SetSlow(o.Slow)
	s.watching.Add(1)
	go s.watchLoop()
	return s
}

// Serve speaks NBD on c until the peer leaves, misbehaves or the server shuts
// down, and closes c. The error says why a connection ended that did not end
// well; it is for the log.
func (s *Server) Serve(ctx context.Context, c transport.Conn) error {
	return s.ServeTLS(ctx, c, s.opt.TLS)
}

// ServeTLS is Serve in another TLS mode than that of the options.
func (s *Server) ServeTLS(ctx context.Context, c transport.Conn, mode TLSMode) error {
	defer c.Close()
	slot, err := s.admt.enter(c.Peer().Key(), c.Peer().Guest(), func() { c.Close() })
	if err != nil {
		s.logRefused(c.Peer(), err)
		return err
	}
	defer slot.leave()

	over := time.NewTimer(s.opt.Handshake)
	defer over.Stop()
	if err := c.SetDeadline(time.Now().Add(s.opt.Handshake)); err != nil {
		return err
	}
	k := &connection{conn: c}
	if !s.register(k) { // from here on a shutdown moves the deadline
		return errDraining
	}
	defer s.unregister(k)
	if err := slot.handshake(over.C, s.quit); err != nil {
		return err
	}
	n := newNegotiation(s, c, slot, mode)
	err = n.run(ctx)
	if err == nil && n.export != nil {
		slot.established()
	}
	if slot.madeRoom() {
		err = errMadeRoom
	}
	if err != nil || n.export == nil {
		n.close(err == nil)
		return err
	}
	return s.transmit(ctx, k, n)
}

// transmit runs the session that was negotiated.
func (s *Server) transmit(ctx context.Context, k *connection, n *negotiation) error {
	orderly := false
	defer func() { part(n.conn, orderly) }()
	defer n.export.Close()
	if err := n.conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	sess := newSession(s, n)
	defer sess.cancel()
	if gone := n.export.Gone; gone != nil {
		defer context.AfterFunc(gone, sess.drain)()
	}
	if cut := n.export.Cut; cut != nil {
		defer context.AfterFunc(cut, func() { sess.abandon() })()
	}
	s.mu.Lock()
	k.session = sess
	if s.draining {
		sess.drain()
	}
	s.mu.Unlock()
	// The session is in Clients by now: who takes rights away from here on and
	// then disconnects those that have them finds it there.
	if still := n.export.Still; still != nil && !still() {
		return errRevoked
	}
	left := sess.announce()
	orderly, err := sess.serve(ctx)
	if flush := n.export.Flush; flush != nil {
		flush()
	}
	left(err)
	return err
}

// part closes a connection. At an orderly end it shuts only its own side
// first and waits a moment for the peer to shut the other: a connection closed
// on bytes that nobody will read is reset, and what the peer has not taken yet
// is lost; a vsock closed before the peer shuts its side down answers the
// peer's next read with ENOTCONN, not with the end of the stream. A Unix peer
// can be kept from sending more instead of being waited for.
func part(c transport.Conn, orderly bool) {
	defer c.Close()
	if !orderly {
		return
	}
	if rc := c.Raw(); rc != nil && c.Peer().Kind == transport.Unix {
		rc.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	} else {
		c.CloseWrite()
	}
	c.SetReadDeadline(time.Now().Add(limits.Linger))
	io.Copy(io.Discard, io.LimitReader(c, limits.MaxIO))
}

var (
	errDraining = errors.New("server is shutting down")
	errRevoked  = errors.New("rights were taken away during negotiation")
)

func (s *Server) register(k *connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.conns[k] = struct{}{}
	return true
}

func (s *Server) unregister(k *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, k)
	if s.draining && len(s.conns) == 0 {
		close(s.idle)
	}
}

// How a shutdown may end. After ErrUntaken all requests were finished, but some
// clients had not taken their replies; after ErrUnanswered some were not, and a
// Serve may still wait for its storage.
var (
	ErrUntaken    = errors.New("clients did not take their replies")
	ErrUnanswered = errors.New("requests were given up")
)

// Shutdown stops reading requests, lets those in flight finish until ctx
// ends, then answers the rest with ESHUTDOWN, and tells how that ended.
func (s *Server) Shutdown(ctx context.Context) error {
	idle := s.startDrain()
	var err error
	select {
	case <-idle:
	case <-ctx.Done():
		err = s.abandon(idle)
	}
	close(s.stop)
	s.watching.Wait()
	return err
}

// abandon is the forced end of a shutdown.
func (s *Server) abandon(idle <-chan struct{}) error {
	late := 0
	s.each(func(x *session) { late += x.abandon() }, transport.Conn.Close)
	select {
	case <-idle:
		if late == 0 {
			return ErrUntaken
		}
	case <-time.After(limits.Sever):
	}
	return ErrUnanswered
}

// startDrain tells all connections. One that negotiates has limits.Linger for
// further options, which are refused; its replies have the time of a handshake.
func (s *Server) startDrain() <-chan struct{} {
	s.mu.Lock()
	s.draining = true
	close(s.quit)
	s.idle = make(chan struct{})
	if len(s.conns) == 0 {
		close(s.idle)
	}
	s.mu.Unlock()
	s.each((*session).drain, func(c transport.Conn) error {
		return c.SetReadDeadline(time.Now().Add(limits.Linger))
	})
	return s.idle
}

// each calls inSession for every connection in transmission and before for
// those that still negotiate.
func (s *Server) each(inSession func(*session), before func(transport.Conn) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.conns {
		if k.session != nil {
			inSession(k.session)
		} else {
			before(k.conn)
		}
	}
}

// watchTicks is how many looks without progress make a stall.
const watchTicks = 8

// watchLoop drops peers that leave a reply unread or a payload half sent. It
// counts its own ticks: a process that was stopped or a host that slept does
// not age its connections.
func (s *Server) watchLoop() {
	defer s.watching.Done()
	tick := max(s.opt.Stall/watchTicks, time.Millisecond)
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			short := s.opt.Buffers.Waiting() >= tick
			s.each(func(k *session) { k.watch(short) }, func(transport.Conn) error { return nil })
		}
	}
}

package nbd

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/sysio"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

var errGone = errors.New("peer is gone, with requests in flight")

// lookout ends a session whose peer is gone while nobody reads what it sends. A
// client that takes its place has its own writes acknowledged: no request that
// was only waiting may change the disk after that.
//
// A peer that has shut down its sending side alone still reads its replies. TCP
// tells the two apart once something is sent to a peer that is gone.
type lookout struct {
	s   *session
	raw syscall.RawConn // nil where nobody can tell

	mu    sync.Mutex
	on    bool        // guarded by mu
	over  bool        // guarded by mu
	timer *time.Timer // calls look; set from start to stop
}

// rarely is when look is called while nobody looks out: the timer stays set, since
// setting one that is not may take memory.
const rarely = time.Hour

func (l *lookout) init(s *session, c transport.Conn) {
	l.s, l.raw = s, socketOf(c)
	l.timer = time.AfterFunc(rarely, l.look)
	l.timer.Stop()
}

// socketOf is the socket under c, or nil.
func socketOf(c transport.Conn) syscall.RawConn {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok { // inside TLS
		if under, ok := t.NetConn().(transport.Conn); ok {
			return under.Raw()
		}
	}
	return c.Raw()
}

// start comes before the first begin, and stop after the last end.
func (l *lookout) start() { l.end() }

func (l *lookout) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	l.timer.Stop()
}

// begin looks every limits.Lookout from now on, until end.
func (l *lookout) begin() { l.set(l.raw != nil) }

func (l *lookout) end() { l.set(false) }

func (l *lookout) set(on bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.on = on
	l.againLocked()
}

func (l *lookout) againLocked() {
	switch {
	case l.over:
	case l.on:
		l.timer.Reset(limits.Lookout)
	default:
		l.timer.Reset(rarely)
	}
}

// look looks once.
func (l *lookout) look() {
	l.mu.Lock()
	gone := l.on && l.gone()
	l.againLocked()
	l.mu.Unlock()
	if gone {
		l.s.fail(errGone)
	}
}

// gone tells whether a reply could not be sent any more: sockets look at that before
// they look how long it is.
func (l *lookout) gone() (gone bool) {
	if l.raw == nil {
		return false
	}
	l.raw.Control(func(fd uintptr) {
		_, e := sysio.TrySend(fd, nil, false)
		gone = e != 0 && e != syscall.EAGAIN && e != syscall.EINTR
	})
	return gone
}

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"golang.org/x/sys/unix"
)

// connKey finds the connection in a request's context.
type connKey struct{}

// connTable counts connections.
type connTable struct {
	mu    sync.Mutex
	byUID map[uint32]int // guarded by mu
	total int            // guarded by mu
}

// enter reports whether there is room for one more connection of uid. Peers
// that may change things are not held up by those that only read.
func (t *connTable) enter(uid uint32, perUID, total int, a Access) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byUID[uid] >= perUID || a != Change && t.total >= total {
		return false
	}
	if t.byUID == nil {
		t.byUID = map[uint32]int{}
	}
	t.byUID[uid]++
	t.total++
	return true
}

func (t *connTable) leave(uid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total--
	if t.byUID[uid]--; t.byUID[uid] == 0 {
		delete(t.byUID, uid)
	}
}

// listener accepts those that are allowed in. The others are closed unread, those
// for whom there is no room with a reply that says so.
type listener struct {
	net.Listener
	s *Server
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		in, err := l.s.admit(c)
		if err == nil {
			return in, nil
		}
		if full, ok := errors.AsType[*fullError](err); ok {
			full.reply(c)
		}
		_ = c.Close()
		l.s.log.Debug("control connection refused", "reason", err)
	}
}

// fullError is that there is no room for a connection of a peer that may make one.
type fullError struct{ text string }

func (e *fullError) Error() string { return e.text }

// reply answers a request that is not read. Nothing was sent on c yet, so that there
// is room for it: the kernel takes it whole and at once, or it is not sent. No clock
// bounds that, by which a busy host would cut it.
func (e *fullError) reply(c net.Conn) {
	raw, err := e.http()
	sc, ok := c.(syscall.Conn)
	if err != nil || !ok {
		return
	}
	if rc, err := sc.SyscallConn(); err == nil {
		_ = rc.Write(func(fd uintptr) bool {
			_, _ = unix.Write(int(fd), raw) // it may have left
			return true
		})
	}
}

// http is the reply as it is sent.
func (e *fullError) http() ([]byte, error) {
	b, err := json.Marshal(api.Error{Code: api.CodeInUse, Text: e.text})
	if err != nil {
		return nil, err
	}
	r := http.Response{
		StatusCode: http.StatusServiceUnavailable, ProtoMajor: 1, ProtoMinor: 1, Close: true,
		Header: http.Header{"Content-Type": {"application/json"}, "Retry-After": {"1"}}, // in seconds
		Body:   io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b)),
	}
	var out bytes.Buffer
	err = r.Write(&out)
	return out.Bytes(), err
}

// admit decides about a connection of which nothing was read yet.
func (s *Server) admit(c net.Conn) (*conn, error) {
	if s.authorize == nil {
		if !s.conns.enter(0, limits.MetricsConns, limits.MetricsConns, Read) {
			return nil, &fullError{"too many connections"}
		}
		return &conn{Conn: c, access: Read, leave: func() { s.conns.leave(0) }}, nil
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T has no credentials", c)
	}
	p, err := peerOf(u)
	if err != nil {
		return nil, err
	}
	a := s.accessOf(p)
	if a != Read && a != Change {
		return nil, fmt.Errorf("user %d may not use it", p.UID)
	}
	if !s.conns.enter(p.UID, limits.ControlConnsPerUID, limits.ControlConns, a) {
		return nil, &fullError{fmt.Sprintf("too many connections of user %d, or of those who may not change things", p.UID)}
	}
	return &conn{Conn: c, unix: u, peer: p, access: a, leave: func() { s.conns.leave(p.UID) }}, nil
}

// accessOf is what p may do now.
func (s *Server) accessOf(p Peer) Access {
	if p.UID == transport.OverflowID {
		return NoAccess
	}
	return s.authorize(p)
}

// conn is a connection with the descriptors that came with its first byte.
type conn struct {
	net.Conn
	unix   *net.UnixConn // nil: no descriptors can come
	peer   Peer
	access Access
	leave  func()

	begun bool // the first byte is read; the reader's own

	mu       sync.Mutex
	files    []*os.File // guarded by mu
	filesErr error      // guarded by mu; why what came was closed
	closed   bool       // guarded by mu
}

var (
	errMisplaced = errors.New("descriptors must come with the first byte of a request")
	errTooMany   = fmt.Errorf("more than %d descriptors", limits.ControlFiles)
	errNoRight   = errors.New("descriptors are taken from peers only that may change things")
)

// Read gives the first byte alone: so the kernel adds only the descriptors that
// were sent with it, and those that come later are told from them. Without
// room for ancillary data the kernel drops these by itself, and says so.
func (c *conn) Read(p []byte) (int, error) {
	if c.unix == nil || len(p) == 0 {
		return c.Conn.Read(p)
	}
	if !c.begun {
		n, err := c.readFirst(p[:1])
		c.begun = n > 0
		return n, err
	}
	n, _, flags, _, err := c.unix.ReadMsgUnix(p, nil)
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, errMisplaced
	}
	return max(n, 0), err // an error comes with -1
}

func (c *conn) readFirst(p []byte) (int, error) {
	var oob []byte
	if c.access == Change {
		oob = make([]byte, unix.CmsgSpace(4*limits.ControlFiles))
	}
	n, oobn, flags, _, err := c.unix.ReadMsgUnix(p, oob)
	files := filesOf(oob[:max(oobn, 0)])
	switch {
	case flags&unix.MSG_CTRUNC != 0 && oob == nil:
		c.refuse(errNoRight)
	case flags&unix.MSG_CTRUNC != 0:
		closeAll(files)
		c.refuse(errTooMany)
	default:
		c.keep(files)
	}
	return max(n, 0), err
}

func (c *conn) refuse(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.filesErr = err
}

func (c *conn) keep(files []*os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		closeAll(files)
		return
	}
	c.files = files
}

// take hands the descriptors to the caller, or says why they were refused.
func (c *conn) take() ([]*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	files := c.files
	c.files = nil
	return files, c.filesErr
}

// Close closes the descriptors too that nobody took.
func (c *conn) Close() error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	files := c.files
	c.files = nil
	c.mu.Unlock()
	closeAll(files)
	err := c.Conn.Close()
	if first {
		c.leave()
	}
	return err
}

// filesOf are the descriptors in ancillary data, which Go asks the kernel to
// mark close-on-exec.
func filesOf(oob []byte) []*os.File {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("descriptor %d", len(files))))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// auditAttrs are what the log says of a peer.
func (c *conn) auditAttrs() slog.Attr {
	return slog.Group("peer", "uid", c.peer.UID, "gid", c.peer.GID, "pid", c.peer.PID)
}

// connOf is the connection of a request's context.
func connOf(ctx context.Context) *conn { return ctx.Value(connKey{}).(*conn) }

package nbd

import (
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/sysio"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// link moves the bytes of one connection. recv is for the connection's
// goroutine, the send methods for whoever owns the sender.
type link interface {
	// recv reads what is there into into(), which it calls anew after every
	// wait; before it waits it calls idle. It returns io.EOF at the end.
	recv(into func() []byte, idle func() error) (int, error)

	// trySend sends what fits without waiting. A link that cannot tell
	// returns 0, and the caller leaves the bytes to send.
	trySend(p []byte, more bool) (int, error)

	// trySendAll is trySend for several pieces; it may leave some of them out.
	trySendAll(bufs [][]byte) (int, error)

	// send sends all of bufs, waiting as long as the deadline of the connection
	// lets it, and returns how much that was. Only a link whose zeroCopy is
	// true can go on after a deadline.
	send(bufs [][]byte) (int, error)

	// sendFile is send for [off, off+n) of a file; tryFile sends what fits
	// without waiting for the peer. Both return how much that was, and fail
	// with errShortFile when the file ends early. They are for links whose
	// zeroCopy is true.
	zeroCopy() bool
	sendFile(f *engine.File, off int64, n int) (int, error)
	tryFile(f *engine.File, off int64, n int) (int, error)
}

// errShortFile: a file shrank under a reply whose header is out.
var errShortFile = errors.New("image ends early")

// newLink makes the link of a connection that sends vector pieces at a time
// without asking for memory.
func newLink(c transport.Conn, p *poller, vector int) link {
	if rc := c.Raw(); rc != nil {
		l := newSocketLink(rc, c.Peer().Kind != transport.VSock, p)
		l.vec.Grow(vector)
		return l
	}
	return &streamLink{conn: c}
}

// socketLink makes its own non-blocking calls on a socket that waits on Go's
// poller. The functions that the poller runs are made once; what they work
// on is passed in fields, so that a call allocates nothing.
type socketLink struct {
	rc     syscall.RawConn
	copies bool // sendfile would copy: leave it alone
	poll   *poller

	// recv in progress
	into   func() []byte
	idle   func() error
	rn     int
	rerr   error
	recvFn func(uintptr) bool

	// send in progress
	out    []byte
	more   bool
	file   *engine.File
	off    int64
	want   int
	sn     int
	serr   error
	vec    sysio.Vector
	sendFn func(uintptr)
	vecFn  func(uintptr) bool
	// vecTryFn is vecFn without the wait.
	vecTryFn func(uintptr)
	tryFn    func(uintptr)
	fileFn   func(uintptr) bool
}

func newSocketLink(rc syscall.RawConn, zeroCopy bool, p *poller) *socketLink {
	l := &socketLink{rc: rc, copies: !zeroCopy, poll: p}
	l.recvFn, l.sendFn, l.vecFn = l.doRecv, l.doSend, l.doVector
	l.tryFn, l.fileFn, l.vecTryFn = l.doTryFile, l.doFile, l.doTryVector
	return l
}

func (l *socketLink) zeroCopy() bool { return !l.copies }

func (l *socketLink) recv(into func() []byte, idle func() error) (int, error) {
	l.into, l.idle, l.rerr = into, idle, nil
	if err := l.rc.Read(l.recvFn); err != nil {
		return 0, err
	}
	if l.rerr == nil && l.rn == 0 {
		return 0, io.EOF
	}
	return l.rn, l.rerr
}

// doRecv reports false when the poller shall wait for the peer.
func (l *socketLink) doRecv(fd uintptr) bool {
	e := l.tryRecv(fd)
	if e == syscall.EAGAIN {
		e = l.pollRecv(fd)
	} else {
		// What is there already came while the last turn lasted.
		l.poll.came, l.poll.mark = l.poll.mark, 0
	}
	switch e {
	case 0:
		if l.poll.since != 0 {
			l.poll.came = now()
			l.poll.wake(l.poll.came)
		}
		return true
	case syscall.EAGAIN:
		l.rerr = l.idle()
		l.poll.sleep(l.poll.marked())
		return l.rerr != nil
	}
	l.rerr = os.NewSyscallError("read", e)
	return true
}

func (l *socketLink) tryRecv(fd uintptr) (e syscall.Errno) {
	for {
		if l.rn, e = sysio.TryRecv(fd, l.into()); e != syscall.EINTR {
			return e
		}
	}
}

// pollRecv looks at the empty socket for as long as that pays.
func (l *socketLink) pollRecv(fd uintptr) syscall.Errno {
	if !l.poll.pays() {
		return syscall.EAGAIN
	}
	for l.poll.begin(l.poll.marked()); ; {
		if e := l.tryRecv(fd); e != syscall.EAGAIN {
			l.poll.came = l.poll.last
			l.poll.found()
			return e
		}
		sysio.TryYield()
		if !l.poll.again(now()) {
			return syscall.EAGAIN
		}
	}
}

func (l *socketLink) trySend(p []byte, more bool) (int, error) {
	l.out, l.more = p, more
	err := l.rc.Control(l.sendFn)
	l.out = nil
	if err != nil {
		return 0, err
	}
	return l.sn, l.serr
}

func (l *socketLink) doSend(fd uintptr) {
	l.sn, l.serr = 0, nil
	for l.sn < len(l.out) {
		n, e := sysio.TrySend(fd, l.out[l.sn:], l.more)
		switch e {
		case 0:
			l.sn += n
			continue
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
		default:
			l.serr = os.NewSyscallError("send", e)
		}
		return
	}
}

func (l *socketLink) trySendAll(bufs [][]byte) (int, error) {
	for _, b := range bufs[:min(len(bufs), sysio.MaxVector)] {
		l.vec.Add(b)
	}
	l.sn, l.serr = 0, nil
	err := l.rc.Control(l.vecTryFn)
	l.vec.Reset()
	if err != nil {
		return 0, err
	}
	return l.sn, l.serr
}

func (l *socketLink) doTryVector(fd uintptr) { l.doVector(fd) }

func (l *socketLink) send(bufs [][]byte) (n int, err error) {
	for len(bufs) > 0 {
		k := min(len(bufs), sysio.MaxVector)
		for _, b := range bufs[:k] {
			l.vec.Add(b)
		}
		bufs = bufs[k:]
		l.sn, l.serr = 0, nil
		err := l.rc.Write(l.vecFn)
		l.vec.Reset()
		n += l.sn
		if err == nil {
			err = l.serr
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (l *socketLink) doVector(fd uintptr) bool {
	for l.vec.Len() > 0 {
		n, e := sysio.TrySendv(fd, &l.vec)
		switch e {
		case 0:
			l.vec.Skip(n)
			l.sn += n
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			l.serr = os.NewSyscallError("sendmsg", e)
			return true
		}
	}
	return true
}

func (l *socketLink) setFile(f *engine.File, off int64, n int) {
	l.file, l.off, l.want, l.sn, l.serr = f, off, n, 0, nil
}

func (l *socketLink) tryFile(f *engine.File, off int64, n int) (int, error) {
	l.setFile(f, off, n)
	if err := l.rc.Control(l.tryFn); err != nil {
		return 0, err
	}
	return l.sn, l.serr
}

func (l *socketLink) sendFile(f *engine.File, off int64, n int) (int, error) {
	l.setFile(f, off, n)
	if err := l.rc.Write(l.fileFn); err != nil {
		return l.sn, err
	}
	return l.sn, l.serr
}

func (l *socketLink) doTryFile(fd uintptr) { l.doFile(fd) }

// doFile reports false when the socket is full.
func (l *socketLink) doFile(fd uintptr) bool {
	for l.sn < l.want {
		n, e := sysio.TrySendfile(fd, l.file.FD(), l.off+int64(l.sn), l.want-l.sn)
		switch {
		case e == syscall.EINTR:
		case e == syscall.EAGAIN:
			return false
		case e != 0:
			l.serr = os.NewSyscallError("sendfile", e)
			return true
		case n == 0:
			l.serr = errShortFile
			return true
		default:
			l.sn += n
		}
	}
	return true
}

// streamLink is TLS or a pair of pipes: it can only wait.
type streamLink struct {
	conn transport.Conn
	join []byte
}

// streamJoin is how much of a batch of replies is joined into one write: a
// TLS record holds 16 KiB.
const streamJoin = 64 << 10

func (l *streamLink) zeroCopy() bool { return false }

func (l *streamLink) recv(into func() []byte, idle func() error) (int, error) {
	if err := idle(); err != nil {
		return 0, err
	}
	n, err := l.conn.Read(into())
	if n > 0 {
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

func (l *streamLink) trySend([]byte, bool) (int, error) { return 0, nil }
func (l *streamLink) trySendAll([][]byte) (int, error)  { return 0, nil }

// send joins small pieces so that a header does not become a record, or a
// write, of its own.
func (l *streamLink) send(bufs [][]byte) (n int, err error) {
	l.join = l.join[:0]
	for _, b := range bufs {
		n += len(b)
		for len(b) > 0 {
			if len(l.join) == 0 && len(b) >= streamJoin {
				if _, err := l.conn.Write(b); err != nil {
					return 0, err
				}
				break
			}
			k := min(len(b), streamJoin-len(l.join))
			l.join = append(l.join, b[:k]...)
			b = b[k:]
			if len(l.join) == streamJoin {
				if err := l.writeJoined(); err != nil {
					return 0, err
				}
			}
		}
	}
	return n, l.writeJoined()
}

func (l *streamLink) writeJoined() error {
	if len(l.join) == 0 {
		return nil
	}
	_, err := l.conn.Write(l.join)
	l.join = l.join[:0]
	return err
}

func (l *streamLink) sendFile(*engine.File, int64, int) (int, error) { return 0, errors.ErrUnsupported }
func (l *streamLink) tryFile(*engine.File, int64, int) (int, error)  { return 0, errors.ErrUnsupported }

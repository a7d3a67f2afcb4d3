package nbd

import (
	"net"

	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// input is the incoming half of a connection: one buffer that is filled with
// as much as the peer has sent and emptied message by message.
type input struct {
	s     *session
	early []byte // came in behind the handshake, not yet in b

	buf  *bufpool.Buf // nil while the connection is idle
	b    []byte       // buf's bytes
	r, w int          // b[r:w] is received and not consumed

	// want bounds the next read. After a large payload it is small: the
	// next one is then received in its own buffer, not here.
	want int

	// The functions that link.recv is given, made once, and the payload that
	// rest fills.
	space, rest func() []byte
	idle, turn  func() error
	p           []byte
}

// smallRead is enough for a header, and a few of them.
const smallRead = 4 << 10

func (i *input) init(s *session, early []byte) {
	i.s, i.early, i.want = s, early, limits.TurnBuffer
	i.space, i.rest = i.free, func() []byte { return i.p }
	i.idle, i.turn = s.park, s.endTurn
}

func (i *input) empty() bool { return i.r == i.w }

func (i *input) skip(n int) { i.r += n }

func (i *input) release() {
	if i.buf != nil {
		i.buf.Release()
		i.buf, i.b, i.r, i.w = nil, nil, 0, 0
	}
}

// free is where the next bytes go.
func (i *input) free() []byte {
	i.hold()
	return i.b[i.w:min(len(i.b), i.w+i.want)]
}

// hold makes sure that there is a buffer, with room behind w, unless the session
// is given up. Nobody waits for the peer while it waits for memory.
func (i *input) hold() {
	if i.buf == nil {
		inside := i.s.receiving.waiting.Swap(false)
		b, err := i.s.buffer(limits.TurnBuffer)
		i.s.receiving.waiting.Store(inside)
		if err != nil {
			return
		}
		i.buf, i.b = b, b.Bytes()
		i.w = copy(i.b, i.early)
		i.early = nil
	}
}

// header and body return the next n bytes without consuming them; n is at
// most limits.TurnBuffer. A peer may take any time before it begins a header,
// but none inside a message. io.EOF says that the peer has left, in the middle of a
// message or between two.
func (i *input) header(n int) ([]byte, error) { return i.need(n, false) }

func (i *input) body(n int) ([]byte, error) { return i.need(n, true) }

func (i *input) need(n int, inside bool) ([]byte, error) {
	if len(i.early) > 0 {
		i.hold()
	}
	for i.w-i.r < n {
		if err := i.fill(n, inside); err != nil {
			return nil, err
		}
	}
	i.s.receiving.moved()
	return i.b[i.r : i.r+n], nil
}

// fill ends the turn and receives more, with the aim of n bytes in all.
func (i *input) fill(n int, inside bool) error {
	if err := i.s.endTurn(); err != nil {
		return err
	}
	switch {
	case i.empty():
		i.r, i.w = 0, 0
	case i.r+n > len(i.b) || i.w+smallRead > len(i.b):
		i.w = copy(i.b, i.b[i.r:i.w])
		i.r = 0
	}
	i.s.receiving.waiting.Store(inside || !i.empty())
	k, err := i.s.sender.link.recv(i.space, i.idle)
	i.s.receiving.waiting.Store(false)
	if err != nil {
		return err
	}
	i.w += k
	i.s.tally.in += uint64(k)
	return nil
}

// payload receives p whole, first from what is here already.
func (i *input) payload(p []byte) error {
	n := copy(p, i.b[i.r:i.w])
	i.r += n
	if n == len(p) {
		return nil
	}
	if err := i.s.endTurn(); err != nil {
		return err
	}
	i.s.receiving.waiting.Store(true)
	defer i.s.receiving.waiting.Store(false)
	steady := 0
	for i.p = p[n:]; len(i.p) > 0; {
		k, err := i.s.sender.link.recv(i.rest, i.turn)
		if err != nil {
			return err
		}
		i.p = i.p[k:]
		i.s.tally.in += uint64(k)
		if steady += k; steady >= limits.StallBytes || len(i.p) == 0 {
			steady = 0
			i.s.receiving.moved()
		}
	}
	i.p = nil
	return nil
}

// discard skips n bytes of payload that nobody wants.
func (i *input) discard(n int) error {
	k := min(n, i.w-i.r)
	i.skip(k)
	for n -= k; n > 0; n -= k {
		if i.hold(); i.buf == nil {
			return net.ErrClosed
		}
		k = min(n, len(i.b))
		i.r, i.w = 0, 0
		if err := i.payload(i.b[:k]); err != nil {
			return err
		}
	}
	return nil
}

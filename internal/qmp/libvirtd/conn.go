package libvirtd

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// headLen is the length of a message's head, its length field included.
const headLen = 28

// framed is the connection below go-libvirt, which makes a buffer of whatever
// length a message names and sets no deadlines. It ends the connection at a
// length that no message has.
type framed struct {
	net.Conn
	done  chan struct{} // closed by Close
	close func() error

	// Used by the one reader alone.
	length []byte // of the next message, as far as it was read
	rest   uint32 // bytes of the message that are still to come
}

func newFramed(c net.Conn) *framed {
	f := &framed{Conn: c, done: make(chan struct{})}
	f.close = sync.OnceValue(func() error {
		close(f.done)
		return c.Close()
	})
	return f
}

// Dial makes it go-libvirt's dialer, which is called once.
func (f *framed) Dial() (net.Conn, error) { return f, nil }

// Close may be called by anybody, any number of times.
func (f *framed) Close() error { return f.close() }

// Read follows the messages that pass.
func (f *framed) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	for b := p[:max(n, 0)]; len(b) > 0; {
		if f.rest > 0 {
			pass := min(uint32(len(b)), f.rest)
			f.rest -= pass
			b = b[pass:]
			continue
		}
		f.length = append(f.length, b[0])
		b = b[1:]
		if len(f.length) < 4 {
			continue
		}
		length := binary.BigEndian.Uint32(f.length)
		f.length = f.length[:0]
		if length < headLen || length > limits.LibvirtMessage {
			f.Close()
			return 0, fmt.Errorf("%w: a message of %d bytes", qmp.ErrProtocol, length)
		}
		f.rest = length - 4
	}
	if err != nil {
		f.Close()
	}
	return n, err
}

// Write gives the peer limits.LibvirtCall to take it.
func (f *framed) Write(p []byte) (int, error) {
	if err := f.SetWriteDeadline(time.Now().Add(limits.LibvirtCall)); err != nil {
		return 0, err
	}
	return f.Conn.Write(p)
}

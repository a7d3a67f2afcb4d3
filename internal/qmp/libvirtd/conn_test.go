package libvirtd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// piecewise is a connection that gives at most n bytes at a time.
type piecewise struct {
	net.Conn
	r io.Reader
	n int
}

func (p *piecewise) Read(b []byte) (int, error) { return p.r.Read(b[:min(len(b), p.n)]) }
func (p *piecewise) Close() error               { return nil }

// lengths is what the stream's messages say, up to the first that no message
// has.
func lengths(in []byte) (good int, bad bool) {
	for len(in)-good >= 4 {
		n := int(binary.BigEndian.Uint32(in[good:]))
		if n < headLen || n > limits.LibvirtMessage {
			return good, true
		}
		if n > len(in)-good {
			break
		}
		good += n
	}
	return good, false
}

// FuzzMessagesFromLibvirt holds the connection to passing whole messages
// unchanged, in whatever pieces they come, and to ending at a bad length.
func FuzzMessagesFromLibvirt(f *testing.F) {
	message := func(n int) []byte {
		b := make([]byte, n)
		binary.BigEndian.PutUint32(b, uint32(n))
		return b
	}
	f.Add(append(message(28), message(60)...), 1)
	f.Add(append(message(100), 0, 0, 0, 27), 7)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, 3)
	f.Add(append(message(28), 0, 0), 30)
	f.Fuzz(func(t *testing.T, in []byte, n int) {
		c := newFramed(&piecewise{r: bytes.NewReader(in), n: max(1, min(n, 1<<10))})
		out, err := io.ReadAll(c)
		good, bad := lengths(in)
		if bad != errors.Is(err, qmp.ErrProtocol) || !bad && err != nil {
			t.Fatalf("error %v, a bad length: %v", err, bad)
		}
		if !bytes.HasPrefix(in, out) || !bad && len(out) != len(in) {
			t.Fatalf("read %d bytes of %d", len(out), len(in))
		}
		if bad && len(out) > good+3 {
			t.Fatalf("read %d bytes, the bad length ends at %d", len(out), good+4)
		}
		select {
		case <-c.done:
		default:
			t.Fatal("the connection is not closed")
		}
	})
}

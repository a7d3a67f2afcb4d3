package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
)

const lookoutSize = 512 // of the writes of these tests, all at the beginning of the disk

// pausedRig serves a paused disk of zeroes in memory.
func pausedRig(t *testing.T) (*rig, *layer.Pause, *layer.Hold) {
	t.Helper()
	p := layer.NewPause(backing.NewEmulate(mem.New(1<<20, nil)))
	h, err := p.Begin(limits.PauseLongest)
	if err != nil {
		t.Fatal(err)
	}
	return newRig(t, p, engine.NewPool(1), bufpool.New(limits.BufferBudget)), p, h
}

// write sends n writes, and waits until as many of them as may be are in flight.
func (r *rig) write(c net.Conn, n int) *session {
	r.t.Helper()
	w := append(message(wire.CmdWrite, 1, 0, lookoutSize), bytes.Repeat([]byte{'A'}, lookoutSize)...)
	r.send(c, bytes.Repeat(w, n))
	want := int64(min(n, limits.RequestsPerConn))
	return r.await(func(s *session) bool { return s.own.requests.Load() == want })
}

// ended waits for the end of the only session.
func (r *rig) ended() error {
	r.t.Helper()
	r.idle()
	return <-r.errs
}

// idle waits until there is no session.
func (r *rig) idle() {
	r.t.Helper()
	for since := time.Now(); r.server.Busy(); time.Sleep(time.Millisecond) {
		if time.Since(since) > hangLimit {
			r.t.Fatal("the session of a client that is gone lasts")
		}
	}
}

// TestRequestsOfWhoIsGoneAreGivenUp: they waited for the end of a pause, and the disk
// has nothing of them when it goes on.
func TestRequestsOfWhoIsGoneAreGivenUp(t *testing.T) {
	unix := func(t *testing.T, r *rig) net.Conn { return r.simple() }
	inTLS := func(t *testing.T, r *rig) net.Conn { return r.simpleInsideTLS(r.secure(t, TLSRequire)) }
	beside := func(t *testing.T, r *rig) net.Conn {
		keys, _ := guestKey(t)
		return r.simpleInsideTLS(r.secureBeside(t, TLSRequire, keys))
	}
	byKey := func(t *testing.T, r *rig) net.Conn {
		keys, cfg := guestKey(t)
		r.secureBeside(t, TLSRequire, keys)
		return r.simpleInsideTLS(cfg)
	}
	const more = limits.RequestsPerConn + 10
	closed := func(c net.Conn) { c.Close() }
	cut := func(c net.Conn) { c.(*tls.Conn).NetConn().Close() }
	type leaving struct {
		dial   func(*testing.T, *rig) net.Conn
		writes int
		leave  func(c net.Conn)
	}
	cases := map[string]leaving{
		"closed":                     {unix, 10, closed},
		"closed, and more":           {unix, more, closed},
		"both sides shut":            {unix, 10, func(c net.Conn) { c.(*net.UnixConn).CloseWrite(); c.(*net.UnixConn).CloseRead() }},
		"cut, inside TLS":            {inTLS, 10, cut},
		"ended, inside TLS":          {inTLS, 10, closed},
		"cut, beside keys, and more": {beside, more, cut},
		"ended, beside keys":         {beside, 10, closed},
	}
	if psk.Supported() == nil {
		cases["cut, with a key, and more"] = leaving{byKey, more, cut}
		cases["ended, with a key"] = leaving{byKey, 10, closed}
	}
	for name, tt := range cases {
		t.Run(name, func(t *testing.T) {
			r, p, h := pausedRig(t)
			c := tt.dial(t, r)
			r.write(c, tt.writes)
			tt.leave(c)
			if err := r.ended(); err != errGone {
				t.Errorf("the session ended with %v, want %v", err, errGone)
			}
			if err := h.Resume(); err != nil {
				t.Fatal(err)
			}
			r.untouched(p)
		})
	}
}

// guestKey is a server's key for one guest, and the configuration of that guest, which
// is nil in a build that cannot use keys.
func guestKey(t *testing.T) (*psk.Keys, *tls.Config) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.psk")
	if err := psk.Add(path, "guest", limits.MinPSK, false); err != nil {
		t.Fatal(err)
	}
	keys, err := psk.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := psk.ClientConfig(path, "guest")
	if err != nil && !errors.Is(err, psk.ErrUnsupported) {
		t.Fatal(err)
	}
	return keys, cfg
}

// untouched checks that the disk has none of the bytes that write writes.
func (r *rig) untouched(d backing.Device) {
	r.t.Helper()
	got := make([]byte, lookoutSize)
	if err := d.ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, make([]byte, lookoutSize)) {
		r.t.Errorf("a write that was given up reached the disk: %q, %v", got[:1], err)
	}
}

// TestResetEndsWhatWaits: of TCP, whose peers may close one side for both.
func TestResetEndsWhatWaits(t *testing.T) {
	for _, writes := range []int{10, limits.RequestsPerConn + 10} {
		r, p, h := pausedRig(t)
		l := r.listen(t, transport.Endpoint{Kind: transport.TCP, Address: "127.0.0.1"})
		c, err := dialer(l)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r.greet(c, "")
		r.write(c, writes)
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
		r.idle()
		if err := h.Resume(); err != nil {
			t.Fatal(err)
		}
		r.untouched(p)
	}
}

// TestHalfOfAConnectionGetsItsReplies, until the other half is closed as well.
func TestHalfOfAConnectionGetsItsReplies(t *testing.T) {
	for _, stays := range []bool{true, false} {
		r, p, h := pausedRig(t)
		c := r.simple().(*net.UnixConn)
		const writes = 10
		x := r.write(c, writes)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		r.await(func(s *session) bool {
			s.lookout.mu.Lock()
			defer s.lookout.mu.Unlock()
			return s.lookout.on
		})
		if x.lookout.look(); x.dead.Load() {
			t.Fatalf("a peer that still reads was dropped: %v", x.why())
		}
		if !stays {
			c.Close()
			if err := r.ended(); err != errGone {
				t.Errorf("the session ended with %v, want %v", err, errGone)
			}
		}
		if err := h.Resume(); err != nil {
			t.Fatal(err)
		}
		if !stays {
			r.untouched(p)
			continue
		}
		for range writes {
			if e, _ := r.reply(c); e != wire.OK {
				t.Errorf("write: got %v", e)
			}
		}
		if n, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("afterwards: got %d, %v, want EOF", n, err)
		}
	}
}

// TestDisconnectRequestFinishesWhatIsInFlight, also of a client that does not wait: the
// first reply already finds nobody.
func TestDisconnectRequestFinishesWhatIsInFlight(t *testing.T) {
	r, p, h := pausedRig(t)
	c := r.simple()
	const writes = 10
	r.disconnect(c, r.writeApart(c, writes, 0), writes)
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
	<-r.errs
	r.written(p, writes)
}

// writeApart sends n writes, each behind the other, and waits until they are in
// flight.
func (r *rig) writeApart(c net.Conn, n int, flags wire.CmdFlags) *session {
	r.t.Helper()
	for i := range n {
		w := wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdWrite, Flags: flags, Cookie: 1, Off: uint64(i) * lookoutSize, Len: lookoutSize})
		r.send(c, append(w, bytes.Repeat([]byte{'A'}, lookoutSize)...))
	}
	return r.await(func(s *session) bool { return s.own.requests.Load() == int64(n) })
}

// disconnect has the client of session x leave by the rules after n requests, and
// wait for no reply.
func (r *rig) disconnect(c net.Conn, x *session, n uint64) {
	r.t.Helper()
	r.send(c, message(wire.CmdDisc, 0, 0, 0))
	c.Close()
	for since := time.Now(); x.requests.Load() != n+1; time.Sleep(time.Millisecond) {
		if time.Since(since) > hangLimit {
			r.t.Fatal("the request to disconnect is not read")
		}
	}
}

// written checks that the disk has what writeApart writes.
func (r *rig) written(d backing.Device, n int) {
	r.t.Helper()
	got := make([]byte, n*lookoutSize)
	if err := d.ReadAt(context.Background(), got, 0); err != nil || bytes.Count(got, []byte{'A'}) != len(got) {
		r.t.Errorf("the disk has %d bytes of %d that were written, %v", bytes.Count(got, []byte{'A'}), len(got), err)
	}
}

// plodder is a disk that zeroes by writing.
type plodder struct{ backing.Device }

func (p plodder) Info() backing.Info {
	i := p.Device.Info()
	i.Caps &^= backing.CanFastZero
	return i
}

// TestZeroingThatIsPaidForEndsWithItsClient: its pieces would else go in between the
// writes of the next one, for hours.
func TestZeroingThatIsPaidForEndsWithItsClient(t *testing.T) {
	lim, err := layer.NewLimiter(layer.Rates{Write: layer.Rate{Bytes: 1}})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := layer.NewRateLimit(plodder{backing.NewEmulate(mem.New(64<<20, nil))}, layer.RateOptions{Limiters: []*layer.Limiter{lim}})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, dev, engine.NewPool(1), bufpool.New(limits.BufferBudget))
	c := r.simple()
	for i := range uint64(4) {
		r.send(c, message(wire.CmdZero, i, 0, 32<<20))
	}
	r.await(func(s *session) bool { return s.own.requests.Load() == 4 })
	c.Close()
	if err := r.ended(); err != errGone {
		t.Errorf("the session ended with %v, want %v", err, errGone)
	}
}

// TestWaitForMemoryEndsWithItsClient, and so does what waits beside it.
func TestWaitForMemoryEndsWithItsClient(t *testing.T) {
	r, _, h := pausedRig(t)
	c := r.simple()
	r.write(c, 10)
	release := r.hold(0)
	r.send(c, message(wire.CmdRead, 1, 0, 4096))
	r.awaitShortage()
	c.Close()
	if err := r.ended(); err != errGone {
		t.Errorf("the session ended with %v, want %v", err, errGone)
	}
	release()
	if err := h.Resume(); err != nil {
		t.Fatal(err)
	}
}

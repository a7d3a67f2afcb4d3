package nbd

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

const unreadSize = 8 << 20 // more than any socket buffer

// pausableRig serves a file that is in the page cache unless cache is "none", and
// returns what it holds.
func pausableRig(t *testing.T, cache string) (*rig, *layer.Pause, []byte) {
	t.Helper()
	want := bytes.Repeat([]byte("as it was before"), unreadSize/16)
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	bufs := bufpool.New(limits.BufferBudget)
	eng := engine.NewPool(2)
	dev, err := open.Open(t.Context(), open.Spec{Path: path, Format: "raw", Cache: cache, Engine: eng, Buffers: bufs, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	pause := layer.NewPause(dev)
	return newRig(t, pause, eng, bufs), pause, want
}

// mustPause pauses the disk, and lets it go on at the end of the test.
func mustPause(t *testing.T, p *layer.Pause) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
	defer cancel()
	hold, err := p.Pause(ctx, time.Minute)
	if err != nil {
		t.Fatalf("pause: %v", err)
	}
	if err := hold.Resume(); err != nil {
		t.Error(err)
	}
}

// take reads n replies with want.
func (r *rig) take(c net.Conn, n int, want []byte) {
	r.t.Helper()
	for range n {
		if e, _ := r.reply(c); e != wire.OK {
			r.t.Fatalf("read: got %v", e)
		}
		if got := r.expect(c, len(want)); !bytes.Equal(got, want) {
			r.t.Error("other bytes than the disk has")
		}
	}
}

// TestUnreadReplyHoldsUpNoPause: a peer asks for much and takes nothing of it.
// The disk is paused all the same, and what the peer gets in the end is what the
// disk had when it asked.
func TestUnreadReplyHoldsUpNoPause(t *testing.T) {
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			r, pause, want := pausableRig(t, cache)
			c := r.simple()
			const reads = 3
			for i := range uint64(reads) {
				r.send(c, message(wire.CmdRead, i, 0, unreadSize))
			}
			for r.exports.stats.Snapshot()[obs.Read].InFlight == 0 {
				time.Sleep(time.Millisecond)
			}
			mustPause(t, pause)
			r.take(c, reads, want)
		})
	}
}

// reusing is a disk whose file has other contents as soon as a lease has ended.
type reusing struct {
	backing.Device
	file  *engine.File
	ended chan error
}

func (d *reusing) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	err := d.Device.Map(op, off, n, m)
	if err == nil {
		d.file, m.Lease, m.Reused = m.Runs[0].File, d, true
	}
	return err
}

func (d *reusing) Release() {
	_, err := d.file.WriteCached(bytes.Repeat([]byte("of another place"), unreadSize/16), 0)
	d.ended <- err
}

// TestUnreadReplyHasNothingOfAnotherPlace: what a reply in the socket was read
// from is freed and written anew before the peer takes it.
func TestUnreadReplyHasNothingOfAnotherPlace(t *testing.T) {
	r, _, want := pausableRig(t, "writeback")
	d := &reusing{Device: r.dev, ended: make(chan error, 8)}
	r.exports.dev = d
	c := r.simple()
	const n = 128 << 10 // fits into the socket
	r.send(c, message(wire.CmdRead, 1, 0, n))
	if err := <-d.ended; err != nil {
		t.Fatal(err)
	}
	r.take(c, 1, want[:n])
}

// TestUnreadReplyBehindOthersHoldsUpNoPause: what the peer does not take stands
// before the reply that holds a part of the disk.
func TestUnreadReplyBehindOthersHoldsUpNoPause(t *testing.T) {
	r, pause, want := pausableRig(t, "writeback")
	c := r.simple()
	const small = unreadSize / limits.InlineReply
	for i := range uint64(small) {
		r.send(c, message(wire.CmdRead, i, 0, limits.InlineReply))
	}
	r.send(c, message(wire.CmdRead, small, 0, unreadSize))
	r.await(func(s *session) bool { return s.requests.Load() > small })
	mustPause(t, pause)
	for range small + 1 {
		e, cookie := r.reply(c)
		n := limits.InlineReply
		if cookie == small {
			n = unreadSize
		}
		if e != wire.OK || !bytes.Equal(r.expect(c, n), want[:n]) {
			t.Errorf("read %d: got %v, or other bytes than the disk has", cookie, e)
		}
	}
}

// TestSlowReaderHoldsUpNoPause: the time of limits.Unread is not for each reply
// anew.
func TestSlowReaderHoldsUpNoPause(t *testing.T) {
	r, pause, want := pausableRig(t, "writeback")
	r.opt.Bytes = limits.MaxIO
	c := r.simple()
	const reads = 8
	for i := range uint64(reads) {
		r.send(c, message(wire.CmdRead, i, 0, unreadSize))
	}
	r.unread()
	paused, taken := make(chan struct{}), 0
	go func() {
		defer close(paused)
		mustPause(t, pause)
	}()
	for ; taken < reads; taken++ {
		select {
		case <-paused:
			r.take(c, reads-taken, want)
			return
		case <-time.After(limits.Unread * 3 / 4):
			r.take(c, 1, want)
		}
	}
	t.Error("the pause waited until the client had taken all")
	<-paused
}

// TestUnreadRepliesAreBounded: they count against the budgets from the beginning,
// whether they are in the page cache or in memory, and each until it is taken.
func TestUnreadRepliesAreBounded(t *testing.T) {
	r, _, want := pausableRig(t, "writeback")
	c := r.simple()
	const reads = 2 * limits.BytesPerConn / unreadSize
	for i := range uint64(reads) {
		r.send(c, message(wire.CmdRead, i, 0, unreadSize))
	}
	x := r.unread()
	for copied := false; !copied; time.Sleep(time.Millisecond) {
		x.sender.mu.Lock()
		copied = x.sender.unread
		x.sender.mu.Unlock()
	}
	const most = limits.BytesPerConn/unreadSize + 1
	if n := x.own.requests.Load(); n > most {
		t.Errorf("%d replies of %d bytes are in flight, want no more than %d", n, unreadSize, most)
	}
	if n := x.peer.bytes.Load(); n > limits.BytesPerConn+unreadSize+3*limits.TurnBuffer {
		t.Errorf("the peer is charged with %d bytes", n)
	}
	r.take(c, reads-3, want)
	for x.own.requests.Load() > 3 { // before the peer has taken the rest
		time.Sleep(time.Millisecond)
	}
	r.take(c, 3, want)
}

// TestForcedStopCutsOffWhoTakesNothing: all is answered, but the peer leaves it
// unread.
func TestForcedStopCutsOffWhoTakesNothing(t *testing.T) {
	tests := []struct {
		name string
		stop func(*rig)
	}{
		{"shutdown", func(r *rig) {
			ctx, cancel := context.WithCancel(r.t.Context())
			cancel()
			if err := r.server.Shutdown(ctx); err != ErrUntaken {
				r.t.Errorf("shutdown: got %v, want %v", err, ErrUntaken)
			}
			r.server = nil
		}},
		{"disconnect", func(r *rig) {
			for range 2 {
				r.server.Disconnect(1)
			}
		}},
		{"cut", func(r *rig) { r.exports.cut() }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, _, _ := pausableRig(t, "writeback")
			r.exports.cutting, r.exports.cut = context.WithCancel(t.Context())
			c := r.simple()
			for i := range uint64(3) {
				r.send(c, message(wire.CmdRead, i, 0, unreadSize))
			}
			r.unread()
			tt.stop(r)
			select {
			case err := <-r.errs:
				if err != errUntaken {
					t.Errorf("session: got %v, want %v", err, errUntaken)
				}
			case <-time.After(hangLimit):
				t.Error("the client is still there")
				c.Close()
			}
		})
	}
}

package nbd

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// queueRig serves a raw file past the page cache, whose transfers wait for the only
// worker of the engine until begin is called.
func queueRig(t *testing.T) (r *rig, dev backing.Device, begin func()) {
	t.Helper()
	dir := t.TempDir()
	path, other := filepath.Join(dir, "disk"), filepath.Join(dir, "other")
	if err := errors.Join(os.WriteFile(path, make([]byte, 1<<20), 0o600), os.WriteFile(other, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	bufs, eng := bufpool.New(limits.BufferBudget), engine.NewPool(1)
	bufs.SetPoison(true)
	dev, err := open.Open(t.Context(), open.Spec{Path: path, Format: "raw", Cache: open.CacheNone, Engine: eng, Buffers: bufs})
	if err != nil {
		t.Fatal(err)
	}
	r = newRig(t, dev, eng, bufs)
	osf, err := os.Open(other)
	if err != nil {
		t.Fatal(err)
	}
	f, err := eng.Open(osf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	hold := make(chan struct{})
	begin = sync.OnceFunc(func() { close(hold) })
	t.Cleanup(begin)
	eng.Submit([]*engine.IO{{Op: engine.OpSync, File: f, Done: func(*engine.IO) { <-hold }}})
	return r, dev, begin
}

// TestTransfersOfWhoIsGoneAreNotBegun: those of a turn, and those of requests that run
// on their own; all that they held is given back.
func TestTransfersOfWhoIsGoneAreNotBegun(t *testing.T) {
	for name, flags := range map[string]wire.CmdFlags{"of a turn": 0, "on their own": wire.FlagFUA} {
		t.Run(name, func(t *testing.T) {
			r, dev, begin := queueRig(t)
			c := r.simple()
			x := r.writeApart(c, 10, flags)
			c.Close()
			for since := time.Now(); !x.dead.Load(); time.Sleep(time.Millisecond) {
				if time.Since(since) > hangLimit {
					t.Fatal("nobody sees that the client is gone")
				}
			}
			begin()
			if err := r.ended(); err != errGone {
				t.Errorf("the session ended with %v, want %v", err, errGone)
			}
			r.untouched(dev)
			if !x.own.empty() || !x.peer.empty() {
				t.Errorf("in flight: got %d requests and %d bytes, of the peer %d and %d, want none",
					x.own.requests.Load(), x.own.bytes.Load(), x.peer.requests.Load(), x.peer.bytes.Load())
			}
		})
	}
}

// TestTransfersBeforeADisconnectRequestAreMade, though the first reply finds nobody.
func TestTransfersBeforeADisconnectRequestAreMade(t *testing.T) {
	for _, flags := range []wire.CmdFlags{0, wire.FlagFUA} {
		r, dev, begin := queueRig(t)
		c := r.simple()
		const writes = 10
		r.disconnect(c, r.writeApart(c, writes, flags), writes)
		begin()
		<-r.errs
		r.written(dev, writes)
	}
}

// TestTransfersThatWaitAreAnsweredAtAForcedStop, and not made after that.
func TestTransfersThatWaitAreAnsweredAtAForcedStop(t *testing.T) {
	r, dev, begin := queueRig(t)
	c := r.simple()
	const writes = 10
	x := r.writeApart(c, writes, 0)
	if n := x.abandon(); n != writes {
		t.Errorf("%d requests had no answer, want %d", n, writes)
	}
	for range writes {
		if e, _ := r.reply(c); e != wire.ESHUTDOWN {
			t.Errorf("write: got %v, want %v", e, wire.ESHUTDOWN)
		}
	}
	begin()
	<-r.errs
	r.untouched(dev)
}

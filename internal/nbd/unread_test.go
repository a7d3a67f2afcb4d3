package nbd

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TestUnreadReplyHoldsUpNoPause: a peer asks for much and takes nothing of it.
// The disk is paused all the same, and what the peer gets in the end is what the
// disk had when it asked.
func TestUnreadReplyHoldsUpNoPause(t *testing.T) {
	const size = 16 << 20
	want := bytes.Repeat([]byte("as it was before"), size/16)
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			bufs := bufpool.New(limits.BufferBudget)
			eng := engine.NewPool(2)
			dev, err := open.Open(t.Context(), open.Spec{Path: path, Format: "raw", Cache: cache, Engine: eng, Buffers: bufs, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			pause := layer.NewPause(dev)
			r := newRig(t, pause, eng, bufs)
			c := r.simple()
			const reads = 3
			for i := range uint64(reads) {
				r.send(c, message(wire.CmdRead, i, 0, size))
			}
			for r.exports.stats.Snapshot()[0].InFlight == 0 {
				time.Sleep(time.Millisecond)
			}
			ctx, cancel := context.WithTimeout(t.Context(), hangLimit)
			defer cancel()
			hold, err := pause.Pause(ctx, time.Minute)
			if err != nil {
				t.Fatalf("pause: %v", err)
			}
			go func() {
				if err := hold.Resume(); err != nil { // what has not begun waits for it
					t.Error(err)
				}
			}()
			for range reads {
				if e, cookie := r.reply(c); e != wire.OK || cookie >= reads {
					t.Fatalf("read: got %v for %d", e, cookie)
				}
				if got := r.expect(c, size); !bytes.Equal(got, want) {
					t.Error("other bytes than the disk has")
				}
			}
		})
	}
}

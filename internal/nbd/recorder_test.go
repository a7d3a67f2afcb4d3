package nbd

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// recorder is a disk that remembers what it was asked for. Nothing of it can be
// mapped: every request becomes a call.
type recorder struct {
	backing.Passthrough
	flushing chan struct{} // unless nil, told that a Flush has begun
	open     chan struct{} // unless nil, what a Flush waits for

	mu    sync.Mutex
	now   int     // guarded by mu; counts beginnings and ends
	calls []*call // guarded by mu
}

// call is one call, and when it began and ended, from 1 on; 0 is not yet.
type call struct {
	cmd          wire.Cmd
	flags        backing.Flags
	began, ended int
}

// record notes the beginning of a call; the function it returns, the end.
func (d *recorder) record(cmd wire.Cmd, f backing.Flags) (ended func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now++
	c := &call{cmd: cmd, flags: f, began: d.now}
	d.calls = append(d.calls, c)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.now++
		c.ended = d.now
	}
}

// take returns the calls so far, and forgets them.
func (d *recorder) take() []call {
	d.mu.Lock()
	defer d.mu.Unlock()
	var l []call
	for _, c := range d.calls {
		l = append(l, *c)
	}
	d.calls = nil
	return l
}

func (d *recorder) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	defer d.record(wire.CmdWrite, f)()
	return d.Next.WriteAt(ctx, p, off, f)
}

func (d *recorder) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	defer d.record(wire.CmdTrim, f)()
	return d.Next.Trim(ctx, off, n, f)
}

func (d *recorder) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	defer d.record(wire.CmdZero, f)()
	return d.Next.Zero(ctx, off, n, f)
}

func (d *recorder) Flush(ctx context.Context) error {
	defer d.record(wire.CmdFlush, 0)()
	if d.open != nil {
		d.flushing <- struct{}{}
		<-d.open
	}
	return d.Next.Flush(ctx)
}

// recorderRig serves 8 MiB.
func recorderRig(t *testing.T) (*rig, *recorder) {
	d := &recorder{Passthrough: backing.Passthrough{Next: mem.New(8<<20, nil)}}
	return newRig(t, d, engine.NewPool(1), bufpool.New(limits.BufferBudget)), d
}

// TestFlagsReachTheDisk: a flag that is lost on the way looks like one that was
// obeyed, to the client.
func TestFlagsReachTheDisk(t *testing.T) {
	r, d := recorderRig(t)
	c := r.simple()
	const short, long = 4096, 2 * limits.InlineReply
	for _, tt := range []struct {
		cmd   wire.Cmd
		n     uint64
		flags wire.CmdFlags
		want  backing.Flags
	}{
		{wire.CmdWrite, short, 0, 0},
		{wire.CmdWrite, short, wire.FlagFUA, backing.FUA},
		{wire.CmdWrite, long, 0, 0},
		{wire.CmdWrite, long, wire.FlagFUA, backing.FUA},
		{wire.CmdTrim, short, 0, 0},
		{wire.CmdTrim, short, wire.FlagFUA, backing.FUA},
		{wire.CmdZero, short, 0, 0},
		{wire.CmdZero, short, wire.FlagFUA, backing.FUA},
		{wire.CmdZero, short, wire.FlagNoHole, backing.NoHole},
		{wire.CmdZero, short, wire.FlagFastZero, backing.FastZero},
		{wire.CmdZero, short, wire.FlagFUA | wire.FlagNoHole | wire.FlagFastZero, backing.FUA | backing.NoHole | backing.FastZero},
	} {
		b := wire.AppendRequest(nil, wire.Request{Cmd: tt.cmd, Flags: tt.flags, Len: tt.n})
		if tt.cmd == wire.CmdWrite {
			b = append(b, make([]byte, tt.n)...)
		}
		r.send(c, b)
		if e, _ := r.reply(c); e != wire.OK {
			t.Errorf("%v of %d bytes with flags %#x: got %v", tt.cmd, tt.n, tt.flags, e)
		}
		if l := d.take(); len(l) != 1 || l[0].cmd != tt.cmd || l[0].flags != tt.want {
			t.Errorf("%v of %d bytes with flags %#x: the disk saw %+v, want one with flags %#x", tt.cmd, tt.n, tt.flags, l, tt.want)
		}
	}
}

// TestFlushCoversWritesOfOtherConnections: what multi-conn promises. The disk is
// flushed after the write was answered, and before the flush is.
func TestFlushCoversWritesOfOtherConnections(t *testing.T) {
	r, d := recorderRig(t)
	d.flushing, d.open = make(chan struct{}, 1), make(chan struct{})
	release := sync.OnceFunc(func() { close(d.open) })
	defer release()
	a, b := r.simple(), r.simple()
	if e := r.ask(a, wire.CmdWrite, 0, 4096); e != wire.OK {
		t.Fatalf("write: got %v", e)
	}
	r.send(b, message(wire.CmdFlush, 7, 0, 0))
	select {
	case <-d.flushing:
	case <-time.After(hangLimit):
		t.Fatal("the disk is not flushed")
	}
	// Replies leave in the order in which they are ready.
	r.send(b, message(wire.CmdRead, 8, 0, 512))
	if e, cookie := r.reply(b); e != wire.OK || cookie != 8 {
		t.Errorf("while the disk is being flushed: got %v for %d, want OK for 8, the read", e, cookie)
	}
	r.expect(b, 512)
	release()
	if e, cookie := r.reply(b); e != wire.OK || cookie != 7 {
		t.Errorf("flush: got %v for %d, want OK for 7", e, cookie)
	}
	l := d.take()
	if len(l) != 2 || l[0].cmd != wire.CmdWrite || l[1].cmd != wire.CmdFlush {
		t.Fatalf("the disk saw %+v, want a write and a flush", l)
	}
	if write, flush := l[0], l[1]; write.ended == 0 || flush.began < write.ended || flush.ended == 0 {
		t.Errorf("the disk saw %+v, want the flush after the write, and its end", l)
	}
}

package nbd

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// farFile is a file of zeroes on storage that takes its time for writes.
type farFile struct {
	fs.Inode
	size  uint64
	write atomic.Pointer[func()] // what a write waits for
}

var (
	_ fs.NodeOpener    = (*farFile)(nil)
	_ fs.NodeReader    = (*farFile)(nil)
	_ fs.NodeWriter    = (*farFile)(nil)
	_ fs.NodeGetattrer = (*farFile)(nil)
)

func (f *farFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *farFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Size, out.Mode = f.size, 0o600
	return 0
}

func (f *farFile) Read(_ context.Context, _ fs.FileHandle, p []byte, _ int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(make([]byte, len(p))), 0
}

func (f *farFile) Write(_ context.Context, _ fs.FileHandle, p []byte, _ int64) (uint32, syscall.Errno) {
	(*f.write.Load())()
	return uint32(len(p)), 0
}

// farRig serves a farFile.
func farRig(t *testing.T) (*rig, *farFile) {
	t.Helper()
	f := &farFile{size: 1 << 20}
	root := &fs.Inode{}
	dir := t.TempDir()
	srv, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "farfile"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), true)
		},
	})
	if err != nil {
		t.Skipf("needs root and /dev/fuse: %v", err)
	}
	t.Cleanup(func() {
		if err := srv.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return rawRig(t, filepath.Join(dir, "disk"), "pool", ""), f
}

func TestSlowWritesDoNotHoldUpReads(t *testing.T) {
	r, f := farRig(t)
	c := r.simple()
	slow := func() { <-time.After(2 * limits.SlowWrite) }
	f.write.Store(&slow)
	payload := make([]byte, 4096)
	r.send(c, append(message(wire.CmdWrite, 1, 0, 4096), payload...))
	if e, cookie := r.reply(c); e != wire.OK || cookie != 1 {
		t.Fatalf("slow write: got %v for %d", e, cookie)
	}
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	t.Cleanup(free)
	stuck := func() { <-release }
	f.write.Store(&stuck)
	r.send(c, append(message(wire.CmdWrite, 2, 0, 4096), payload...))
	r.send(c, message(wire.CmdRead, 3, 8192, 4096))
	if e, cookie := r.reply(c); e != wire.OK || cookie != 3 {
		t.Errorf("first answer: got %v for %d, want OK for the read", e, cookie)
	}
	r.expect(c, 4096)
	free()
	if e, cookie := r.reply(c); e != wire.OK || cookie != 2 {
		t.Errorf("second answer: got %v for %d, want OK for the write", e, cookie)
	}
}

// writes are n writes of lookoutSize bytes, with cookies from 0.
func writes(n int) (p []byte) {
	for i := range n {
		p = append(p, message(wire.CmdWrite, uint64(i), uint64(i)*lookoutSize, lookoutSize)...)
		p = append(p, make([]byte, lookoutSize)...)
	}
	return p
}

// TestLongTurnOfWritesEndsWithItsClient: who takes its place may have written by then.
func TestLongTurnOfWritesEndsWithItsClient(t *testing.T) {
	r, f := farRig(t)
	c := r.simple()
	sent := make(chan struct{})
	var written atomic.Int32
	slow := func() {
		if written.Add(1) == 1 {
			<-sent
			c.Close()
		}
		<-time.After(limits.LongTurn)
	}
	f.write.Store(&slow)
	r.send(c, writes(100))
	close(sent)
	if err := r.ended(); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the session ended with %v, want %v", err, syscall.EPIPE)
	}
	if n := written.Load(); n != 1 {
		t.Errorf("%d writes reached the disk, want the one in which the client left", n)
	}
}

// TestLongTurnOfWritesIsAnsweredMeanwhile: the first write has its reply while the second
// lasts.
func TestLongTurnOfWritesIsAnsweredMeanwhile(t *testing.T) {
	r, f := farRig(t)
	c := r.simple()
	answered := make(chan struct{})
	free := sync.OnceFunc(func() { close(answered) })
	t.Cleanup(free)
	var written atomic.Int32
	slow := func() {
		if written.Add(1) == 1 {
			<-time.After(limits.LongTurn)
		} else {
			<-answered
		}
	}
	f.write.Store(&slow)
	r.send(c, writes(2))
	if e, cookie := r.reply(c); e != wire.OK || cookie != 0 {
		t.Errorf("first answer: got %v for %d, want OK for 0", e, cookie)
	}
	free()
	if e, cookie := r.reply(c); e != wire.OK || cookie != 1 {
		t.Errorf("second answer: got %v for %d, want OK for 1", e, cookie)
	}
}

func TestPaceSlowsDownAndRecovers(t *testing.T) {
	var p pace
	if !p.quick() {
		t.Fatal("the first write is not quick")
	}
	start := p.mark
	p.wrote(start.Add(limits.SlowWrite))
	if !p.quick() {
		t.Error("a write within the limit made the next one slow")
	}
	p.wrote(p.mark.Add(limits.SlowWrite + 1))
	if p.quick() {
		t.Error("a slow write was not noticed")
	}
	p.slow = time.Now().Add(-1)
	if !p.quick() {
		t.Error("slowness does not end")
	}
	p.turn()
	if p.long() {
		t.Error("a turn without a write is long")
	}
	if !p.quick() || time.Since(p.mark) > hangLimit {
		t.Error("a new turn does not begin now")
	}
	p.wrote(p.mark.Add(limits.LongTurn / 2))
	if p.long() {
		t.Error("a turn within the limit is long")
	}
	if p.wrote(p.mark.Add(limits.LongTurn)); !p.long() {
		t.Error("a long turn was not noticed")
	}
}

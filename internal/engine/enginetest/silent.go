package enginetest

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Silent is a file of a file system in user space that does not answer reads
// until it is told to.
type Silent struct {
	fs.Inode
	Path   string
	Answer func() // lets all reads through; it may be called again

	asked  chan bool // has one when a read came
	answer chan bool
}

const silentBytes = 64 << 20

var (
	_ fs.NodeOpener    = (*Silent)(nil)
	_ fs.NodeReader    = (*Silent)(nil)
	_ fs.NodeGetattrer = (*Silent)(nil)
)

// NewSilent mounts one until the test ends.
func NewSilent(t testing.TB) *Silent {
	t.Helper()
	dir := t.TempDir()
	s := &Silent{Path: filepath.Join(dir, "disk"), asked: make(chan bool, 1), answer: make(chan bool)}
	s.Answer = sync.OnceFunc(func() { close(s.answer) })
	root := &fs.Inode{}
	srv, err := fs.Mount(dir, root, &fs.Options{
		// Beyond MaxBackground, readahead waits in the call that asks it not to.
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "silent", MaxBackground: 4096},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, s, fs.StableAttr{Mode: syscall.S_IFREG}), true)
		},
	})
	if err != nil {
		t.Skipf("needs root and /dev/fuse: %v", err)
	}
	t.Cleanup(func() {
		s.Answer()
		if err := srv.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return s
}

func (s *Silent) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (s *Silent) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Size, out.Mode = silentBytes, 0o600
	return 0
}

func (s *Silent) Read(_ context.Context, _ fs.FileHandle, p []byte, _ int64) (fuse.ReadResult, syscall.Errno) {
	select {
	case s.asked <- true:
	default:
	}
	<-s.answer
	clear(p)
	return fuse.ReadResultData(p), 0
}

// Hang has each of some owners wait for so many reads of f, of a block of buf
// each, and gives what waits for their end. One of them has come to the file.
func (s *Silent) Hang(e engine.Engine, f *engine.File, buf []byte, owners int) (over func()) {
	var g sync.WaitGroup
	for i := range len(buf) / blockBytes {
		by := engine.WithOwner(context.Background(), engine.Owner(1+i%owners))
		io := &engine.IO{Op: engine.OpRead, File: f, Buf: buf[i*blockBytes:][:blockBytes], Off: int64(i%64) << 20}
		g.Go(func() { _ = engine.Do(by, e, io) }) // an inline pool waits within Submit
	}
	<-s.asked
	return g.Wait
}

// ManyReads are twice as many bytes, in blocks, as io_uring has threads by itself.
func ManyReads() int { return 2 * 4 * runtime.NumCPU() * blockBytes }

// silentFile: some owners have a file that hangs, and another has others.
func silentFile(e *env) {
	s := NewSilent(e)
	defer s.Answer()
	other, silent := e.create(make([]byte, 4*blockBytes)), e.open(s.Path, os.O_RDWR)
	calm := engine.WithOwner(e.Context(), engine.OwnerOf("calm"))
	over := s.Hang(e.eng, silent, e.buf(ManyReads()), 3)
	for _, io := range []*engine.IO{
		{Op: engine.OpWrite, File: other, Buf: e.buf(blockBytes)},
		{Op: engine.OpSync, File: other},
		{Op: engine.OpPunch, File: other, Len: blockBytes},
		{Op: engine.OpRead, File: other, Buf: e.buf(blockBytes)},
	} {
		if err := engine.Do(calm, e.eng, io); err != nil && !unsupported(err) {
			e.Errorf("%v of another file: %v", io.Op, err)
		}
	}
	s.Answer()
	over()
}

package raw_test

import (
	"bytes"
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
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// badFile is a file in memory, on a real file system in user space, whose
// operations can be made to fail or fall short.
type badFile struct {
	fs.Inode
	flags uint32 // FOPEN_*

	mu   sync.Mutex
	data []byte // guarded by mu

	// verdict is asked about every operation; moves says how many bytes a
	// read or write moves. Nil is all well.
	verdict atomic.Pointer[func(op string, off, n int64) (moves int64, e syscall.Errno)]
	fsyncs  atomic.Int64
}

var (
	_ fs.NodeOpener    = (*badFile)(nil)
	_ fs.NodeReader    = (*badFile)(nil)
	_ fs.NodeWriter    = (*badFile)(nil)
	_ fs.NodeFsyncer   = (*badFile)(nil)
	_ fs.NodeGetattrer = (*badFile)(nil)
	_ fs.NodeLseeker   = (*badFile)(nil)
)

func (b *badFile) judge(op string, off, n int64) (int64, syscall.Errno) {
	if v := b.verdict.Load(); v != nil {
		return (*v)(op, off, n)
	}
	return n, 0
}

// set changes what goes wrong from now on.
func (b *badFile) set(v func(op string, off, n int64) (int64, syscall.Errno)) { b.verdict.Store(&v) }

func (b *badFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, b.flags, 0
}

func (b *badFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if _, e := b.judge("getattr", 0, 0); e != 0 {
		return e
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	out.Size, out.Mode = uint64(len(b.data)), 0o600
	return 0
}

func (b *badFile) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	off = min(off, int64(len(b.data)))
	n, e := b.judge("read", off, min(int64(len(p)), int64(len(b.data))-off))
	if e != 0 {
		return nil, e
	}
	return fuse.ReadResultData(bytes.Clone(b.data[off : off+n])), 0
}

func (b *badFile) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, e := b.judge("write", off, int64(len(p)))
	if e != 0 {
		return 0, e
	}
	return uint32(copy(b.data[off:], p[:n])), 0
}

func (b *badFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	b.fsyncs.Add(1)
	_, e := b.judge("fsync", 0, 0)
	return e
}

// Lseek has all of the file be data.
func (b *badFile) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	if _, e := b.judge("lseek", int64(off), 0); e != 0 {
		return 0, e
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	size := uint64(len(b.data))
	switch {
	case off >= size:
		return 0, syscall.ENXIO
	case whence == unix.SEEK_HOLE:
		return size, 0
	}
	return off, 0
}

// newBadDisk mounts a file of size bytes and serves it.
func newBadDisk(t *testing.T, k kind, size int64, flags uint32) (*raw.Device, *badFile) {
	t.Helper()
	b := &badFile{flags: flags, data: make([]byte, size)}
	root := &fs.Inode{}
	dir := t.TempDir()
	srv, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "badfile"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, b, fs.StableAttr{Mode: syscall.S_IFREG}), true)
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
	d := openRaw(t, filepath.Join(dir, "disk"), newEngine(t, k.engine), k.direct, raw.Options{})
	closeAfter(t, d)
	return d, b
}

// failing makes operations named op fail that touch the block at bad.
func failing(op string, bad int64, e syscall.Errno) func(string, int64, int64) (int64, syscall.Errno) {
	return func(o string, off, n int64) (int64, syscall.Errno) {
		if o == op && off < bad+4096 && bad < off+n {
			return 0, e
		}
		return n, 0
	}
}

// TestBadBlockFailsOnlyReadsThatTouchIt is faults BE-01 and BE-04.
func TestBadBlockFailsOnlyReadsThatTouchIt(t *testing.T) {
	const size, bad = 2 << 20, 700 << 10
	forKinds(t, func(t *testing.T, k kind) {
		d, b := newBadDisk(t, k, size, 0)
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i>>12) | 1
		}
		b.mu.Lock()
		copy(b.data, want)
		b.mu.Unlock()
		b.set(failing("read", bad, syscall.EIO))
		for _, tt := range []struct {
			off, n int64
			fails  bool
		}{
			{bad, 4096, true}, {bad + 100, 10, true}, {bad - 4096, 4096, false}, {bad + 4096, 4096, false},
			{bad - 1, 2, true}, {bad + 4095, 2, true}, {bad - 512<<10, 1 << 20, true}, {bad + 8192, 1 << 20, false},
		} {
			p := make([]byte, tt.n)
			err := d.ReadAt(t.Context(), p, tt.off)
			if tt.fails != (err != nil) || err != nil && backing.KindOf(err) != backing.ErrIO {
				t.Errorf("read at %d+%d: got %v, want failure %v", tt.off, tt.n, err, tt.fails)
			}
			if err == nil && !bytes.Equal(p, want[tt.off:tt.off+tt.n]) {
				t.Errorf("read at %d+%d: wrong bytes", tt.off, tt.n)
			}
		}
	})
}

// TestShortTransfersAreContinued is fault BE-07.
func TestShortTransfersAreContinued(t *testing.T) {
	const n = 4500
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			d, b := newBadDisk(t, kind{engine, false}, 4*n, fuse.FOPEN_DIRECT_IO)
			for moves := int64(1); moves < 4096; moves = moves*7/4 + 1 {
				b.set(func(_ string, _, n int64) (int64, syscall.Errno) { return min(n, moves), 0 })
				want := bytes.Repeat([]byte{byte(moves) | 1}, n)
				if err := d.WriteAt(t.Context(), want, 100, 0); err != nil {
					t.Fatalf("write, %d bytes at a time: %v", moves, err)
				}
				got := make([]byte, n)
				if err := d.ReadAt(t.Context(), got, 100); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("read, %d bytes at a time: %v", moves, err)
				}
			}
		})
	}
}

// TestInterruptedTransfersAreRepeated is fault BE-08.
func TestInterruptedTransfersAreRepeated(t *testing.T) {
	for _, e := range []syscall.Errno{syscall.EINTR, syscall.EAGAIN} {
		t.Run(e.Error(), func(t *testing.T) {
			d, b := newBadDisk(t, kind{"pool", false}, 1<<20, fuse.FOPEN_DIRECT_IO)
			var left atomic.Int64
			b.set(func(_ string, _, n int64) (int64, syscall.Errno) {
				if left.Add(-1) >= 0 {
					return 0, e
				}
				return n, 0
			})
			left.Store(5)
			if err := d.WriteAt(t.Context(), []byte("hello"), 0, 0); err != nil {
				t.Errorf("write: %v", err)
			}
			left.Store(5)
			got := make([]byte, 5)
			if err := d.ReadAt(t.Context(), got, 0); err != nil || string(got) != "hello" {
				t.Errorf("read: got %q, %v", got, err)
			}
		})
	}
}

func TestFUAReachesTheFileSystem(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		d, b := newBadDisk(t, k, 1<<20, 0)
		p := make([]byte, 4096)
		steps := []struct {
			name string
			do   func() error
			want int64 // fsyncs
		}{
			{"write", func() error { return d.WriteAt(t.Context(), p, 0, 0) }, 0},
			{"FUA write", func() error { return d.WriteAt(t.Context(), p, 0, backing.FUA) }, 1},
			{"flush", func() error { return d.Flush(t.Context()) }, 1},
			{"unaligned FUA write", func() error { return d.WriteAt(t.Context(), p[:10], 100, backing.FUA) }, 1},
		}
		for _, s := range steps {
			before := b.fsyncs.Load()
			if err := s.do(); err != nil {
				t.Errorf("%s: %v", s.name, err)
			}
			if got := b.fsyncs.Load() - before; got != s.want {
				t.Errorf("%s: got %d fsyncs, want %d", s.name, got, s.want)
			}
		}
	})
}

// TestFsyncErrorIsSticky: the file system reports it once and is well again.
func TestFsyncErrorIsSticky(t *testing.T) {
	forKinds(t, func(t *testing.T, k kind) {
		for name, do := range map[string]func(*raw.Device) error{
			"flush":     func(d *raw.Device) error { return d.Flush(t.Context()) },
			"FUA write": func(d *raw.Device) error { return d.WriteAt(t.Context(), make([]byte, 512), 0, backing.FUA) },
		} {
			d, b := newBadDisk(t, k, 1<<20, 0)
			fill(t, d, 1)
			b.set(func(op string, _, n int64) (int64, syscall.Errno) {
				if op == "fsync" {
					return 0, syscall.EIO
				}
				return n, 0
			})
			if err := do(d); !errors.Is(err, backing.ErrIO) {
				t.Errorf("%s: got %v, want %v", name, err, backing.ErrIO)
			}
			b.verdict.Store(nil)
			wantPoisoned(t, d)
		}
	})
}

// looked is a context that tells who has seen that it has not ended.
type looked struct {
	context.Context
	at chan bool
}

func (l looked) Err() error {
	err := l.Context.Err()
	if err == nil {
		l.at <- true
	}
	return err
}

// TestFileThatDoesNotAnswerHoldsFewWhoAskForExtents: the others leave when they are
// not waited for any more, and there is an answer for who comes when the file has one.
func TestFileThatDoesNotAnswerHoldsFewWhoAskForExtents(t *testing.T) {
	const size, many = 1 << 20, 4 * limits.ExtentSeeks
	d, b := newBadDisk(t, kind{"pool", false}, size, 0)
	answer := make(chan bool)
	b.set(func(op string, _, n int64) (int64, syscall.Errno) {
		if op == "lseek" {
			<-answer
		}
		return n, 0
	})
	ending, cancel := context.WithCancel(t.Context())
	ctx := looked{ending, make(chan bool, many)}
	left := make(chan error, many)
	for range many {
		go func() {
			left <- d.Extents(ctx, 0, size, 0, func(backing.Extent) bool { return true })
		}()
	}
	for range many {
		<-ctx.at
	}
	cancel()
	late := time.After(time.Minute)
	for i := range many - limits.ExtentSeeks {
		select {
		case err := <-left:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("who waited got %v, want %v", err, context.Canceled)
			}
		case <-late:
			t.Errorf("%d of %d have left a file that hangs, want %d", i, many, many-limits.ExtentSeeks)
			close(answer)
			return
		}
	}
	close(answer)
	for range limits.ExtentSeeks {
		if err := <-left; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("who had asked got %v", err)
		}
	}
	var data int64
	err := d.Extents(t.Context(), 0, size, 0, func(x backing.Extent) bool {
		if !x.Hole {
			data += x.Len
		}
		return true
	})
	if err != nil || data != size {
		t.Errorf("after the file has answered: %d bytes of data, %v, want %d", data, err, size)
	}
}

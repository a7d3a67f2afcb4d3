package enginetest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// unsupported tells the errors of a filesystem that lacks an operation.
func unsupported(err error) bool {
	return errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS)
}

func errorsAreTheKernelsNumbers(e *env) {
	f := e.create(make([]byte, 4*blockBytes))
	ro := e.open(f.OS.Name(), os.O_RDONLY)
	wo := e.open(f.OS.Name(), os.O_WRONLY)
	buf := e.buf(blockBytes)
	for _, tt := range []struct {
		name string
		io   engine.IO
		want syscall.Errno
	}{
		{"write to a read-only file", engine.IO{Op: engine.OpWrite, File: ro, Buf: buf}, syscall.EBADF},
		{"punch in a read-only file", engine.IO{Op: engine.OpPunch, File: ro, Len: blockBytes}, syscall.EBADF},
		{"read from a write-only file", engine.IO{Op: engine.OpRead, File: wo, Buf: buf}, syscall.EBADF},
		{"read at -1", engine.IO{Op: engine.OpRead, File: f, Buf: buf, Off: -1}, syscall.EINVAL},
		{"write at -1", engine.IO{Op: engine.OpWrite, File: f, Buf: buf, Off: -1}, syscall.EINVAL},
		{"read below -1", engine.IO{Op: engine.OpRead, File: f, Buf: buf, Off: -blockBytes}, syscall.EINVAL},
		{"punch nothing", engine.IO{Op: engine.OpPunch, File: f}, syscall.EINVAL},
		{"zero less than nothing", engine.IO{Op: engine.OpZero, File: f, Len: -blockBytes}, syscall.EINVAL},
	} {
		io := tt.io
		if err := engine.Do(e.Context(), e.eng, &io); err != tt.want {
			e.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
		if io.N != 0 {
			e.Errorf("%s: %d bytes moved", tt.name, io.N)
		}
	}
}

func fullFilesystemIsENOSPC(e *env) {
	dir := filepath.Join(e.TempDir(), "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		e.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); errors.Is(err, syscall.EPERM) {
		e.Skip("no right to mount a tmpfs")
	} else if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		e.closeEngine()
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			e.Errorf("unmount: %v", err)
		}
	})
	if e.direct && !supportsDirect(e.T, dir) {
		e.Skip("tmpfs has no O_DIRECT before Linux 6.6")
	}
	p := filepath.Join(dir, "disk")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		e.Fatal(err)
	}
	f := e.open(p, os.O_RDWR)
	io := &engine.IO{Op: engine.OpWrite, File: f, Buf: e.buf(1 << 20)}
	err := engine.Do(e.Context(), e.eng, io)
	if err != syscall.ENOSPC || io.N > 64<<10 {
		e.Errorf("1 MiB onto 64 KiB: %d bytes, %v, want ENOSPC", io.N, err)
	}
}

func oneFailureLeavesTheRest(e *env) {
	f := e.create(pattern(16*blockBytes, 8))
	ro := e.open(f.OS.Name(), os.O_RDONLY)
	buf := e.buf(16 * blockBytes)
	var batch []*engine.IO
	for i := range 16 {
		io := &engine.IO{Op: engine.OpRead, File: f, Off: int64(i * blockBytes), Buf: buf[i*blockBytes:][:blockBytes]}
		if i%5 == 2 {
			io.Op, io.File = engine.OpWrite, ro
		}
		batch = append(batch, io)
	}
	if err := engine.Do(e.Context(), e.eng, batch...); err != syscall.EBADF {
		e.Errorf("batch: %v, want the first error", err)
	}
	for i, io := range batch {
		if (io.Err != nil) != (i%5 == 2) || io.Err == nil && io.N != blockBytes {
			e.Errorf("transfer %d: %d bytes, %v", i, io.N, io.Err)
		}
	}
}

// submitFromDone runs more chains than any engine has workers, each link
// submitted by the end of the one before.
func submitFromDone(e *env) {
	const chains, links = 64, 50
	f := e.create(make([]byte, blockBytes))
	var g group
	var ended atomic.Int32
	g.Add(chains)
	for range chains {
		left := links
		io := &engine.IO{Op: engine.OpRead, File: f, Buf: e.buf(blockBytes)}
		batch := []*engine.IO{io}
		io.Done = func(io *engine.IO) {
			ended.Add(1)
			if left--; left == 0 || io.Err != nil {
				g.done(io)
				return
			}
			e.eng.Submit(batch)
		}
		e.eng.Submit(batch)
	}
	g.Wait()
	if got := ended.Load(); got != chains*links {
		e.Errorf("%d transfers ended, want %d", got, chains*links)
	}
}

func closeWaitsForEverything(e *env) {
	const n = 600
	f := e.create(make([]byte, n*blockBytes))
	buf := e.buf(n * blockBytes)
	var ended atomic.Int32
	batch := make([]*engine.IO, n)
	for i := range batch {
		batch[i] = &engine.IO{Op: engine.OpWrite, File: f, Off: int64(i * blockBytes),
			Buf: buf[i*blockBytes:][:blockBytes], Done: func(*engine.IO) { ended.Add(1) }}
	}
	e.eng.Submit(batch)
	e.closeEngine()
	if got := ended.Load(); got != n {
		e.Errorf("Close returned after %d of %d", got, n)
	}
	for i, io := range batch {
		if io.Err != nil || io.N != blockBytes {
			e.Errorf("write %d: %d bytes, %v", i, io.N, io.Err)
		}
	}
}

// bufferBelongsToTheCallerAfterDone scribbles over every buffer as soon as
// its read is done and looks for late writes of the engine.
func bufferBelongsToTheCallerAfterDone(e *env) {
	const n, rounds = 32, 20
	f := e.create(pattern(n*blockBytes, 9))
	buf := e.buf(n * blockBytes)
	canary := bytes.Repeat([]byte{0xA5}, n*blockBytes)
	for range rounds {
		var g group
		g.Add(n)
		batch := make([]*engine.IO, n)
		for i := range batch {
			batch[i] = &engine.IO{Op: engine.OpRead, File: f, Off: int64(i * blockBytes),
				Buf: buf[i*blockBytes:][:blockBytes], Done: func(io *engine.IO) {
					copy(io.Buf, canary)
					g.done(io)
				}}
		}
		e.eng.Submit(batch)
		g.Wait()
		if !bytes.Equal(buf, canary) {
			e.Fatal("a buffer was written to after Done")
		}
	}
	e.closeEngine()
	if !bytes.Equal(buf, canary) {
		e.Fatal("a buffer was written to after Done, before Close returned")
	}
}

// transferStaysInsideItsBuffer reads into every second block of a buffer, and
// across the end of the file.
func transferStaysInsideItsBuffer(e *env) {
	const n = 16
	f := e.create(pattern(n*blockBytes+100, 10))
	buf := e.buf((2*n + 3) * blockBytes)
	for i := range buf {
		buf[i] = 0xA5
	}
	want := bytes.Clone(buf)
	var batch []*engine.IO
	for i := range n + 1 {
		at := (2*i + 1) * blockBytes
		batch = append(batch, &engine.IO{Op: engine.OpRead, File: f, Off: int64(i * blockBytes), Buf: buf[at:][:blockBytes]})
		copy(want[at:][:blockBytes], e.contents(f)[i*blockBytes:])
	}
	e.do(batch...)
	tail := batch[n]
	if tail.N != 100 {
		e.Errorf("last read moved %d bytes, want 100", tail.N)
	}
	// A direct read may use all of its own buffer past the end of the file.
	clear(tail.Buf[tail.N:])
	clear(want[(2*n+1)*blockBytes+100:][:blockBytes-100])
	if !bytes.Equal(buf, want) {
		e.Error("bytes outside the buffers were written to")
	}
}

// readNowAnswersFromThePageCache takes 0 for an answer where the filesystem
// has no RWF_NOWAIT, then from every read.
func readNowAnswersFromThePageCache(e *env) {
	data := pattern(4*blockBytes+1000, 11)
	f := e.create(data) // written a moment ago: in the page cache
	never := e.direct || e.eng.ReadNow(f, make([]byte, 1), 0) == 0
	for _, tt := range []struct{ off, n, want int }{
		{0, blockBytes, blockBytes},
		{100, 4 * blockBytes, 4 * blockBytes},
		{4 * blockBytes, blockBytes, 1000},
		{100 * blockBytes, blockBytes, 0},
		{0, 0, 0},
	} {
		buf := make([]byte, tt.n)
		want := tt.want
		if never {
			want = 0
		}
		got := e.eng.ReadNow(f, buf, int64(tt.off))
		if got != want {
			e.Errorf("ReadNow of %d at %d = %d, want %d", tt.n, tt.off, got, want)
		} else if !bytes.Equal(buf[:got], data[min(tt.off, len(data)):][:got]) {
			e.Errorf("ReadNow of %d at %d gave other bytes", tt.n, tt.off)
		}
	}
}

func writeNowWritesToThePageCache(e *env) {
	f := e.create(make([]byte, 4*blockBytes))
	data := pattern(2*blockBytes, 13)
	want := len(data)
	if e.direct {
		want = 0
	}
	if got, err := e.eng.WriteNow(f, data, blockBytes); got != want || err != nil {
		e.Errorf("WriteNow of %d bytes = %d, %v, want %d", len(data), got, err, want)
	} else if now := e.contents(f); !bytes.Equal(now[blockBytes:][:want], data[:want]) || len(now) != 4*blockBytes {
		e.Error("WriteNow wrote other bytes")
	}
	refused := e.open(e.path(), unix.O_RDONLY|unix.O_CREAT)
	got, err := e.eng.WriteNow(refused, data, 0)
	if got != 0 || !e.direct && !errors.Is(err, syscall.EBADF) {
		e.Errorf("WriteNow to a file that is open for reading = %d, %v, want 0, %v", got, err, syscall.EBADF)
	}
}

func readNowDoesNotAllocate(e *env) {
	f := e.create(make([]byte, 16*blockBytes))
	buf := make([]byte, blockBytes)
	avg := testing.AllocsPerRun(100, func() { e.eng.ReadNow(f, buf, blockBytes) })
	if avg != 0 {
		e.Errorf("ReadNow allocates %v times", avg)
	}
}

func submitDoesNotAllocate(e *env) {
	const n = 8
	f := e.create(make([]byte, n*blockBytes))
	buf := e.buf(n * blockBytes)
	var g group
	done := g.done
	batch := make([]*engine.IO, n)
	for i := range batch {
		batch[i] = &engine.IO{Op: engine.Op(i % 2), File: f, Off: int64(i * blockBytes),
			Buf: buf[i*blockBytes:][:blockBytes], Done: done}
	}
	round := func() {
		g.Add(n)
		e.eng.Submit(batch)
		g.Wait()
	}
	for range 20 {
		round() // until every worker is started
	}
	if avg := testing.AllocsPerRun(100, round); avg != 0 {
		e.Errorf("a batch of %d allocates %v times", n, avg)
	}
}

func onlyFilesAndBlockDevicesAreOpened(e *env) {
	r, w, err := os.Pipe()
	if err != nil {
		e.Fatal(err)
	}
	defer w.Close()
	d, err := os.Open(e.dir)
	if err != nil {
		e.Fatal(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		e.Fatal(err)
	}
	for _, f := range []*os.File{r, d, null} {
		if _, err := e.eng.Open(f); err == nil {
			e.Errorf("engine opened %q", f.Name())
		}
		if err := f.Close(); err != nil {
			e.Errorf("refused file %q is not the caller's any more: %v", f.Name(), err)
		}
	}
}

// filesComeAndGo opens, uses and closes files while another one is busy: a
// closed file's place must not serve the next one's transfers.
func filesComeAndGo(e *env) {
	busy := e.create(pattern(64*blockBytes, 12))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	want := e.contents(busy)
	buf := e.buf(len(want))
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			clear(buf)
			io := &engine.IO{Op: engine.OpRead, File: busy, Buf: buf}
			if err := engine.Do(e.Context(), e.eng, io); err != nil || !bytes.Equal(buf, want) {
				e.Errorf("busy file: %d bytes, %v", io.N, err)
				return
			}
		}
	})
	other := e.buf(blockBytes)
	for i := range 40 {
		data := pattern(blockBytes, byte(i))
		p := e.path()
		if err := os.WriteFile(p, data, 0o600); err != nil {
			e.Fatal(err)
		}
		f := e.openFile(p, os.O_RDWR)
		e.do(&engine.IO{Op: engine.OpRead, File: f, Buf: other})
		if !bytes.Equal(other, data) {
			e.Errorf("file %d: another file's bytes", i)
		}
		if err := f.Close(); err != nil {
			e.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

// closedFileIsNotTheNextOne opens a file in the place of one that was closed,
// and makes every call on the closed one: what has its number now, or its place
// in a table, is not what the caller means. So is closing it again.
func closedFileIsNotTheNextOne(e *env) {
	gone := e.openFile(e.create(pattern(blockBytes, 14)).OS.Name(), os.O_RDWR)
	if err := gone.Close(); err != nil {
		e.Fatal(err)
	}
	data := pattern(4*blockBytes, 15)
	next := e.create(data)
	for _, op := range []engine.Op{engine.OpRead, engine.OpWrite, engine.OpSync, engine.OpPunch, engine.OpZero} {
		io := &engine.IO{Op: op, File: gone, Buf: e.buf(blockBytes), Len: blockBytes}
		if err := engine.Do(e.Context(), e.eng, io); !errors.Is(err, syscall.EBADF) || io.N != 0 {
			e.Errorf("%v of a closed file: %d bytes, %v, want %v", op, io.N, err, syscall.EBADF)
		}
	}
	buf := make([]byte, blockBytes)
	if n := e.eng.ReadNow(gone, buf, 0); n != 0 {
		e.Errorf("ReadNow of a closed file = %d, want 0", n)
	}
	if n, _ := e.eng.WriteNow(gone, buf, 0); n != 0 {
		e.Errorf("WriteNow to a closed file = %d, want 0", n)
	}
	if gone.Cached(0, blockBytes) {
		e.Error("the page cache has a closed file")
	}
	if err := gone.Close(); err != nil {
		e.Errorf("closing a closed file: %v", err)
	}
	io := &engine.IO{Op: engine.OpRead, File: next, Buf: e.buf(len(data))}
	e.do(io)
	if !bytes.Equal(io.Buf, data) || !bytes.Equal(e.contents(next), data) {
		e.Error("the next file has other bytes")
	}
}

package uring

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/enginetest"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// mustNew is an engine with the given sizes, or the end of the test where
// the host has no io_uring.
func mustNew(t testing.TB, o Options, profile int, entries, files uint32) *Engine {
	t.Helper()
	e, err := newEngine(o, profile, entries, files)
	if err != nil {
		t.Skipf("no io_uring: %v", err)
	}
	return e
}

func TestRingPassesTheSuite(t *testing.T) {
	enginetest.Run(t, t.TempDir(), func(t *testing.T, bufs *bufpool.Pool) engine.Engine {
		return mustNew(t, Options{Buffers: bufs}, 0, limits.RingEntries, limits.RingFiles)
	})
}

func TestRingPassesTheSuiteOnTmpfs(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "uring")
	if err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	defer os.RemoveAll(dir)
	enginetest.Run(t, dir, func(t *testing.T, bufs *bufpool.Pool) engine.Engine {
		return mustNew(t, Options{Buffers: bufs}, 0, limits.RingEntries, limits.RingFiles)
	})
}

// The profiles of older kernels work on a newer one, and a ring of four
// entries runs full all the time.
func TestSmallRingsOfEveryProfilePassTheSuite(t *testing.T) {
	for p, flags := range profiles {
		t.Run(fmt.Sprintf("%#x", flags), func(t *testing.T) {
			enginetest.Run(t, t.TempDir(), func(t *testing.T, bufs *bufpool.Pool) engine.Engine {
				return mustNew(t, Options{}, p, 4, 2)
			})
		})
	}
}

func TestFileThatHangsHoldsUpNoOther(t *testing.T) {
	enginetest.RunSilent(t, t.TempDir(), func(t *testing.T, bufs *bufpool.Pool) engine.Engine {
		return mustNew(t, Options{Buffers: bufs}, 0, limits.RingEntries, limits.RingFiles)
	})
}

// tempFile is a new file of n bytes, opened with the flags.
func tempFile(t testing.TB, n, flags int) *os.File {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(p, bytes.Repeat([]byte{0x5C}, n), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(p, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFilesBeyondTheTableWork(t *testing.T) {
	e := mustNew(t, Options{}, 0, 8, 2)
	defer e.Close()
	var files []*engine.File
	for i := range 4 {
		f, err := e.Open(tempFile(t, 4096, os.O_RDWR))
		if err != nil {
			t.Fatal(err)
		}
		if inTable := f.Index() >= 0; inTable != (i < 2) {
			t.Errorf("file %d has index %d", i, f.Index())
		}
		files = append(files, f)
	}
	var batch []*engine.IO
	for i, f := range files {
		batch = append(batch, &engine.IO{Op: engine.Op(i % 2), File: f, Buf: make([]byte, 4096)})
	}
	if err := engine.Do(t.Context(), e, batch...); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	f, err := e.Open(tempFile(t, 4096, os.O_RDWR))
	if err != nil || f.Index() < 0 {
		t.Errorf("after all were closed a file has index %d, %v", f.Index(), err)
	}
	f.Close()
}

// Waits for the lock: old kernels let go of the file a little later.
func TestClosingAFileGivesUpItsLocks(t *testing.T) {
	e := mustNew(t, Options{}, 0, 8, 8)
	defer e.Close()
	osf := tempFile(t, 4096, os.O_RDWR)
	name := osf.Name()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: 100, Len: 1}
	if err := unix.FcntlFlock(osf.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	f, err := e.Open(osf)
	if err != nil {
		t.Fatal(err)
	}
	if err := engine.Do(t.Context(), e, &engine.IO{File: f, Buf: make([]byte, 4096)}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLKW, &lock); err != nil {
		t.Errorf("lock after Close: %v", err)
	}
}

func TestClosingTheEngineFirstLeavesFilesClosable(t *testing.T) {
	e := mustNew(t, Options{}, 0, 8, 8)
	f, err := e.Open(tempFile(t, 4096, os.O_RDWR))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestNothingIsInFlightAfterClose(t *testing.T) {
	for p := range profiles {
		e := mustNew(t, Options{}, p, 8, 8)
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		if e.issuer.armed || e.issuer.wakes == 0 {
			t.Errorf("profile %d: the ring still reads into the engine's memory", p)
		}
	}
}

func TestLateWakeDoesNotTouchAReusedDescriptor(t *testing.T) {
	e := mustNew(t, Options{}, 0, 8, 8)
	old := e.wakeFD
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	// The lowest free number is given out first: a few tries reach it.
	for fd := -1; fd < old; {
		var err error
		if fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		e.asleep.Store(true)
		e.wake()
		if _, err := unix.Read(fd, make([]byte, 8)); err != unix.EAGAIN {
			t.Fatalf("wake after Close wrote to descriptor %d, the engine's was %d: %v", fd, old, err)
		}
	}
}

func TestArenaIsRegisteredWithTheFirstDirectFile(t *testing.T) {
	bufs := bufpool.New(64 << 20)
	defer bufs.Close()
	e := mustNew(t, Options{Buffers: bufs}, 0, 8, 8)
	defer e.Close()
	for _, tt := range []struct {
		flags int
		fixed bool
	}{{os.O_RDWR, false}, {os.O_RDWR | unix.O_DIRECT, true}, {os.O_RDWR, true}} {
		f, err := e.Open(tempFile(t, 8192, tt.flags))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if e.issuer.fixed != tt.fixed {
			t.Errorf("after opening with flags %#x the arena is registered: %v, want %v",
				tt.flags, e.issuer.fixed, tt.fixed)
		}
	}
}

func TestFixedOpcodeIsForTheArenaOfADirectFile(t *testing.T) {
	bufs := bufpool.New(64 << 20)
	defer bufs.Close()
	arena := bufs.Arena()
	beyond := arena[len(arena)-8192:] // stands for what is mapped behind the arena
	arena = arena[:len(arena)-8192]
	s := newIssuer(&Engine{arena: arena}, &ring{cqes: make([]cqe, 8)})
	for _, tt := range []struct {
		name                 string
		p                    []byte
		direct, fixed, wants bool
	}{
		{"whole arena", arena, true, true, true},
		{"last page", arena[len(arena)-4096:], true, true, true},
		{"buffered file", arena[:4096], false, true, false},
		{"not registered", arena[:4096], true, false, false},
		{"across the end", bufs.Arena()[len(arena)-4096:], true, true, false},
		{"behind the end", beyond, true, true, false},
		{"elsewhere", make([]byte, 4096), true, true, false},
		{"nothing", nil, true, true, false},
	} {
		s.fixed = tt.fixed
		var q sqe
		op := s.buffer(&q, tt.p, tt.direct, opRead, opReadFixed)
		if (op == opReadFixed) != tt.wants || int(q.len) != len(tt.p) {
			t.Errorf("%s: opcode %d, length %d", tt.name, op, q.len)
		}
	}
}

// A transfer in the registered arena must move bytes between the file and the
// pages that the process sees.
func TestRegisteredBuffersCarryTheData(t *testing.T) {
	bufs := bufpool.New(64 << 20)
	defer bufs.Close()
	var log bytes.Buffer
	e := mustNew(t, Options{Buffers: bufs, Log: slog.New(slog.NewTextHandler(&log, nil))}, 0, 64, 8)
	defer e.Close()
	f, err := e.Open(tempFile(t, 1<<20, os.O_RDWR|unix.O_DIRECT))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 64 {
		b := bufs.TryGet(4096 << (i % 5))
		p := b.Bytes()
		for j := range p {
			p[j] = byte(i + j)
		}
		want := bytes.Clone(p)
		w := &engine.IO{Op: engine.OpWrite, File: f, Buf: p, Off: int64(i) * 4096}
		if err := engine.Do(t.Context(), e, w); err != nil {
			t.Fatal(err)
		}
		clear(p)
		r := &engine.IO{Op: engine.OpRead, File: f, Buf: p, Off: w.Off}
		if err := engine.Do(t.Context(), e, r); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want) {
			t.Fatalf("transfer %d of %d bytes came back otherwise", i, len(p))
		}
		b.Release()
	}
	if !e.issuer.fixed || log.Len() != 0 {
		t.Errorf("arena registered: %v, log %q", e.issuer.fixed, log.String())
	}
}

func TestCompletionOfAnEarlierTransferIsNotTaken(t *testing.T) {
	s := newIssuer(&Engine{}, &ring{cqes: make([]cqe, 8)})
	s.slots[3].t.Start(&engine.IO{Op: engine.OpSync, Done: func(*engine.IO) { t.Error("Done called") }})
	s.slots[3].gen = 7
	for _, data := range []uint64{6<<32 | 3, 7<<32 | 2} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("completion %#x was taken", data)
				}
			}()
			s.finish(cqe{userData: data})
		}()
	}
}

// TestCallThatTheKernelCancelsIsMadeAgain: it was not made, so that nothing is lost.
// Were it for ever, the transfer fails as for want of threads.
func TestCallThatTheKernelCancelsIsMadeAgain(t *testing.T) {
	s := newIssuer(&Engine{}, &ring{cqes: make([]cqe, 8)})
	var got []error
	start := func() {
		t.Helper()
		file := new(engine.File)
		s.backlog.Push(&engine.IO{Op: engine.OpSync, File: file, Done: func(x *engine.IO) { got = append(got, x.Err) }})
		s.slots[3].t.Start(s.backlog.Pop())
	}
	canceled := cqe{userData: 3, res: -int32(syscall.ECANCELED)}
	start()
	s.finish(canceled)
	if len(got) > 0 || !slices.Equal(s.again, []uint32{3}) {
		t.Fatalf("canceled: done with %v, to be made again %v, want the call of slot 3", got, s.again)
	}
	s.finish(cqe{userData: 3})
	if len(got) != 1 || got[0] != nil {
		t.Fatalf("made again: done with %v, want success", got)
	}
	start()
	canceled.userData |= uint64(s.slots[3].gen) << 32
	for range limits.IORetries + 1 {
		s.finish(canceled)
	}
	if len(got) != 2 || got[1] != syscall.EAGAIN {
		t.Errorf("canceled for ever: done with %v, want %v", got, syscall.EAGAIN)
	}
}

// Package uring is the engine on a Linux io_uring.
//
// One locked thread, the issuer, owns the ring: it takes what Submit queued,
// hands it to the kernel and waits for completions with one system call, and
// calls Done. Everybody else only appends to its queue and, if it sleeps,
// wakes it through an eventfd that the ring reads.
//
// The ring is restricted to the opcodes in use and to files in its table, so
// that a worker taken over by a hostile guest gains nothing from it. What
// cannot go through the ring, files of other hosts, which may stop the issuer,
// and files beyond the table, goes to an engine.Pool.
package uring

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Options say what an engine works with. The zero value is usable.
type Options struct {
	// Buffers is the pool whose arena is registered with the ring when the
	// first direct file is opened. It must be closed after the engine. Nil
	// means that no buffers are registered.
	Buffers *bufpool.Pool

	// Log receives one line when the arena cannot be registered. Nil means
	// slog.Default.
	Log *slog.Logger
}

// Engine is safe for concurrent use.
type Engine struct {
	log    *slog.Logger
	arena  []byte
	pool   *engine.Pool // for files that are not in the table
	issuer *issuer
	table  int           // places in the ring's file table
	ended  chan struct{} // closed when the issuer has left

	asleep atomic.Bool // the issuer waits, or is about to, and nobody woke it yet

	wakeMu sync.Mutex
	wakeFD int // guarded by wakeMu after New; -1 after Close

	mu       sync.Mutex
	queue    list       // guarded by mu; submitted, not yet seen by the issuer
	controls []*control // guarded by mu
	closing  bool       // guarded by mu
	free     []int32    // guarded by mu; places in the file table
	pinning  bool       // guarded by mu; registration of the arena was tried
}

// control is work for the issuer's thread, the only one that may change the
// ring's tables.
type control struct {
	do   func(*ring) syscall.Errno
	done chan syscall.Errno
}

// list is a queue of IOs linked by Next.
type list struct{ head, tail *engine.IO }

func (l *list) append(o list) {
	if o.head == nil {
		return
	}
	if l.tail == nil {
		l.head = o.head
	} else {
		l.tail.Next = o.head
	}
	l.tail = o.tail
}

// New makes an engine, or tells why this kernel, or what confines the
// process, does not let it.
func New(o Options) (*Engine, error) { return newEngine(o, 0, limits.RingEntries, limits.RingFiles) }

// newEngine is New with the first profile to try, and the sizes of the
// queue and of the file table.
func newEngine(o Options, profile int, entries, files uint32) (*Engine, error) {
	e := &Engine{log: o.Log, pool: engine.NewPool(limits.RemoteWorkers), ended: make(chan struct{})}
	if e.log == nil {
		e.log = slog.Default()
	}
	if o.Buffers != nil {
		e.arena = o.Buffers.Arena()
	}
	// A table larger than RLIMIT_NOFILE is refused.
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		files = uint32(min(uint64(files), lim.Cur-1))
	}
	for i := int32(files); i > wakeFile; i-- {
		e.free = append(e.free, i)
	}
	var err error
	// Blocking, or the ring would not wait for it to become readable.
	if e.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	ready := make(chan error)
	e.table = int(files) + 1
	go e.run(ready, profile, entries)
	if err := <-ready; err != nil {
		unix.Close(e.wakeFD)
		return nil, explain(err)
	}
	return e, nil
}

// run is the issuer's goroutine. It ends with its thread locked, which ends
// the thread and the kernel's worker threads that belong to it.
func (e *Engine) run(ready chan<- error, profile int, entries uint32) {
	runtime.LockOSThread()
	r, err := newRing(entries, profile)
	if err == nil {
		r.registerSelf()
		if err = r.prepare(e.table, e.wakeFD); err != nil {
			r.close()
		}
	}
	if err != nil {
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	e.issuer = newIssuer(e, r)
	ready <- nil
	e.issuer.loop()
	r.close()
	close(e.ended)
}

// explain adds the likely cause to an error of New.
func explain(err error) error {
	hint := ""
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		hint = "a seccomp filter or security module forbids it"
		if b, e := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); e == nil {
			if v := strings.TrimSpace(string(b)); v != "0" {
				hint = "sysctl kernel.io_uring_disabled is " + v
			}
		}
	case errors.Is(err, syscall.ENOSYS):
		hint = "the kernel is older than 5.13 or built without it, or a seccomp filter hides it"
	case errors.Is(err, syscall.EINVAL):
		hint = "the kernel is older than 5.13"
	case errors.Is(err, syscall.ENOMEM):
		hint = "RLIMIT_MEMLOCK is too low"
	default:
		return err
	}
	return fmt.Errorf("%w (%s)", err, hint)
}

// Name is "uring".
func (e *Engine) Name() string { return "uring" }

// Open takes over f and puts it into the ring's file table. When the table is
// full, or the file is engine.Remote, it works all the same, on the pool. On error f
// stays the caller's. Open and File.Close wait for the issuer: not from Done.
func (e *Engine) Open(f *os.File) (*engine.File, error) {
	direct, align, err := engine.Describe(f)
	if err != nil {
		return nil, err
	}
	if engine.Remote(f) {
		return engine.NewFile(f, direct, align, engine.NoFile, nil), nil
	}
	return e.enrol(f, direct, align), nil
}

// enrol puts f into the ring's file table, if there is a place.
func (e *Engine) enrol(f *os.File, direct bool, align int) *engine.File {
	index := e.place()
	if index >= 0 {
		errno := e.control(func(r *ring) syscall.Errno {
			return r.updateFiles(int(index), []int32{int32(f.Fd())})
		})
		if errno != 0 {
			e.vacate(index)
			index = -1
		}
	}
	if index < 0 {
		return engine.NewFile(f, direct, align, engine.NoFile, nil)
	}
	if direct {
		e.pinArena()
	}
	return engine.NewFile(f, direct, align, index, func() error { return e.forget(index) })
}

// forget empties a place of the file table: only then does closing the file
// close it. Before Linux 6.13 that waits for the older transfers of all files,
// and before 6.4 takes up to a second more.
func (e *Engine) forget(index int32) error {
	errno := e.control(func(r *ring) syscall.Errno { return r.updateFiles(int(index), []int32{-1}) })
	if errno == syscall.ECANCELED {
		return nil // the ring is gone, and its table with it
	}
	if errno != 0 {
		return fmt.Errorf("io_uring: unregister file: %w", errno)
	}
	e.vacate(index)
	return nil
}

// place takes a free place in the file table, or -1.
func (e *Engine) place() int32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.free)
	if n == 0 {
		return -1
	}
	index := e.free[n-1]
	e.free = e.free[:n-1]
	return index
}

func (e *Engine) vacate(index int32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.free = append(e.free, index)
}

// pinArena registers the buffer arena, once. It waits for the first direct
// file because registering takes the memory at once and for good.
func (e *Engine) pinArena() {
	e.mu.Lock()
	again := e.pinning
	e.pinning = true
	e.mu.Unlock()
	if again || e.arena == nil {
		return
	}
	errno := e.control(func(r *ring) syscall.Errno {
		errno := r.updateBuffer(e.arena)
		e.issuer.fixed = errno == 0
		return errno
	})
	if errno != 0 {
		e.log.Warn("direct I/O works without registered buffers",
			"error", errno, "bytes", len(e.arena), "hint", "RLIMIT_MEMLOCK bounds them")
	}
}

// control has do run on the issuer's thread and waits for it. ECANCELED says
// that the engine is closed.
func (e *Engine) control(do func(*ring) syscall.Errno) syscall.Errno {
	c := &control{do: do, done: make(chan syscall.Errno, 1)}
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		return syscall.ECANCELED
	}
	e.controls = append(e.controls, c)
	e.mu.Unlock()
	e.wake()
	return <-c.done
}

// ReadNow fills p from the page cache.
func (e *Engine) ReadNow(f *engine.File, p []byte, off int64) int {
	return engine.ReadCached(f, p, off)
}

// WriteNow writes p to the page cache. On file systems that cannot promise not
// to wait, as ext4, the ring would have a thread of the kernel do the same.
func (e *Engine) WriteNow(f *engine.File, p []byte, off int64) (int, error) {
	return e.pool.WriteNow(f, p, off)
}

// Submit queues the batch. It never waits and may be called from Done.
func (e *Engine) Submit(batch []*engine.IO) {
	var l list
	for i, io := range batch {
		if io.File.Index() < 0 {
			e.pool.Submit(batch[i : i+1])
			continue
		}
		io.Next = nil
		l.append(list{io, io})
	}
	if l.head == nil {
		return
	}
	e.mu.Lock()
	e.queue.append(l)
	e.mu.Unlock()
	e.wake()
}

// wake gets the issuer out of its wait, if it is in one.
func (e *Engine) wake() {
	if e.asleep.Load() && e.asleep.CompareAndSwap(true, false) {
		e.notify()
	}
}

// notify ends the ring's read of the eventfd. One that comes late finds the
// engine closed and must not write to whatever has the number now.
func (e *Engine) notify() {
	e.wakeMu.Lock()
	defer e.wakeMu.Unlock()
	if e.wakeFD >= 0 {
		writeEventfd(e.wakeFD)
	}
}

// Close waits for what is in flight and frees the ring. Files may be closed
// before or after it.
func (e *Engine) Close() error {
	e.mu.Lock()
	again := e.closing
	e.closing = true
	e.mu.Unlock()
	e.wake()
	<-e.ended
	if again {
		return nil
	}
	e.wakeMu.Lock()
	fd := e.wakeFD
	e.wakeFD = -1
	e.wakeMu.Unlock()
	return errors.Join(e.pool.Close(), unix.Close(fd))
}

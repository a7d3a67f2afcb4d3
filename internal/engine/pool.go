package engine

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/sysio"
)

// Pool is the engine on plain system calls: a bounded set of goroutines,
// started as they are needed, takes transfers from a Queue.
type Pool struct {
	max     int
	inline  bool // Submit makes the last transfer of a batch itself
	workers sync.WaitGroup
	writers atomic.Int64 // calls of WriteNow

	mu      sync.Mutex
	wake    sync.Cond
	waiting *Queue // guarded by mu
	started int    // guarded by mu
	idle    int    // guarded by mu; waiting workers that nobody signalled yet
	closing bool   // guarded by mu
}

// NewPool makes a pool of at most workers goroutines; 0 or less means
// limits.PoolWorkers.
func NewPool(workers int) *Pool {
	if workers <= 0 {
		workers = limits.PoolWorkers
	}
	p := &Pool{max: workers, waiting: NewQueue(workers)}
	p.wake.L = &p.mu
	return p
}

// NewInlinePool is NewPool, but Submit makes the last transfer of a batch itself
// and returns when that is done: a single one costs no hand-over to a worker,
// and no wake-up. Done may be called within Submit then. It is for callers
// that have few transfers at a time, and nothing else to do meanwhile.
func NewInlinePool(workers int) *Pool {
	p := NewPool(workers)
	p.inline = true
	return p
}

// StartAll starts all workers now instead of as they are needed.
func (p *Pool) StartAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ; p.started < p.max && !p.closing; p.started++ {
		p.workers.Go(p.work)
	}
}

// Name is "pool".
func (p *Pool) Name() string { return "pool" }

// Open takes over f. On error f stays the caller's.
func (p *Pool) Open(f *os.File) (*File, error) {
	direct, align, err := Describe(f)
	if err != nil {
		return nil, err
	}
	return NewFile(f, direct, align, NoFile, nil), nil
}

// ReadNow fills p from the page cache.
func (p *Pool) ReadNow(f *File, b []byte, off int64) int { return ReadCached(f, b, off) }

// WriteNow writes p to the page cache.
func (p *Pool) WriteNow(f *File, b []byte, off int64) (int, error) {
	defer p.writers.Add(-1)
	if p.writers.Add(1) > limits.CachedWriters || f.Direct {
		return 0, nil
	}
	return f.WriteCached(b, off)
}

// Submit queues the batch. Unless the pool is inline it never waits. It may be
// called from Done.
func (p *Pool) Submit(batch []*IO) {
	if len(batch) == 0 {
		return
	}
	if p.inline {
		last := batch[len(batch)-1]
		p.queue(batch[:len(batch)-1])
		run(last)
		last.finish()
		return
	}
	p.queue(batch)
}

// queue leaves the batch to the workers.
func (p *Pool) queue(batch []*IO) {
	if len(batch) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, io := range batch {
		p.waiting.Push(io)
	}
	woken := min(p.idle, len(batch))
	p.idle -= woken
	for range woken {
		p.wake.Signal()
	}
	fresh := min(p.max-p.started, len(batch)-woken)
	p.started += fresh
	for range fresh {
		p.workers.Go(p.work)
	}
}

// Close waits until the queue is empty and every worker has returned.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closing = true
	p.wake.Broadcast()
	p.mu.Unlock()
	p.workers.Wait()
	return nil
}

// work lives until Close and runs one transfer after the other.
func (p *Pool) work() {
	for io := p.take(nil, 0); io != nil; {
		of, cost := io.flow, io.cost()
		run(io)
		io.finish()
		io = p.take(of, cost)
	}
}

// take ends the worker's last transfer, if there was one, and waits for
// another; nil says that the pool is closing.
func (p *Pool) take(of *flow, cost int64) *IO {
	p.mu.Lock()
	defer p.mu.Unlock()
	if of != nil {
		p.waiting.leave(of, cost)
	}
	io := p.waiting.Pop()
	for ; io == nil; io = p.waiting.Pop() {
		if p.closing && p.waiting.Waiting() == 0 {
			p.wake.Broadcast() // to those who waited for this
			return nil
		}
		p.idle++
		p.wake.Wait()
	}
	// What left, or did not come for long, may let more than one begin.
	if p.idle > 0 && p.waiting.Ready() {
		p.idle--
		p.wake.Signal()
	}
	return io
}

// run makes the calls of io until it is over.
func run(io *IO) {
	var t Transfer
	for more := t.Start(io); more; {
		n, e := syscallFor(io.File.FD(), t.Next())
		more = !t.Finish(n, e)
	}
}

// syscallFor makes the call c on fd.
func syscallFor(fd uintptr, c Call) (int, syscall.Errno) {
	switch c.Op {
	case OpRead:
		return sysio.Pread(fd, c.Buf, c.Off)
	case OpWrite:
		return sysio.Pwrite(fd, c.Buf, c.Off)
	case OpPunch:
		return 0, errno(unix.Fallocate(int(fd), PunchMode, c.Off, c.Len))
	case OpZero:
		return 0, errno(unix.Fallocate(int(fd), ZeroMode, c.Off, c.Len))
	}
	return 0, errno(unix.Fdatasync(int(fd)))
}

// Modes of fallocate(2) for OpPunch and OpZero. Neither moves the end of the
// file. On a block device they discard and write zeroes.
const (
	PunchMode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	ZeroMode  = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// errno is the number in an error of x/sys/unix, which returns nothing else.
func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if e, ok := err.(syscall.Errno); ok {
		return e
	}
	return syscall.EIO
}

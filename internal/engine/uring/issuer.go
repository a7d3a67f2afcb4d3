package uring

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// wakeData marks completions of the read of the eventfd.
const wakeData = ^uint64(0)

// maxCall bounds one call; longer buffers are continued as short transfers.
const maxCall = 1 << 30

// slot is the place of one transfer in flight. The ring carries its number
// and generation, never an address.
type slot struct {
	t   engine.Transfer
	gen uint32
}

// issuer is the state of the ring's thread, which alone uses it.
type issuer struct {
	e        *Engine
	r        *ring
	slots    []slot
	free     []uint32      // slots without a transfer
	again    []uint32      // slots whose transfer has another call to make
	backlog  *engine.Queue // taken from the queue, without a slot; what it lets go has one
	after    []engine.Flusher
	controls []*control
	armed    bool   // the eventfd is being read
	wakes    uint64 // what the read puts there
	fixed    bool   // the arena is registered
	lo, hi   uintptr
}

func newIssuer(e *Engine, r *ring) *issuer {
	// Every call in flight has room for its completion, and the eventfd too; and
	// a thread of the kernel, if it needs one.
	n := min(len(r.cqes)-1, limits.RingWorkers)
	s := &issuer{e: e, r: r, slots: make([]slot, n), free: make([]uint32, 0, n), again: make([]uint32, 0, n), backlog: engine.NewQueue(n)}
	for i := range n {
		s.free = append(s.free, uint32(n-1-i))
	}
	if e.arena != nil {
		s.lo = uintptr(unsafe.Pointer(unsafe.SliceData(e.arena)))
		s.hi = s.lo + uintptr(len(e.arena))
	}
	return s
}

// loop lives until Close and until everything submitted is over.
func (s *issuer) loop() {
	for {
		closing := s.gather()
		s.control()
		full := s.fill()
		if closing && s.idle() {
			s.leave()
			return
		}
		s.flush()
		s.enter(full)
		s.reap()
		s.flush()
	}
}

// gather takes over what was submitted and announces the coming sleep in the
// same critical section: whoever submits later sees it and wakes.
func (s *issuer) gather() (closing bool) {
	e := s.e
	e.mu.Lock()
	came := e.queue
	e.queue = list{}
	s.controls, e.controls = e.controls, s.controls[:0]
	e.asleep.Store(true)
	closing = e.closing
	e.mu.Unlock()
	for io := came.head; io != nil; {
		next := io.Next
		s.backlog.Push(io)
		io = next
	}
	return closing
}

// control changes the tables. The read of the eventfd then starts anew:
// before Linux 6.13 a file that left the table is kept open while any request
// older than that is in flight, and this one would be for ever.
func (s *issuer) control() {
	if len(s.controls) == 0 {
		return
	}
	for _, c := range s.controls {
		c.done <- c.do(s.r)
	}
	clear(s.controls)
	if s.armed {
		s.e.notify()
	}
}

// idle tells that nothing is left to do.
func (s *issuer) idle() bool {
	return s.backlog.Waiting() == 0 && len(s.free) == len(s.slots)
}

// fill queues a call for each transfer that has one to make, as far as there
// are slots and submissions. It reports whether submissions ran out, so that
// more could be queued right after the next enter.
func (s *issuer) fill() (full bool) {
	if !s.armed && !s.arm() {
		return true
	}
	for n := len(s.again); n > 0; n-- {
		if !s.queue(s.again[n-1]) {
			return true
		}
		s.again = s.again[:n-1]
	}
	for s.backlog.Waiting() > 0 {
		if s.r.queued() == uint32(len(s.r.sqes)) {
			return true
		}
		io := s.backlog.Pop()
		if io == nil {
			break
		}
		i := s.free[len(s.free)-1]
		sl := &s.slots[i]
		if !sl.t.Start(io) {
			sl.t.IO = nil
			s.done(io)
			continue
		}
		s.free = s.free[:len(s.free)-1]
		s.queue(i)
	}
	return false
}

// arm queues the read of the eventfd that ends when somebody wakes us.
func (s *issuer) arm() bool {
	q := s.r.next()
	if q == nil {
		return false
	}
	q.opcode, q.flags, q.fd = opRead, sqeFixedFile, wakeFile
	q.addr, q.len, q.userData = uint64(uintptr(unsafe.Pointer(&s.wakes))), 8, wakeData
	s.armed = true
	return true
}

// queue queues the next call of slot i, or reports that there is no room.
func (s *issuer) queue(i uint32) bool {
	q := s.r.next()
	if q == nil {
		return false
	}
	sl := &s.slots[i]
	file := sl.t.IO.File
	c := sl.t.Next()
	q.flags, q.fd = sqeFixedFile, file.Index()
	q.userData = uint64(sl.gen)<<32 | uint64(i)
	q.off = uint64(c.Off)
	switch c.Op {
	case engine.OpRead:
		q.opcode = s.buffer(q, c.Buf, file.Direct, opRead, opReadFixed)
	case engine.OpWrite:
		q.opcode = s.buffer(q, c.Buf, file.Direct, opWrite, opWriteFixed)
	case engine.OpSync:
		q.opcode, q.opFlags, q.off = opFsync, fsyncDatasync, 0
		if c.Off >= 0 && c.Len > 0 && c.Len <= math.MaxUint32 {
			q.off, q.len = uint64(c.Off), uint32(c.Len)
		}
	case engine.OpPunch:
		q.opcode, q.addr, q.len = opFallocate, uint64(c.Len), engine.PunchMode
	case engine.OpZero:
		q.opcode, q.addr, q.len = opFallocate, uint64(c.Len), engine.ZeroMode
	}
	return true
}

// buffer puts p into q and chooses between the plain opcode and the one for
// registered buffers, which saves pinning the pages for a direct transfer.
func (s *issuer) buffer(q *sqe, p []byte, direct bool, plain, fixed uint8) uint8 {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	n := min(len(p), maxCall)
	q.addr, q.len = uint64(at), uint32(n)
	if direct && s.fixed && n > 0 && at >= s.lo && at+uintptr(n) <= s.hi {
		return fixed
	}
	return plain
}

// enter submits and, unless there is more to do at once, waits.
func (s *issuer) enter(full bool) {
	wait := uintptr(1)
	if full || s.r.ready() > 0 {
		wait = 0
	}
	errno := s.r.enter(wait)
	s.e.asleep.Store(false)
	switch errno {
	case 0, syscall.EINTR:
	case syscall.EAGAIN, syscall.EBUSY, syscall.ENOMEM:
		// No memory for requests, or completions wait to be read.
		runtime.Gosched()
	default:
		panic(fmt.Sprintf("uring: io_uring_enter: %v", errno))
	}
}

// reap deals with all completions that are there.
func (s *issuer) reap() {
	r := s.r
	head, tail := *r.cqHead, atomic.LoadUint32(r.cqTail)
	for ; head != tail; head++ {
		c := r.cqes[head&r.cqMask]
		if c.userData == wakeData {
			s.woken(c.res)
			continue
		}
		s.finish(c)
	}
	atomic.StoreUint32(r.cqHead, head)
}

// woken ends the read of the eventfd; fill starts the next one.
func (s *issuer) woken(res int32) {
	s.armed = false
	if res >= 0 {
		return
	}
	if errno := refusal(res); errno != syscall.EINTR && errno != syscall.EAGAIN {
		panic(fmt.Sprintf("uring: read of the eventfd: %v", errno))
	}
}

// finish gives the result of a call to its transfer.
func (s *issuer) finish(c cqe) {
	i := uint32(c.userData)
	sl := &s.slots[i]
	if sl.gen != uint32(c.userData>>32) || sl.t.IO == nil {
		panic("uring: completion of a transfer that is not in flight")
	}
	n, errno := int(c.res), syscall.Errno(0)
	if c.res < 0 {
		n, errno = 0, refusal(c.res)
	}
	if !sl.t.Finish(n, errno) {
		s.again = append(s.again, i)
		return
	}
	io := sl.t.IO
	sl.t.IO = nil
	sl.gen++
	s.free = append(s.free, i)
	s.done(io)
}

// refusal is the error of a call. Nobody cancels one but the kernel, where a signal or
// a limit keeps it from making a thread for it (io_acct_cancel_pending_work in
// io_uring/io-wq.c): it was not made at all, and is made again.
func refusal(res int32) syscall.Errno {
	if errno := syscall.Errno(-res); errno != syscall.ECANCELED {
		return errno
	}
	return syscall.EAGAIN
}

// done gives io back and remembers what is to be flushed for it.
func (s *issuer) done(io *engine.IO) {
	s.backlog.Leave(io)
	after := io.After
	io.Done(io)
	if after != nil && !slices.Contains(s.after, after) {
		s.after = append(s.after, after)
	}
}

// flush lets the answers to all that is done leave.
func (s *issuer) flush() {
	for _, f := range s.after {
		f.Flush()
	}
	clear(s.after)
	s.after = s.after[:0]
}

// leave ends the read of the eventfd, so that the kernel holds no address of
// ours, and empties the tables, so that the files and the arena are free when
// Close returns and not when the kernel gets round to it.
func (s *issuer) leave() {
	s.e.notify()
	for s.armed {
		s.enter(false)
		s.reap()
	}
	if s.fixed {
		s.r.updateBuffer(nil)
	}
	fds := make([]int32, s.e.table)
	for i := range fds {
		fds[i] = -1
	}
	s.r.updateFiles(0, fds)
}

// one is what an eventfd is given to count.
var one uint64 = 1

// writeEventfd adds one to an eventfd. That never blocks: the counter would
// have to overflow, and every read empties it.
func writeEventfd(fd int) {
	syscall.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}

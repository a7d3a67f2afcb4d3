package uring

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is one io_uring: its memory and its system calls. All methods but
// close belong to the thread that enabled it.
type ring struct {
	fd      int
	enterFD uintptr // fd, or its index in the thread's registered rings
	enterFl uintptr // flags that every enter carries
	flags   uint32  // of setup

	rings, sqeMem []byte // mapped

	sqHead *uint32 // kernel writes
	sqTail *uint32 // we write
	sqMask uint32
	sqes   []sqe
	tail   uint32 // of the queue, not yet shown to the kernel

	cqHead *uint32 // we write
	cqTail *uint32 // kernel writes
	cqMask uint32
	cqes   []cqe
}

// profiles are the sets of setup flags, best first. A kernel answers EINVAL
// to those that it does not know.
var profiles = [...]uint32{
	setupSubmitAll | setupSingleIssuer | setupDeferTaskrun | setupNoSQArray, // 6.6
	setupSubmitAll | setupSingleIssuer | setupDeferTaskrun,                  // 6.1
	setupSubmitAll | setupCoopTaskrun,                                       // 5.19
	0,                                                                       // 5.13
}

// newRing makes a disabled ring of the first profile from the given one on
// that the kernel knows.
func newRing(entries uint32, profile int) (*ring, error) {
	var e syscall.Errno
	for _, flags := range profiles[profile:] {
		p := params{flags: flags | setupRDisabled | setupClamp}
		var fd uintptr
		fd, _, e = syscall.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
		if e == syscall.EINVAL {
			continue
		}
		if e != 0 {
			break
		}
		r := &ring{fd: int(fd), enterFD: fd, enterFl: enterGetEvents, flags: p.flags}
		if err := r.mapMemory(&p); err != nil {
			r.close()
			return nil, err
		}
		return r, nil
	}
	return nil, fmt.Errorf("io_uring_setup: %w", e)
}

// mapMemory maps the queues that p describes. The descriptor is close-on-exec
// by the kernel's own doing.
func (r *ring) mapMemory(p *params) error {
	const need = featSingleMmap | featNoDrop | featRsrcTags
	if p.features&need != need {
		return fmt.Errorf("io_uring_setup: features %#x lack %#x: %w", p.features, need&^p.features, syscall.ENOSYS)
	}
	size := p.cq.cqes + p.cqEntries*uint32(unsafe.Sizeof(cqe{}))
	if p.flags&setupNoSQArray == 0 {
		size = max(size, p.sq.array+p.sqEntries*4)
	}
	var err error
	if r.rings, err = r.mmap(offRings, int(size)); err != nil {
		return fmt.Errorf("map the queues of io_uring: %w", err)
	}
	if r.sqeMem, err = r.mmap(offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{}))); err != nil {
		return fmt.Errorf("map the submissions of io_uring: %w", err)
	}
	base := unsafe.Pointer(unsafe.SliceData(r.rings))
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Add(base, off)) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), *word(p.sq.mask)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.mask)
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(unsafe.SliceData(r.sqeMem))), p.sqEntries)
	r.cqes = unsafe.Slice((*cqe)(unsafe.Add(base, p.cq.cqes)), p.cqEntries)
	if p.flags&setupNoSQArray == 0 {
		// The queue goes through an index array: the identity, for good.
		array := unsafe.Slice(word(p.sq.array), p.sqEntries)
		for i := range array {
			array[i] = uint32(i)
		}
	}
	r.tail = atomic.LoadUint32(r.sqTail)
	return nil
}

func (r *ring) mmap(off int64, n int) ([]byte, error) {
	return unix.Mmap(r.fd, off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// close frees the ring. The kernel finishes with it in the background.
func (r *ring) close() {
	if r.sqeMem != nil {
		unix.Munmap(r.sqeMem)
	}
	if r.rings != nil {
		unix.Munmap(r.rings)
	}
	unix.Close(r.fd)
}

// queued is the number of submissions that the kernel has not taken.
func (r *ring) queued() uint32 { return r.tail - atomic.LoadUint32(r.sqHead) }

// next is a cleared submission at the end of the queue, or nil when the queue
// is full.
func (r *ring) next() *sqe {
	if r.queued() == uint32(len(r.sqes)) {
		return nil
	}
	s := &r.sqes[r.tail&r.sqMask]
	*s = sqe{}
	r.tail++
	return s
}

// firstPiece is how many submissions the first of several enters passes on. The
// kernel gathers more than two and shows them to the device together at the
// end, which then idles while a large batch is prepared.
const firstPiece = 2

// enter submits what is queued and returns when at least wait completions are
// there. Pieces double, so that the device works on one while the next is
// prepared, and a batch of n takes log n system calls. The scheduler is told
// that each may take long: a buffered read is copied in it.
func (r *ring) enter(wait uintptr) syscall.Errno {
	atomic.StoreUint32(r.sqTail, r.tail)
	queued := r.queued()
	for piece := uint32(firstPiece); piece < queued; piece *= 2 {
		_, _, e := syscall.Syscall6(unix.SYS_IO_URING_ENTER, r.enterFD, uintptr(piece), 0,
			r.enterFl&^enterGetEvents, 0, 0)
		if e != 0 {
			return e
		}
		queued = r.queued()
	}
	_, _, e := syscall.Syscall6(unix.SYS_IO_URING_ENTER, r.enterFD, uintptr(queued), wait, r.enterFl, 0, 0)
	return e
}

// ready is the number of completions that can be read now.
func (r *ring) ready() uint32 { return atomic.LoadUint32(r.cqTail) - *r.cqHead }

// register makes one io_uring_register call.
func (r *ring) register(op uintptr, arg unsafe.Pointer, n uintptr) syscall.Errno {
	_, _, e := syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), n, 0, 0)
	return e
}

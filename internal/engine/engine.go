// Package engine moves bytes between memory and files, in batches. Two
// implementations stand behind one interface: Pool, on plain system calls and
// a bounded set of goroutines, and uring.Engine, on a Linux io_uring. Callers
// cannot tell them apart but by speed; every test of a backend runs on both.
package engine

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
)

// Op says what an IO does.
type Op uint8

const (
	OpRead Op = iota
	OpWrite
	OpSync  // fdatasync(2): data and the metadata needed to read it
	OpPunch // deallocate a range, which then reads as zeroes
	OpZero  // make a range read as zeroes and keep it allocated
)

var opNames = [...]string{"read", "write", "sync", "punch", "zero"}

// String is the verb used in error texts.
func (o Op) String() string { return opNames[o] }

// IO is one transfer. The caller owns it, and may reuse it, before Submit
// and after Done; in between it and Buf belong to the engine.
type IO struct {
	Op    Op
	File  *File
	Owner Owner  // whose share of the engine it takes
	Buf   []byte // OpRead, OpWrite; for a direct file aligned as File.Align says
	Off   int64  // bytes; OpSync: counts if Len does
	Len   int64  // OpPunch, OpZero: bytes; OpSync: what is synced at least, all if not positive

	// Cancel, if it is not nil, is closed when nobody wants the transfer any more.
	// One that has not begun then is not made, and ends with context.Canceled; one
	// that has goes on.
	Cancel <-chan struct{}

	// Done is called once, from any goroutine, when the transfer is over.
	// It must not block.
	Done func(*IO)

	// After, if it is not nil, is flushed when Done has been called for
	// everything that the engine has at hand: answers to a batch can leave
	// together. It must not block either.
	After Flusher

	// N is the number of bytes moved. A read is short only at the end of the
	// file; a write is never short without Err.
	N int
	// Err is nil, a syscall.Errno, or context.Canceled of one that was called off.
	// EINTR, EAGAIN and short transfers are dealt with inside the engine.
	Err error

	// Engine-private state while the IO is submitted.
	Next *IO
	Slot uint32
	flow *flow
}

// Flusher sends on what several Done have gathered.
type Flusher interface{ Flush() }

// calledOff tells whether nobody wants io any more. It costs as much as a load.
func (io *IO) calledOff() bool {
	select {
	case <-io.Cancel:
		return true
	default:
		return false
	}
}

// finish calls Done and flushes After, for engines that finish transfers one
// by one. The IO is the caller's again when Done has returned.
func (io *IO) finish() {
	after := io.After
	io.Done(io)
	if after != nil {
		after.Flush()
	}
}

// File is a file that an engine may work on. It stays valid until Close; what is
// done with it after that fails with EBADF.
type File struct {
	OS     *os.File
	Direct bool // opened with O_DIRECT: the page cache is not consulted
	Align  int  // Direct: alignment of buffer address, offset and length

	// OnError, if not nil, is told of each error of an operation by Failed. It is set
	// before the first one.
	OnError func(op Op, err error) error

	disk uint64 // number of the device that it is on, or is

	// Both are NoFile when the file is closed: what had their values is then
	// another file's.
	fd    atomic.Uintptr
	index atomic.Int32
	close func() error
}

// NoFile is the descriptor of a closed file, which the kernel refuses, and the
// registration of one that has none.
const NoFile = -1

// NewFile is for implementations of Engine. index is the engine's registration
// of the file, or NoFile; closer undoes it and may be nil. The os.File is closed
// after it.
func NewFile(f *os.File, direct bool, align int, index int32, closer func() error) *File {
	file := &File{OS: f, Direct: direct, Align: align, disk: diskOf(f), close: closer}
	file.fd.Store(f.Fd())
	file.index.Store(index)
	return file
}

// Failed is what an error of an operation means, to the owner of the file: who
// submits operations of its own passes their errors through it. nil stays nil.
func (f *File) Failed(op Op, err error) error {
	if err == nil || f.OnError == nil {
		return err
	}
	return f.OnError(op, err)
}

// FD is the descriptor of the file, and one that is never open once the file is
// closed. It is for one system call and not to be kept.
func (f *File) FD() uintptr { return f.fd.Load() }

// Index is the engine's registration of the file, or NoFile.
func (f *File) Index() int32 { return f.index.Load() }

// Close gives the file back to the system, once: further calls do nothing. No IO
// on it may be in flight: a system call that has begun, with the number in its
// hand, is not waited for.
func (f *File) Close() error {
	const closed = ^uintptr(0) // NoFile
	if f.fd.Swap(closed) == closed {
		return nil
	}
	f.index.Store(NoFile)
	var err error
	if f.close != nil {
		err = f.close()
	}
	if e := f.OS.Close(); err == nil {
		err = e
	}
	return err
}

// Engine is safe for concurrent use.
type Engine interface {
	// Name is "uring" or "pool".
	Name() string

	// Open takes over f, which must be a regular file or block device.
	Open(f *os.File) (*File, error)

	// ReadNow fills p from the page cache and never blocks. It returns how
	// much of p it filled from the front; anything short of len(p) is not an
	// error but work for Submit, which also finds out about errors. It
	// returns 0 for direct files.
	ReadNow(f *File, p []byte, off int64) int

	// WriteNow copies p to the page cache, for a caller who waits anyway: it
	// may wait itself, as write(2) does when too much is dirty. It returns how
	// much of p it wrote from the front; anything short of len(p) without an
	// error is work for Submit. An error is final: the kernel may tell it once.
	// It returns 0 for direct files, and while limits.CachedWriters others write
	// so.
	WriteNow(f *File, p []byte, off int64) (int, error)

	// Submit hands over the batch. It does not wait for transfers; it may
	// wait for room in the queue.
	Submit(batch []*IO)

	// Close waits for what is in flight, then frees the engine. Submit must
	// not be called any more.
	Close() error
}

// waiter lets Do block on a batch without an allocation per call.
type waiter struct {
	mu   sync.Mutex
	left int
	done chan struct{}
	fn   func(*IO)
}

var waiters = sync.Pool{New: func() any {
	w := &waiter{done: make(chan struct{}, 1)}
	w.fn = w.finish
	return w
}}

func (w *waiter) finish(*IO) {
	w.mu.Lock()
	w.left--
	last := w.left == 0
	w.mu.Unlock()
	if last {
		w.done <- struct{}{}
	}
}

// Do submits the batch, sets each Done and Cancel, and the Owner of each to that of
// ctx, waits for all of it and returns the first error in batch order. The end of ctx
// calls off what has not begun; buffers that the kernel works on cannot be taken
// back. Who must have the transfer made gives a context that does not end.
func Do(ctx context.Context, e Engine, batch ...*IO) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(batch) == 0 {
		return nil
	}
	w := waiters.Get().(*waiter)
	w.left = len(batch)
	by, gone := owner(ctx), ctx.Done()
	for _, io := range batch {
		io.Done, io.Owner, io.Cancel = w.fn, by, gone
	}
	e.Submit(batch)
	<-w.done
	waiters.Put(w)
	for _, io := range batch {
		if io.Err == context.Canceled {
			return ctx.Err()
		}
		if io.Err != nil {
			return io.Err
		}
	}
	return nil
}

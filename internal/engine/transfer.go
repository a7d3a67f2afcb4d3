package engine

import (
	"context"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Call is one system call of a transfer.
type Call struct {
	Op  Op
	Buf []byte // OpRead, OpWrite: what is left to move
	Off int64
	Len int64 // OpPunch, OpZero, OpSync
}

// Transfer carries one IO through as many calls as it takes: interrupted and
// short ones are continued. It is for implementations of Engine, which make the calls, so that all
// of them continue and give up alike. A Transfer is used by one goroutine at a
// time and may be reused after Finish reported the end.
type Transfer struct {
	IO      *IO
	retries int // calls since the last byte moved
}

// Start begins io. It reports false when io is over without any call.
func (t *Transfer) Start(io *IO) bool {
	*t = Transfer{IO: io}
	io.N, io.Err = 0, nil
	if io.calledOff() {
		io.Err = context.Canceled
		return false
	}
	// A ring takes offset -1 for "the file position", pread refuses it.
	if io.Off < 0 && io.Op != OpSync {
		io.Err = syscall.EINVAL
		return false
	}
	return true
}

// Next is the call to make. Its Buf is a part of the IO's.
func (t *Transfer) Next() Call {
	io := t.IO
	switch {
	case io.Op == OpRead:
		return Call{Op: OpRead, Buf: io.Buf[io.N:], Off: io.Off + int64(io.N)}
	case io.Op == OpWrite:
		return Call{Op: OpWrite, Buf: io.Buf[io.N:], Off: io.Off + int64(io.N)}
	}
	return Call{Op: io.Op, Off: io.Off, Len: io.Len}
}

// Finish takes the result of the call that Next named: n bytes moved, or the
// error e. It reports whether the IO is over, its N and Err final; otherwise
// Next has another call.
func (t *Transfer) Finish(n int, e syscall.Errno) (over bool) {
	io := t.IO
	switch {
	case e == syscall.EINTR || e == syscall.EAGAIN:
		return t.stalled(e)
	case e != 0:
		io.Err = e
		return true
	case io.Op == OpRead:
		return t.read(n)
	case io.Op == OpWrite:
		return t.wrote(n)
	}
	return true
}

// read counts n bytes. The end of the file ends the read; on a direct file an
// unaligned count does too, and asking for the rest would be refused.
func (t *Transfer) read(n int) (over bool) {
	io := t.IO
	io.N += n
	t.retries = 0
	return n == 0 || io.N >= len(io.Buf) || io.File.Direct && n%io.File.Align != 0
}

// wrote counts n bytes. A direct write goes on from the last boundary.
func (t *Transfer) wrote(n int) (over bool) {
	io := t.IO
	before := io.N
	io.N += n
	if io.N >= len(io.Buf) {
		return true
	}
	if io.File.Direct {
		io.N -= io.N % io.File.Align
	}
	if io.N == before {
		return t.stalled(syscall.EIO)
	}
	t.retries = 0
	return false
}

// stalled counts a call that moved nothing and gives up with e in the end.
func (t *Transfer) stalled(e syscall.Errno) (over bool) {
	t.retries++
	if t.retries <= limits.IORetries {
		return false
	}
	t.IO.Err = e
	return true
}

package engine

import (
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// result is what a kernel answered, and the call that must have asked for it.
type result struct {
	op   Op
	off  int64
	left int // bytes asked for
	n    int
	e    syscall.Errno
}

func TestTransferContinuesUntilItIsOver(t *testing.T) {
	buffered, direct := &File{Align: 1}, &File{Direct: true, Align: 512}
	for _, tt := range []struct {
		name  string
		io    IO
		calls []result
		n     int
		err   error
	}{
		{"whole read", IO{Op: OpRead, File: buffered, Off: 100, Buf: make([]byte, 50)},
			[]result{{op: OpRead, off: 100, left: 50, n: 50}}, 50, nil},
		{"read in pieces", IO{Op: OpRead, File: buffered, Off: 100, Buf: make([]byte, 50)},
			[]result{{op: OpRead, off: 100, left: 50, n: 20}, {op: OpRead, off: 120, left: 30, n: 30}}, 50, nil},
		{"read to the end of the file", IO{Op: OpRead, File: buffered, Buf: make([]byte, 50)},
			[]result{{op: OpRead, left: 50, n: 20}, {op: OpRead, off: 20, left: 30}}, 20, nil},
		{"direct read to an unaligned end", IO{Op: OpRead, File: direct, Buf: make([]byte, 4096)},
			[]result{{op: OpRead, left: 4096, n: 1000}}, 1000, nil},
		{"direct read in aligned pieces", IO{Op: OpRead, File: direct, Buf: make([]byte, 4096)},
			[]result{{op: OpRead, left: 4096, n: 1024}, {op: OpRead, off: 1024, left: 3072, n: 3072}}, 4096, nil},
		{"interrupted read", IO{Op: OpRead, File: buffered, Buf: make([]byte, 50)},
			[]result{{op: OpRead, left: 50, e: syscall.EINTR}, {op: OpRead, left: 50, e: syscall.EAGAIN},
				{op: OpRead, left: 50, n: 50}}, 50, nil},
		{"failed read", IO{Op: OpRead, File: buffered, Buf: make([]byte, 50)},
			[]result{{op: OpRead, left: 50, n: 20}, {op: OpRead, off: 20, left: 30, e: syscall.EIO}}, 20, syscall.EIO},
		{"write in pieces", IO{Op: OpWrite, File: buffered, Buf: make([]byte, 50)},
			[]result{{op: OpWrite, left: 50, n: 49}, {op: OpWrite, off: 49, left: 1, n: 1}}, 50, nil},
		{"direct write goes on from a boundary", IO{Op: OpWrite, File: direct, Buf: make([]byte, 2048)},
			[]result{{op: OpWrite, left: 2048, n: 700}, {op: OpWrite, off: 512, left: 1536, n: 1536}}, 2048, nil},
		{"write that is not supported at all", IO{Op: OpWrite, File: buffered, Buf: make([]byte, 50)},
			[]result{{op: OpWrite, left: 50, e: syscall.EOPNOTSUPP}}, 0, syscall.EOPNOTSUPP},
		{"sync", IO{Op: OpSync, File: buffered}, []result{{op: OpSync}}, 0, nil},
		{"punch", IO{Op: OpPunch, File: buffered, Off: 512, Len: 512}, []result{{op: OpPunch, off: 512}}, 0, nil},
		{"refused zero", IO{Op: OpZero, File: buffered, Off: 512, Len: 512},
			[]result{{op: OpZero, off: 512, e: syscall.EOPNOTSUPP}}, 0, syscall.EOPNOTSUPP},
	} {
		t.Run(tt.name, func(t *testing.T) { playTransfer(t, &tt.io, tt.calls, tt.n, tt.err) })
	}
}

// playTransfer answers the calls of io with the results given.
func playTransfer(t *testing.T, io *IO, calls []result, n int, err error) {
	t.Helper()
	var tr Transfer
	if !tr.Start(io) {
		t.Fatalf("over before the first call: %v", io.Err)
	}
	for i, r := range calls {
		c := tr.Next()
		if c.Op != r.op || c.Off != r.off || len(c.Buf) != r.left {
			t.Fatalf("call %d is %v of %d at %d, want %v of %d at %d", i, c.Op, len(c.Buf), c.Off, r.op, r.left, r.off)
		}
		if over := tr.Finish(r.n, r.e); over != (i == len(calls)-1) {
			t.Fatalf("after call %d over is %v", i, over)
		}
	}
	if io.N != n || io.Err != err {
		t.Errorf("ended with %d, %v, want %d, %v", io.N, io.Err, n, err)
	}
}

func TestTransferGivesUpOnAFileThatNeverMoves(t *testing.T) {
	for _, tt := range []struct {
		name string
		n    int
		e    syscall.Errno
		want error
	}{
		{"interrupted for ever", 0, syscall.EINTR, syscall.EINTR},
		{"busy for ever", 0, syscall.EAGAIN, syscall.EAGAIN},
		{"writes nothing", 0, 0, syscall.EIO},
		{"writes less than a block", 511, 0, syscall.EIO},
	} {
		t.Run(tt.name, func(t *testing.T) {
			io := IO{Op: OpWrite, File: &File{Direct: true, Align: 512}, Buf: make([]byte, 4096)}
			var tr Transfer
			tr.Start(&io)
			calls := 1
			for ; !tr.Finish(tt.n, tt.e); calls++ {
				if c := tr.Next(); c.Off != 0 {
					t.Fatalf("went on at %d", c.Off)
				}
			}
			if io.Err != tt.want || calls != limits.IORetries+1 {
				t.Errorf("%v after %d calls, want %v after %d", io.Err, calls, tt.want, limits.IORetries+1)
			}
		})
	}
}

func TestNegativeOffsetNeverReachesTheKernel(t *testing.T) {
	for _, op := range []Op{OpRead, OpWrite, OpPunch, OpZero} {
		io := IO{Op: op, Off: -1, N: 7}
		var tr Transfer
		if tr.Start(&io) || io.Err != syscall.EINVAL || io.N != 0 {
			t.Errorf("%v at -1: %d, %v, want EINVAL", op, io.N, io.Err)
		}
	}
}

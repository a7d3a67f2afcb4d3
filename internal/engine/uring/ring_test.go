package uring

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel takes and gives these structures byte for byte.
func TestStructuresHaveTheKernelsLayout(t *testing.T) {
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"io_uring_params", unsafe.Sizeof(params{}), 120},
		{"io_uring_params.features", unsafe.Offsetof(params{}.features), 20},
		{"io_uring_params.sq_off", unsafe.Offsetof(params{}.sq), 40},
		{"io_uring_params.cq_off", unsafe.Offsetof(params{}.cq), 80},
		{"io_uring_params.sq_off.array", unsafe.Offsetof(sqOffsets{}.array), 24},
		{"io_uring_params.cq_off.cqes", unsafe.Offsetof(cqOffsets{}.cqes), 20},
		{"io_uring_sqe", unsafe.Sizeof(sqe{}), 64},
		{"io_uring_sqe.fd", unsafe.Offsetof(sqe{}.fd), 4},
		{"io_uring_sqe.off", unsafe.Offsetof(sqe{}.off), 8},
		{"io_uring_sqe.addr", unsafe.Offsetof(sqe{}.addr), 16},
		{"io_uring_sqe.len", unsafe.Offsetof(sqe{}.len), 24},
		{"io_uring_sqe.rw_flags", unsafe.Offsetof(sqe{}.opFlags), 28},
		{"io_uring_sqe.user_data", unsafe.Offsetof(sqe{}.userData), 32},
		{"io_uring_sqe.buf_index", unsafe.Offsetof(sqe{}.bufIndex), 40},
		{"io_uring_cqe", unsafe.Sizeof(cqe{}), 16},
		{"io_uring_probe", unsafe.Sizeof(probe{}), 16 + 256*8},
		{"io_uring_restriction", unsafe.Sizeof(restriction{}), 16},
		{"io_uring_restriction.opcode", unsafe.Offsetof(restriction{}.value), 2},
		{"io_uring_rsrc_register", unsafe.Sizeof(rsrcRegister{}), 32},
		{"io_uring_rsrc_update", unsafe.Sizeof(rsrcUpdate{}), 16},
		{"io_uring_rsrc_update2", unsafe.Sizeof(rsrcUpdate2{}), 32},
		{"io_uring_rsrc_update2.nr", unsafe.Offsetof(rsrcUpdate2{}.nr), 24},
	} {
		if tt.got != tt.want {
			t.Errorf("%s is %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}

// testRing is an enabled ring that this test's goroutine issues for, with f
// as file 1.
func testRing(t *testing.T, profile int, f *os.File) *ring {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(wake) })
	r, err := newRing(8, profile)
	if err != nil {
		t.Skipf("no io_uring: %v", err)
	}
	t.Cleanup(r.close)
	if err := r.prepare(4, wake); err != nil {
		t.Fatal(err)
	}
	if f != nil {
		if e := r.updateFiles(1, []int32{int32(f.Fd())}); e != 0 {
			t.Fatal(e)
		}
	}
	return r
}

// call submits q alone and returns its result.
func (r *ring) call(t *testing.T, q sqe) int32 {
	t.Helper()
	*r.next() = q
	if e := r.enter(1); e != 0 {
		t.Fatalf("enter: %v", e)
	}
	if r.ready() != 1 {
		t.Fatalf("%d completions for one submission", r.ready())
	}
	c := r.cqes[*r.cqHead&r.cqMask]
	*r.cqHead++
	if c.userData != q.userData {
		t.Fatalf("completion of %#x, want %#x", c.userData, q.userData)
	}
	return c.res
}

func TestEveryProfileThatTheKernelKnowsReads(t *testing.T) {
	f := tempFile(t, 4096, os.O_RDWR)
	defer f.Close()
	for p, flags := range profiles {
		t.Run(fmt.Sprintf("%#x", flags), func(t *testing.T) {
			r := testRing(t, p, f)
			if r.flags&flags != flags && p == len(profiles)-1 {
				t.Errorf("ring has flags %#x, want %#x", r.flags, flags)
			}
			buf := make([]byte, 100)
			var pin runtime.Pinner
			defer pin.Unpin()
			for i := range 20 { // more than the queue: every place is used twice
				clear(buf)
				q := sqe{opcode: opRead, flags: sqeFixedFile, fd: 1, len: 100,
					addr: pinned(&pin, unsafe.SliceData(buf)), userData: uint64(i)}
				if res := r.call(t, q); res != 100 || buf[99] != 0x5C {
					t.Fatalf("read %d: %d, last byte %#x", i, res, buf[99])
				}
			}
		})
	}
}

func TestOpcodesAreThoseOfTheKernel(t *testing.T) {
	f := tempFile(t, 8192, os.O_RDWR)
	defer f.Close()
	r := testRing(t, 0, f)
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	if e := r.updateBuffer(mem); e != 0 {
		t.Fatalf("register buffer: %v", e)
	}
	for _, tt := range []struct {
		name string
		q    sqe
		want int32
	}{
		{"fsync", sqe{opcode: opFsync, opFlags: fsyncDatasync}, 0},
		{"read", sqe{opcode: opRead, addr: at, len: 4096, off: 4096}, 4096},
		{"read at the end", sqe{opcode: opRead, addr: at, len: 4096, off: 8192}, 0},
		{"read fixed", sqe{opcode: opReadFixed, addr: at, len: 4096}, 4096},
		{"write", sqe{opcode: opWrite, addr: at, len: 512}, 512},
		{"write durably", sqe{opcode: opWrite, addr: at, len: 512, opFlags: unix.RWF_DSYNC}, 512},
		{"write fixed", sqe{opcode: opWriteFixed, addr: at, len: 512}, 512},
		{"fixed outside the buffer", sqe{opcode: opReadFixed, addr: at, len: 8192}, -int32(syscall.EFAULT)},
		{"punch", sqe{opcode: opFallocate, addr: 4096, len: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE}, 0},
		{"empty place", sqe{opcode: opRead, fd: 2, addr: at, len: 4096}, -int32(syscall.EBADF)},
	} {
		q := tt.q
		q.flags |= sqeFixedFile
		if q.fd == 0 {
			q.fd = 1
		}
		if got := r.call(t, q); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
}

// What a hostile worker might want from its ring is refused by the kernel.
func TestRingIsRestrictedToItsWork(t *testing.T) {
	const (
		opNop, opPollAdd, opSocket, opConnect, opSend, opUringCmd = 0, 6, 45, 16, 26, 46
		registerPersonality, unregisterFiles                      = 9, 3
	)
	f := tempFile(t, 4096, os.O_RDWR)
	defer f.Close()
	for p := range profiles {
		r := testRing(t, p, f)
		for _, op := range []uint8{opNop, opPollAdd, opOpenat, opSocket, opConnect, opSend, opUringCmd} {
			if got := r.call(t, sqe{opcode: op, flags: sqeFixedFile, fd: 1}); got != -int32(syscall.EACCES) {
				t.Errorf("opcode %d: %d, want EACCES", op, got)
			}
		}
		// A descriptor outside the table, even for an opcode in use.
		q := sqe{opcode: opFsync, fd: int32(f.Fd()), opFlags: fsyncDatasync}
		if got := r.call(t, q); got != -int32(syscall.EACCES) {
			t.Errorf("fsync of a plain descriptor: %d, want EACCES", got)
		}
		for _, op := range []uintptr{registerPersonality, unregisterFiles, registerFiles2, registerBuffers2,
			registerRestrictions, registerProbe} {
			if e := r.register(op, nil, 0); e != syscall.EACCES {
				t.Errorf("register operation %d: %v, want EACCES", op, e)
			}
		}
	}
}

func TestQueueTakesNoMoreThanItsSize(t *testing.T) {
	r := testRing(t, 0, nil)
	n := 0
	for ; r.next() != nil; n++ {
		if n > 8 {
			t.Fatal("the queue has no end")
		}
	}
	if n != 8 || r.queued() != 8 {
		t.Errorf("queue of 8 took %d, holds %d", n, r.queued())
	}
}

package uring

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// wakeFile is the place of the engine's own eventfd in the file table; guest
// disks follow.
const wakeFile = 0

// registers is what io_uring_register may still be asked for once the ring
// is enabled: files come and go, and so may the one buffer.
var registers = [...]uint8{registerFilesUpdate2, registerBuffersUpdate}

// prepare fills the disabled ring's tables, restricts it to what this package
// does and enables it for the calling thread, which is its only issuer from
// then on; last it tries the restriction. A worker that is taken over cannot
// make the ring open, connect or touch a descriptor that is not in the table;
// seccomp would not see it.
func (r *ring) prepare(files int, wake int) error {
	for _, step := range []struct {
		name string
		do   func() syscall.Errno
	}{
		{"probe opcodes", r.probe},
		{"register files", func() syscall.Errno { return r.registerFiles(files, wake) }},
		{"register buffers", r.registerNoBuffer},
		{"bound threads", r.boundWorkers},
		{"restrict", r.restrict},
		{"enable", func() syscall.Errno { return r.register(registerEnableRings, nil, 0) }},
	} {
		if e := step.do(); e != 0 {
			return fmt.Errorf("io_uring: %s: %w", step.name, e)
		}
	}
	return r.tryRestriction()
}

// tryRestriction asks the enabled ring, which has nothing in flight, to open a
// file. There is no file to open, nor an address of a name: a ring that is not
// restricted looks at that, and says so, where one that is answers EACCES.
// Nothing can loosen a restriction later.
func (r *ring) tryRestriction() error {
	q := r.next()
	q.opcode, q.flags, q.fd = opOpenat, sqeFixedFile, wakeFile
	for r.ready() == 0 {
		if e := r.enter(1); e != 0 && e != syscall.EINTR && e != syscall.EAGAIN {
			return fmt.Errorf("io_uring: try the restriction: %w", e)
		}
	}
	c := r.cqes[*r.cqHead&r.cqMask]
	atomic.StoreUint32(r.cqHead, *r.cqHead+1)
	if c.res != -int32(syscall.EACCES) {
		return fmt.Errorf("io_uring: the ring is not restricted: opening a file was answered with %d, not EACCES", c.res)
	}
	return nil
}

// probe makes sure that the kernel has every opcode.
func (r *ring) probe() syscall.Errno {
	p := new(probe)
	if e := r.register(registerProbe, unsafe.Pointer(p), uintptr(len(p.ops))); e != 0 {
		return e
	}
	for _, op := range opcodes {
		if p.ops[op].flags&opSupported == 0 {
			return syscall.ENOSYS
		}
	}
	return 0
}

// registerFiles makes a table of n places, empty but for the eventfd.
func (r *ring) registerFiles(n int, wake int) syscall.Errno {
	fds := make([]int32, n)
	for i := range fds {
		fds[i] = -1
	}
	fds[wakeFile] = int32(wake)
	var pin runtime.Pinner
	defer pin.Unpin()
	a := &rsrcRegister{nr: uint32(n), data: pinned(&pin, unsafe.SliceData(fds))}
	return r.register(registerFiles2, unsafe.Pointer(a), unsafe.Sizeof(*a))
}

// registerNoBuffer makes a table of one empty place, because a table cannot
// be added once the ring is restricted.
func (r *ring) registerNoBuffer() syscall.Errno {
	var pin runtime.Pinner
	defer pin.Unpin()
	a := &rsrcRegister{nr: 1, data: pinned(&pin, new(unix.Iovec))}
	return r.register(registerBuffers2, unsafe.Pointer(a), unsafe.Sizeof(*a))
}

// boundWorkers has the kernel use as many threads as there are transfers in
// flight, for those that may block. Before 5.15 it has its own number, and
// transfers that hang may leave none to others.
func (r *ring) boundWorkers() syscall.Errno {
	workers := [2]uint32{limits.RingWorkers, 0} // for files and disks; for the rest as it is
	e := r.register(registerWorkers, unsafe.Pointer(&workers), uintptr(len(workers)))
	if e == syscall.EINVAL {
		return 0
	}
	return e
}

// restrict takes effect when the ring is enabled.
func (r *ring) restrict() syscall.Errno {
	list := []restriction{{kind: restrictSQEFlagsRequired, value: sqeFixedFile}}
	for _, op := range opcodes {
		list = append(list, restriction{kind: restrictSQEOp, value: op})
	}
	for _, op := range registers {
		list = append(list, restriction{kind: restrictRegisterOp, value: op})
	}
	return r.register(registerRestrictions, unsafe.Pointer(unsafe.SliceData(list)), uintptr(len(list)))
}

// registerSelf spares the kernel the look-up of the ring's descriptor, which
// costs an atomic operation in a process of many threads. It must come before
// the ring is restricted; without it (before 5.18) nothing is lost.
func (r *ring) registerSelf() {
	a := &rsrcUpdate{offset: ^uint32(0), data: uint64(r.fd)}
	// The result is the number of rings registered, which register drops.
	if e := r.register(registerRingFDs, unsafe.Pointer(a), 1); e == 0 {
		r.enterFD, r.enterFl = uintptr(a.offset), r.enterFl|enterRegisteredRing
	}
}

// updateFiles puts fds into the table from index on; -1 empties a place.
func (r *ring) updateFiles(index int, fds []int32) syscall.Errno {
	var pin runtime.Pinner
	defer pin.Unpin()
	a := &rsrcUpdate2{offset: uint32(index), nr: uint32(len(fds)), data: pinned(&pin, unsafe.SliceData(fds))}
	return r.register(registerFilesUpdate2, unsafe.Pointer(a), unsafe.Sizeof(*a))
}

// updateBuffer registers mem as the one fixed buffer, which pins it; nil
// unpins what was registered.
func (r *ring) updateBuffer(mem []byte) syscall.Errno {
	iov := &unix.Iovec{Base: unsafe.SliceData(mem), Len: uint64(len(mem))}
	var pin runtime.Pinner
	defer pin.Unpin()
	a := &rsrcUpdate2{nr: 1, data: pinned(&pin, iov)}
	return r.register(registerBuffersUpdate, unsafe.Pointer(a), unsafe.Sizeof(*a))
}

// pinned is p as the kernel takes it inside a struct; what it points to stays
// where it is until pin is undone.
func pinned[T any](pin *runtime.Pinner, p *T) uint64 {
	pin.Pin(p)
	return uint64(uintptr(unsafe.Pointer(p)))
}

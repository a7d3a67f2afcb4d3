package backing

import (
	"context"
	"math"
	"os"
	"reflect"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Aligned reads and writes any range of a file, whatever alignment the file
// demands. It stands below a format and is the one place that bounces and that
// reads, modifies and writes.
//
// With alignment 1 it is a plain pass to the engine. Otherwise the file is
// open with O_DIRECT, and a write of part of a block is exclusive for that
// block: no other write that touches the block, aligned or not, runs between
// the read and the write of it. A write to the part of a block in which the
// file ends is exclusive for the whole file.
type Aligned struct {
	eng   engine.Engine
	file  *engine.File
	align int64 // power of two
	pool  *bufpool.Pool
	locks rangeLocks

	// spare holds one buffer that is used when the pool has nothing to
	// lend. A caller that waits for it holds buffers of the pool itself, so
	// waiting for the pool could be for ever.
	spare chan *bufpool.Buf
}

// NewAligned works on f, which stays the caller's. align is the alignment of
// buffers, offsets and lengths in bytes, 1 when there is none to keep; pool is
// not used then and may be nil.
func NewAligned(ctx context.Context, e engine.Engine, f *engine.File, align int64, pool *bufpool.Pool) (*Aligned, error) {
	a := &Aligned{eng: e, file: f, align: align, pool: pool, spare: make(chan *bufpool.Buf, 1)}
	if align <= 1 {
		a.align = 1
		return a, nil
	}
	if pool == nil || align&(align-1) != 0 || align > limits.BounceBuffer {
		return nil, &Error{Op: "align", Off: -1, Kind: ErrInvalid}
	}
	b, err := pool.Get(ctx, limits.BounceBuffer)
	if err != nil {
		return nil, err
	}
	a.spare <- b
	a.locks.keep(limits.SwapServerRequests)
	return a, nil
}

// Close gives the spare buffer back. No call may be in progress.
func (a *Aligned) Close() {
	if a.align > 1 {
		(<-a.spare).Release()
	}
}

// Fits reports whether off and n need neither bouncing nor modifying.
func (a *Aligned) Fits(off, n int64) bool { return (off|n)&(a.align-1) == 0 }

// TryShare locks the range against partial writes of its blocks, without
// waiting; false says that one is in progress. Who writes to the file past
// this type holds the lease meanwhile, which releases first, unless that is
// nil, before it unlocks. It does not allocate in the long run, and never for
// up to limits.SwapServerRequests at a time.
func (a *Aligned) TryShare(off, n int64, first Lease) (Lease, bool) {
	if a.align == 1 {
		return first, true
	}
	lo, hi := a.blocks(off, n)
	l := a.locks.try(lo, hi)
	if l == nil {
		return nil, false
	}
	l.first = first
	return l, true
}

// Share is TryShare with waiting. The lease is nil where there is nothing to
// lock.
func (a *Aligned) Share(ctx context.Context, off, n int64) (Lease, error) {
	if a.align == 1 {
		return nil, nil
	}
	lo, hi := a.blocks(off, n)
	l, err := a.locks.lock(ctx, lo, hi, false)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// blocks widens the range to whole blocks and gives its two ends.
func (a *Aligned) blocks(off, n int64) (lo, hi int64) {
	mask := a.align - 1
	return off &^ mask, (off + n + mask) &^ mask
}

// ReadAt fills p and returns how much of it the file had; that is less than
// len(p) without an error only where the file ends.
func (a *Aligned) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if a.align == 1 {
		n := a.eng.ReadNow(a.file, p, off)
		if n == len(p) {
			return n, nil
		}
		m, err := a.do(ctx, engine.OpRead, p[n:], off+int64(n))
		return n + m, err
	}
	done := 0
	for done < len(p) {
		want, n, err := a.readPart(ctx, p[done:], off+int64(done))
		done += n
		if err != nil || n < want {
			return done, err
		}
	}
	return done, nil
}

// readPart reads the first want bytes of p, as many as one transfer covers.
func (a *Aligned) readPart(ctx context.Context, p []byte, off int64) (want, n int, err error) {
	if m := int64(len(p)) &^ (a.align - 1); m > 0 && a.fitsMemory(p, off) {
		n, err = a.do(ctx, engine.OpRead, p[:m], off)
		return int(m), n, err
	}
	lo, hi := a.blocks(off, int64(len(p)))
	hi = lo + min(hi-lo, limits.BounceBuffer)
	want = int(min(hi-off, int64(len(p))))
	b, err := a.bounce(ctx, int(hi-lo))
	if err != nil {
		return want, 0, err
	}
	defer a.giveBack(b)
	buf := b.Bytes()[:hi-lo]
	got, err := a.do(ctx, engine.OpRead, buf, lo)
	if err != nil {
		return want, 0, err
	}
	return want, copy(p[:want], buf[min(off-lo, int64(got)):got]), nil
}

// WriteAt writes all of p or returns an error. Only a sync makes it durable.
func (a *Aligned) WriteAt(ctx context.Context, p []byte, off int64) error {
	if a.align == 1 {
		return a.writeCached(ctx, p, off)
	}
	for len(p) > 0 {
		var n int64
		var err error
		if m := int64(len(p)) &^ (a.align - 1); m > 0 && off&(a.align-1) == 0 {
			n, err = m, a.writeBlocks(ctx, p[:m], off)
		} else {
			n = min(int64(len(p)), a.align-off&(a.align-1))
			err = a.modify(ctx, p[:n], off)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// writeCached writes p to a file in the page cache.
func (a *Aligned) writeCached(ctx context.Context, p []byte, off int64) error {
	n, err := a.eng.WriteNow(a.file, p, off)
	if p, off = p[n:], off+int64(n); len(p) == 0 || err != nil {
		return err
	}
	_, err = a.do(ctx, engine.OpWrite, p, off)
	return err
}

// writeBlocks writes whole blocks.
func (a *Aligned) writeBlocks(ctx context.Context, p []byte, off int64) error {
	l, err := a.locks.lock(ctx, off, off+int64(len(p)), false)
	if err != nil {
		return err
	}
	defer l.Release()
	if a.fitsMemory(p, off) {
		_, err := a.do(ctx, engine.OpWrite, p, off)
		return err
	}
	b, err := a.bounce(ctx, min(len(p), limits.BounceBuffer))
	if err != nil {
		return err
	}
	defer a.giveBack(b)
	for len(p) > 0 {
		n := copy(b.Bytes(), p)
		if _, err := a.do(ctx, engine.OpWrite, b.Bytes()[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// modify writes p, a part of one block.
func (a *Aligned) modify(ctx context.Context, p []byte, off int64) error {
	if ends, err := a.modifyBlock(ctx, p, off); err != nil || !ends {
		return err
	}
	return a.writeTail(ctx, p, off)
}

// modifyBlock reads, modifies and writes the block of which p is a part. It
// writes nothing if the file ends in the block.
func (a *Aligned) modifyBlock(ctx context.Context, p []byte, off int64) (ends bool, err error) {
	lo, hi := a.blocks(off, int64(len(p)))
	l, err := a.locks.lock(ctx, lo, hi, true)
	if err != nil {
		return false, err
	}
	defer l.Release()
	b, err := a.bounce(ctx, int(a.align))
	if err != nil {
		return false, err
	}
	defer a.giveBack(b)
	buf := b.Bytes()[:a.align]
	n, err := a.do(ctx, engine.OpRead, buf, lo)
	if err != nil || n < len(buf) {
		return err == nil, err
	}
	copy(buf[off-lo:], p)
	_, err = a.do(ctx, engine.OpWrite, buf, lo)
	return false, err
}

// writeTail writes into the block in which the file ends, or ended: it is right
// for any range. Writing the whole block would make the file longer, so O_DIRECT
// is off meanwhile, for everything that works on the open file.
//
// The kernel lets a write through the page cache run beside asynchronous
// direct ones, and then writes a page back that has not what they wrote; how
// much of the file is in one folio only the file system knows. So no other
// write runs anywhere in the file, neither before nor after the switch. What is
// left dirty is written back before the next direct write near it begins. Reads
// may be made either way: those through the page cache leave clean pages,
// which direct writes drop.
func (a *Aligned) writeTail(ctx context.Context, p []byte, off int64) (err error) {
	l, err := a.locks.lock(ctx, 0, math.MaxInt64, true)
	if err != nil {
		return err
	}
	defer l.Release()
	if err := setDirect(a.file.FD(), false); err != nil {
		return err
	}
	defer func() {
		if e := setDirect(a.file.FD(), true); err == nil {
			err = e
		}
	}()
	_, err = a.do(ctx, engine.OpWrite, p, off)
	return err
}

// setDirect switches O_DIRECT of the open file.
func setDirect(fd uintptr, on bool) error {
	fl, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err == nil {
		fl &^= unix.O_DIRECT
		if on {
			fl |= unix.O_DIRECT
		}
		_, err = unix.FcntlInt(fd, unix.F_SETFL, fl)
	}
	return os.NewSyscallError("fcntl", err)
}

// fitsMemory reports whether p may be handed to a direct transfer at off.
func (a *Aligned) fitsMemory(p []byte, off int64) bool {
	return (off|int64(reflect.ValueOf(p).Pointer()))&(a.align-1) == 0
}

// bounce lends n ≤ limits.BounceBuffer bytes until giveBack.
func (a *Aligned) bounce(ctx context.Context, n int) (*bufpool.Buf, error) {
	if b := a.pool.TryGet(n); b != nil {
		return b, nil
	}
	select {
	case b := <-a.spare:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// giveBack makes b the spare if there is none.
func (a *Aligned) giveBack(b *bufpool.Buf) {
	if b.Cap() >= limits.BounceBuffer {
		select {
		case a.spare <- b:
			return
		default:
		}
	}
	b.Release()
}

// Do runs one transfer or operation of the file and waits for it. n counts
// for the operations without a buffer.
func (a *Aligned) Do(ctx context.Context, op engine.Op, off, n int64) error {
	io := ios.Get().(*engine.IO)
	*io = engine.IO{Op: op, File: a.file, Off: off, Len: n}
	err := engine.Do(ctx, a.eng, io)
	ios.Put(io)
	return err
}

func (a *Aligned) do(ctx context.Context, op engine.Op, p []byte, off int64) (int, error) {
	io := ios.Get().(*engine.IO)
	*io = engine.IO{Op: op, File: a.file, Buf: p, Off: off}
	err := engine.Do(ctx, a.eng, io)
	n := io.N
	io.Buf = nil
	ios.Put(io)
	return n, err
}

// ios saves an allocation per transfer.
var ios = sync.Pool{New: func() any { return new(engine.IO) }}

// rangeLocks are shared and exclusive locks on byte ranges, granted in order
// of arrival where they conflict. The zero value is ready for use.
type rangeLocks struct {
	mu   sync.Mutex
	list []*rangeLock // guarded by mu; held and waiting, in order of arrival
	free []*rangeLock // guarded by mu
}

// rangeLock is one lock on [lo, hi).
type rangeLock struct {
	set     *rangeLocks
	lo, hi  int64
	excl    bool
	blocked int           // guarded by set.mu; earlier ones that conflict
	granted chan struct{} // one token once blocked is 0 again
	first   Lease         // released before the lock; owned by the holder
}

// keep makes n locks, which are there before they are needed.
func (s *rangeLocks) keep(n int) {
	s.list, s.free = make([]*rangeLock, 0, n), make([]*rangeLock, 0, n)
	for range n {
		s.free = append(s.free, s.newLock())
	}
}

func (s *rangeLocks) newLock() *rangeLock {
	return &rangeLock{set: s, granted: make(chan struct{}, 1)}
}

func (l *rangeLock) conflicts(o *rangeLock) bool {
	return (l.excl || o.excl) && l.lo < o.hi && o.lo < l.hi
}

// addLocked queues a lock behind those it conflicts with.
func (s *rangeLocks) addLocked(lo, hi int64, excl bool) *rangeLock {
	var l *rangeLock
	if n := len(s.free); n > 0 {
		l, s.free = s.free[n-1], s.free[:n-1]
	} else {
		l = s.newLock()
	}
	l.lo, l.hi, l.excl, l.blocked = lo, hi, excl, 0
	for _, o := range s.list {
		if l.conflicts(o) {
			l.blocked++
		}
	}
	s.list = append(s.list, l)
	return l
}

// removeLocked takes l out and grants what waited for nothing else.
func (s *rangeLocks) removeLocked(l *rangeLock) {
	at := 0
	for s.list[at] != l {
		at++
	}
	copy(s.list[at:], s.list[at+1:])
	s.list[len(s.list)-1] = nil
	s.list = s.list[:len(s.list)-1]
	for _, o := range s.list[at:] {
		if !o.conflicts(l) {
			continue
		}
		if o.blocked--; o.blocked == 0 {
			o.granted <- struct{}{}
		}
	}
	s.free = append(s.free, l)
}

// try takes a shared lock, or returns nil.
func (s *rangeLocks) try(lo, hi int64) *rangeLock {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.addLocked(lo, hi, false)
	if l.blocked > 0 {
		s.removeLocked(l)
		return nil
	}
	return l
}

// lock waits for its turn until ctx ends.
func (s *rangeLocks) lock(ctx context.Context, lo, hi int64, excl bool) (*rangeLock, error) {
	s.mu.Lock()
	l := s.addLocked(lo, hi, excl)
	wait := l.blocked > 0
	s.mu.Unlock()
	if !wait {
		return l, nil
	}
	select {
	case <-l.granted:
		return l, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-l.granted: // granted meanwhile: the token must not stay behind
	default:
	}
	s.removeLocked(l)
	return nil, ctx.Err()
}

// Release unlocks. l must not be used any more.
func (l *rangeLock) Release() {
	if l.first != nil {
		l.first.Release()
		l.first = nil
	}
	l.set.mu.Lock()
	l.set.removeLocked(l)
	l.set.mu.Unlock()
}

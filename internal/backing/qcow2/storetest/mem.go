// Package storetest has a host file in memory for the tests of the qcow2
// packages.
package storetest

import (
	"context"
	"errors"
	"hash/maphash"
	"io"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// pageSize is the unit in which memory is taken, and that of Extents.
const pageSize = 512

// Op names a kind of call to a Mem.
type Op string

// The calls that are counted and that can be made to fail.
const (
	Read     Op = "read"
	Write    Op = "write"
	Sync     Op = "sync"
	Punch    Op = "punch"
	Zero     Op = "zero"
	Truncate Op = "truncate"
	Extents  Op = "extents"
	Cache    Op = "cache"
	Size     Op = "size"
)

// Mem is a sparse file in memory: what was never written takes no memory.
// Map always answers ErrNotMappable. Safe for concurrent use.
type Mem struct {
	mu     sync.Mutex
	pages  map[int64]*[pageSize]byte // guarded by mu; a page never changes
	size   int64                     // guarded by mu
	had    int64                     // guarded by mu: the largest size since it was opened
	fixed  bool                      // guarded by mu
	counts map[Op]int                // guarded by mu
	bytes  map[Op]int64              // guarded by mu
	total  int                       // guarded by mu
	faults map[int]error             // guarded by mu: by number of the call
	byOp   map[Op]map[int]error      // guarded by mu: by number of that op
	failed error                     // guarded by mu: a failed Sync, for good
	closed int                       // guarded by mu
}

var _ store.Store = (*Mem)(nil)

// New makes a file with a copy of data. Pages of zeroes are holes.
func New(data []byte) *Mem {
	m := &Mem{
		pages: map[int64]*[pageSize]byte{}, counts: map[Op]int{}, bytes: map[Op]int64{},
		faults: map[int]error{}, byOp: map[Op]map[int]error{},
	}
	m.put(data, 0)
	return m
}

// SetFixed makes the file a block device, or a regular file again.
func (m *Mem) SetFixed(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fixed = on
}

// FailCall makes the n-th call from now on fail with err, counting all calls
// of every Op from 1. It is undone by the failure, or by n = 0 for all.
func (m *Mem) FailCall(n int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n == 0 {
		m.faults = map[int]error{}
		return
	}
	m.faults[m.total+n] = err
}

// FailOp makes the n-th call of op from now on fail with err.
func (m *Mem) FailOp(op Op, n int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.byOp[op] == nil {
		m.byOp[op] = map[int]error{}
	}
	m.byOp[op][m.counts[op]+n] = err
}

// Count is how often op was called, failures included.
func (m *Mem) Count(op Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts[op]
}

// Calls is how often any Op was called.
func (m *Mem) Calls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total
}

// Bytes is how many bytes the calls of op asked for.
func (m *Mem) Bytes(op Op) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bytes[op]
}

// Closed is how often Close was called.
func (m *Mem) Closed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closed
}

// Contents is a copy of the whole file, which must not be large.
func (m *Mem) Contents() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := make([]byte, m.size)
	m.getLocked(p, 0)
	return p
}

// Peek is a copy of n bytes at off; behind the end there are zeroes. It is no
// call that is counted or can fail.
func (m *Mem) Peek(off, n int64) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := make([]byte, n)
	m.getLocked(p, off)
	return p
}

// Sum differs for any two files with other contents that one will meet. It is the
// same for those with the same pages.
func (m *Mem) Sum(seed maphash.Seed) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	sum := maphash.Comparable(seed, m.size)
	var h maphash.Hash
	h.SetSeed(seed)
	for i, page := range m.pages {
		h.Reset()
		maphash.WriteComparable(&h, i)
		_, _ = h.Write(page[:]) // it never fails
		sum += h.Sum64()        // in whatever order
	}
	return sum
}

// Update makes a file of the host that holds has, nil for nothing, hold m. It
// writes only what differs. After an error the file may hold anything.
func (m *Mem) Update(f *os.File, has *Mem) error {
	if has == nil {
		has = New(nil)
	}
	now, was := m.Clone(), has.Clone() // that nobody else knows
	for i := range was.pages {
		if now.pages[i] == nil {
			now.pages[i] = new([pageSize]byte)
		}
	}
	for i, page := range now.pages {
		if page == was.pages[i] {
			continue
		}
		if _, err := f.WriteAt(page[:], i*pageSize); err != nil {
			return err
		}
	}
	return f.Truncate(now.size)
}

// Patch overwrites bytes behind the back of whoever uses the file: it is not
// counted and does not fail.
func (m *Mem) Patch(off int64, p []byte) { m.put(p, off) }

// Cut moves the end of the file, in the way of Patch: whoever has it open misses
// what is gone, until Reopen.
func (m *Mem) Cut(size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cutLocked(size)
}

// Allocated is the memory that the contents take, in bytes.
func (m *Mem) Allocated() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(len(m.pages)) * pageSize
}

// begin counts a call and says whether it fails.
func (m *Mem) begin(ctx context.Context, op Op, n int64) error {
	m.total++
	m.counts[op]++
	m.bytes[op] += n
	if err := m.faults[m.total]; err != nil {
		delete(m.faults, m.total)
		return err
	}
	if err := m.byOp[op][m.counts[op]]; err != nil {
		delete(m.byOp[op], m.counts[op])
		return err
	}
	if m.closed > 0 {
		return errors.New("use after close")
	}
	return ctx.Err()
}

// Size is where the file ends now.
func (m *Mem) Size() (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.size, m.begin(context.Background(), Size, 0)
}

// Fixed reports whether the file plays a block device.
func (m *Mem) Fixed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fixed
}

// Sector is that of a file, also of one that plays a block device.
func (m *Mem) Sector() int64 { return 0 }

// ReadAt fills p as far as the file reaches, which must be as far as it did.
func (m *Mem) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(ctx, Read, int64(len(p))); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, backing.ErrOutOfRange
	}
	n := max(0, min(int64(len(p)), m.size-off))
	m.getLocked(p[:n], off)
	if n < int64(len(p)) && off+n < m.had {
		return int(n), io.ErrUnexpectedEOF
	}
	return int(n), nil
}

// getLocked copies out of the pages.
func (m *Mem) getLocked(p []byte, off int64) {
	for len(p) > 0 {
		at := off % pageSize
		n := min(pageSize-at, int64(len(p)))
		if page := m.pages[off/pageSize]; page != nil {
			copy(p[:n], page[at:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// WriteAt writes p, which is durable at once.
func (m *Mem) WriteAt(ctx context.Context, p []byte, off int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(ctx, Write, int64(len(p))); err != nil {
		return err
	}
	if err := m.writableLocked(off, int64(len(p))); err != nil {
		return err
	}
	m.putLocked(p, off)
	return nil
}

// writableLocked says why a range cannot be changed.
func (m *Mem) writableLocked(off, n int64) error {
	switch {
	case m.failed != nil:
		return backing.ErrPoisoned
	case off < 0 || n < 0 || off > 1<<62 || m.fixed && off+n > m.size:
		return backing.ErrOutOfRange
	}
	return nil
}

// put writes p and moves the end.
func (m *Mem) put(p []byte, off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.putLocked(p, off)
}

func (m *Mem) putLocked(p []byte, off int64) {
	m.size = max(m.size, off+int64(len(p)))
	m.had = max(m.had, m.size)
	for len(p) > 0 {
		at := off % pageSize
		n := min(pageSize-at, int64(len(p)))
		m.putPageLocked(p[:n], off/pageSize, at)
		p, off = p[n:], off+n
	}
}

// putPageLocked writes into one page; zeroes alone do not make one. The page
// is a new one: others may hold the old one.
func (m *Mem) putPageLocked(p []byte, i, at int64) {
	old := m.pages[i]
	if old == nil && backing.AllZero(p) {
		return
	}
	page := new([pageSize]byte)
	if old != nil && len(p) < pageSize {
		*page = *old
	}
	copy(page[at:], p)
	m.pages[i] = page
}

// Sync does nothing; once it was made to fail, the file is poisoned. A caller
// who gives up is told so and no more.
func (m *Mem) Sync(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(ctx, Sync, 0); backing.GaveUp(err) {
		return err
	} else if err != nil {
		m.failed = err
	}
	if m.failed != nil {
		return m.failed
	}
	return nil
}

// Punch makes a range of the file read as zeroes and frees its memory.
func (m *Mem) Punch(ctx context.Context, off, n int64) error { return m.wipe(ctx, Punch, off, n) }

// Zero makes a range read as zeroes.
func (m *Mem) Zero(ctx context.Context, off, n int64) error { return m.wipe(ctx, Zero, off, n) }

func (m *Mem) wipe(ctx context.Context, op Op, off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(ctx, op, n); err != nil {
		return err
	}
	if err := m.writableLocked(off, n); err != nil {
		return err
	}
	m.wipeLocked(off, min(off+n, m.size))
	return nil
}

// wipeLocked clears [off, end).
func (m *Mem) wipeLocked(off, end int64) {
	for _, i := range m.touchedLocked(off, end) {
		from, to := max(off, i*pageSize), min(end, (i+1)*pageSize)
		if to-from == pageSize {
			delete(m.pages, i)
			continue
		}
		rest := *m.pages[i]
		clear(rest[from-i*pageSize : to-i*pageSize])
		m.pages[i] = &rest
	}
}

// touchedLocked are the pages there are in [off, end), in order.
func (m *Mem) touchedLocked(off, end int64) (list []int64) {
	if off >= end {
		return nil
	}
	first, last := off/pageSize, (end-1)/pageSize
	if last-first < int64(len(m.pages)) {
		for i := first; i <= last; i++ {
			if m.pages[i] != nil {
				list = append(list, i)
			}
		}
		return list
	}
	for i := range m.pages {
		if first <= i && i <= last {
			list = append(list, i)
		}
	}
	slices.Sort(list)
	return list
}

// Truncate moves the end of the file.
func (m *Mem) Truncate(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(context.Background(), Truncate, size); err != nil {
		return err
	}
	if size < 0 || m.fixed {
		return backing.ErrInvalid
	}
	m.cutLocked(size)
	m.had = size
	return nil
}

func (m *Mem) cutLocked(size int64) {
	if size < m.size {
		m.wipeLocked(size, m.size)
	}
	m.size, m.had = size, max(m.had, size)
}

// Extents yields pages that were written as data and all others as holes; a
// block device is data everywhere.
func (m *Mem) Extents(ctx context.Context, off, n int64, yield func(backing.Extent) bool) error {
	if err := m.beginExtents(ctx, off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		e := m.extent(off, end)
		if !yield(e) {
			break
		}
		off += e.Len
	}
	return nil
}

func (m *Mem) beginExtents(ctx context.Context, off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.begin(ctx, Extents, n); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > m.size-n {
		return backing.ErrOutOfRange
	}
	return nil
}

// extent is the one that begins with off, as far as end.
func (m *Mem) extent(off, end int64) backing.Extent {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := off / pageSize
	switch {
	case m.fixed:
		return backing.Extent{Len: end - off}
	case m.pages[i] == nil:
		if list := m.touchedLocked(off, end); len(list) > 0 {
			end = list[0] * pageSize
		}
		return backing.Extent{Len: end - off, Hole: true, Zero: true}
	}
	for m.pages[i] != nil && i*pageSize < end {
		i++
	}
	return backing.Extent{Len: min(i*pageSize, end) - off}
}

// Cache does nothing.
func (m *Mem) Cache(ctx context.Context, _, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.begin(ctx, Cache, n)
}

// Map has no file to name.
func (m *Mem) Map(engine.Op, int64, int64, *backing.Mapping) error { return backing.ErrNotMappable }

// Close counts; the contents stay for the test to look at.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed++
	return nil
}

// Reopen lets the file be used again after Close and after a failed Sync, with
// the end that it has then.
func (m *Mem) Reopen() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed, m.failed, m.had = 0, nil, m.size
}

// Clone is a file of its own with the same contents. Faults and counts are not
// taken along.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := New(nil)
	c.pages, c.size, c.had, c.fixed = maps.Clone(m.pages), m.size, m.size, m.fixed
	return c
}

package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// commits runs the commits of a disk, one at a time. All who ask while one is
// running share the next.
type commits struct {
	d *disk

	// one is held by who writes what only the commit writes. Before mu.
	one  sync.Mutex
	lost atomic.Pointer[backing.Error] // why there is no commit any more, nor any other write

	mu      sync.Mutex
	next    *turn       // guarded by mu; who waits for the next commit
	running bool        // guarded by mu
	timer   *time.Timer // guarded by mu; not nil: the mapping has changed
	stopped bool        // guarded by mu
}

// turn is one commit to come. err is set before done is closed.
type turn struct {
	done chan struct{}
	err  error
}

func (c *commits) init(d *disk) { c.d = d }

// run commits all that is linked or written when it is called.
func (c *commits) run(ctx context.Context) error {
	t := c.join()
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join makes sure that a commit begins after now.
func (c *commits) join() *turn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.joinLocked()
}

func (c *commits) joinLocked() *turn {
	if c.next == nil {
		c.next = &turn{done: make(chan struct{})}
	}
	t := c.next
	if !c.running {
		c.running = true
		go c.work()
	}
	return t
}

// work commits as long as somebody waits.
func (c *commits) work() {
	for {
		c.mu.Lock()
		t := c.next
		c.next = nil
		if t == nil {
			c.running = false
			c.mu.Unlock()
			return
		}
		if c.timer != nil {
			c.timer.Stop()
			c.timer = nil
		}
		c.mu.Unlock()
		t.err = c.exclusive(func() error { return c.d.commit(context.Background()) })
		close(t.done)
	}
}

// exclusive calls f while no commit is running. It fails when there is none
// any more.
func (c *commits) exclusive(f func() error) error {
	c.one.Lock()
	defer c.one.Unlock()
	if err := c.d.writable(); err != nil {
		return err
	}
	return f()
}

// wind has a commit done some time after the first change of the mapping, so
// that a guest that never flushes does not leave much behind.
func (c *commits) wind() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer == nil && !c.stopped {
		c.timer = time.AfterFunc(limits.CommitDelay, c.late)
	}
}

// late has the commit done that wind promised.
func (c *commits) late() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil && !c.stopped {
		c.joinLocked()
	}
}

// makeRoom commits when so much of the mapping is changed that it must not be
// more.
func (c *commits) makeRoom(ctx context.Context) error {
	c.d.m.mu.RLock()
	dirty := len(c.d.m.dirty)
	c.d.m.mu.RUnlock()
	if dirty < limits.DirtySlices {
		return nil
	}
	return c.run(ctx)
}

// stop commits for the last time, also what was freed, and ends the timer.
func (c *commits) stop() error {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	if err := c.run(context.Background()); err != nil {
		return err
	}
	if !c.d.space.Pending() { // the commit has freed nothing
		return nil
	}
	return c.run(context.Background())
}

// Flush makes every write durable that returned before it.
func (d *disk) Flush(ctx context.Context) error {
	return d.wrap("flush", -1, 0, d.commits.run(ctx))
}

// batch is what one commit brings to the file.
type batch struct {
	tables   []dirtyTable
	slices   []dirtySlice
	linked   bool
	epoch    *epoch
	unlinked []space.Ref
}

// dirtyTable is an L2 table that the file does not have yet.
type dirtyTable struct {
	index  int64 // in the L1 table
	f      *freshTable
	slices map[int64][]uint64 // those in memory, by their place in the table
}

// dirtySlice is the state of a slice when the commit began.
type dirtySlice struct {
	s     *slice
	words []uint64 // nil where a table of the batch has them
}

// commit brings the mapping to the file, so that whatever part of it arrives
// names nothing that is not there: first what the mapping will refer to, then
// the mapping; what it referred to before is free only after that.
func (d *disk) commit(ctx context.Context) error {
	d.reap(ctx)
	b := d.gather()
	err := d.prepare(ctx, b)
	if err == nil {
		d.prepared(b)
		err = d.name(ctx, b)
	}
	d.settle(b, err)
	if err == nil {
		d.reap(ctx)
	}
	return err
}

// gather takes what has changed since the last commit.
func (d *disk) gather() *batch {
	m := &d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	b := &batch{linked: m.linked, epoch: d.epoch, unlinked: d.unlinked}
	d.epoch, d.unlinked, m.linked = new(epoch), nil, false
	for i, f := range m.fresh {
		b.tables = append(b.tables, d.gatherTable(i, f))
	}
	for _, s := range m.dirty {
		s.dirty, s.busy = false, true
		x := dirtySlice{s: s}
		if m.fresh[s.number/d.perTable()] == nil {
			x.words = slices.Clone(s.words)
		}
		b.slices = append(b.slices, x)
	}
	m.dirty = nil
	return b
}

// gatherTable copies what is in memory of a table. With d.m.mu.
func (d *disk) gatherTable(i int64, f *freshTable) dirtyTable {
	t := dirtyTable{index: i, f: f, slices: map[int64][]uint64{}}
	per := d.perTable()
	for k := range per {
		if s := d.m.slices[i*per+k]; s != nil {
			t.slices[k] = slices.Clone(s.words)
		}
	}
	return t
}

// prepare makes durable what the mapping will refer to: refcounts, new tables,
// data. A device may have become larger: a write for which it had no room waits
// for this, and the tables that a growth and the end of the disk need come after
// it.
func (d *disk) prepare(ctx context.Context, b *batch) error {
	if err := d.space.Adopt(ctx); err != nil {
		return err
	}
	if !b.linked && len(b.tables) == 0 && !d.space.Pending() {
		return nil
	}
	if err := d.space.Write(ctx); err != nil {
		return err
	}
	for i := range b.tables {
		if err := d.writeTable(ctx, &b.tables[i]); err != nil {
			return err
		}
	}
	return d.sync(ctx)
}

// prepared makes known that the file has the tables of a batch: from now on
// they change like any other.
func (d *disk) prepared(b *batch) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	for _, t := range b.tables {
		delete(d.m.fresh, t.index)
		d.m.unnamed[t.index] = true
	}
}

// name brings the mapping itself to the file and makes it durable.
func (d *disk) name(ctx context.Context, b *batch) error {
	for i := range b.slices {
		if err := d.writeSlice(ctx, &b.slices[i]); err != nil {
			return err
		}
	}
	named, err := d.nameTables(ctx)
	if err == nil {
		err = d.sync(ctx)
	}
	if err != nil {
		return err
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	for _, i := range named {
		delete(d.m.unnamed, i)
	}
	return nil
}

// nameTables writes the L1 entries of new tables that are in the file, and
// says which they are.
func (d *disk) nameTables(ctx context.Context) (named []int64, err error) {
	entry := map[int64]uint64{}
	d.m.mu.RLock()
	for i := range d.m.unnamed {
		entry[i] = d.m.l1[i]
		named = append(named, i)
	}
	d.m.mu.RUnlock()
	for i, e := range entry {
		err := d.st.WriteAt(ctx, binary.BigEndian.AppendUint64(nil, e), int64(d.header.L1Offset)+i*8, false)
		if err != nil {
			return nil, err
		}
	}
	return named, nil
}

// settle ends a commit. What a failed one had taken is due again.
func (d *disk) settle(b *batch, err error) {
	m := &d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range b.slices {
		x.s.busy = false
		if err != nil && !x.s.dirty {
			x.s.dirty = true // and stays pinned
			m.dirty = append(m.dirty, x.s)
			continue
		}
		m.clock.unpin(x.s)
	}
	q := quarantined{epoch: b.epoch, refs: b.unlinked}
	if err != nil {
		d.unlinked = append(b.unlinked, d.unlinked...)
		m.linked = m.linked || b.linked
		q.refs = nil
	}
	d.quarantine = append(d.quarantine, q)
}

// sync makes the guest's data and the metadata durable.
func (d *disk) sync(ctx context.Context) error {
	if d.data != d.st {
		if err := d.data.Sync(ctx); err != nil {
			return err
		}
	}
	return d.st.Sync(ctx)
}

// writeSlice brings a slice to its place in a table that the file has.
func (d *disk) writeSlice(ctx context.Context, x *dirtySlice) error {
	if x.words == nil {
		return nil
	}
	d.m.mu.RLock()
	at := d.place(x.s.number)
	d.m.mu.RUnlock()
	return d.writeWords(ctx, x.words, at)
}

// writeWords writes a part of a table.
func (d *disk) writeWords(ctx context.Context, words []uint64, at int64) error {
	b := tableBuffers.Get().(*tableBuffer)
	defer tableBuffers.Put(b)
	for i, w := range words {
		binary.BigEndian.PutUint64(b[i*8:], w)
	}
	return d.st.WriteAt(ctx, b[:len(words)*8], at, false)
}

// writeTable writes a whole table: what is in memory of it, the rest from the
// table that it is a copy of.
func (d *disk) writeTable(ctx context.Context, t *dirtyTable) error {
	if err := d.space.Extend(ctx, t.f.run.Off+d.g.ClusterSize); err != nil {
		return err
	}
	size := d.m.entries * d.g.EntrySize
	for k := range d.perTable() {
		words := t.slices[k]
		switch {
		case words != nil:
		case t.f.from != 0:
			words = make([]uint64, size/8)
			if err := d.readWords(ctx, words, t.f.from+k*size); err != nil {
				return err
			}
		case t.f.run.Zeroed:
			continue
		default:
			words = make([]uint64, size/8)
		}
		if err := d.writeWords(ctx, words, t.f.run.Off+k*size); err != nil {
			return err
		}
	}
	return nil
}

// readWords reads a part of a table; where the file ends within it the rest is
// zero.
func (d *disk) readWords(ctx context.Context, words []uint64, at int64) error {
	b := tableBuffers.Get().(*tableBuffer)
	defer tableBuffers.Put(b)
	p := b[:len(words)*8]
	if err := store.ReadPadded(ctx, d.st, p, at); err != nil {
		return err
	}
	for i := range words {
		words[i] = binary.BigEndian.Uint64(p[i*8:])
	}
	return nil
}

// reap frees what was unlinked by commits that are over, as far as no I/O is
// left that may use it.
func (d *disk) reap(ctx context.Context) {
	for len(d.quarantine) > 0 && d.quarantine[0].epoch.active.Load() == 0 {
		refs := d.quarantine[0].refs
		d.quarantine[0] = quarantined{}
		d.quarantine = d.quarantine[1:]
		if len(refs) == 0 {
			continue
		}
		if err := d.space.Release(ctx, refs); err != nil && !errors.Is(err, context.Canceled) {
			d.log.Warn("clusters that are free could not be released", "path", d.path, "error", err)
		}
	}
}

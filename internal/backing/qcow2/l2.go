package qcow2

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// mapping is the L1 table of a writable disk and what is in memory of its L2
// tables: pieces of them, called slices. What is guarded by mu must not be
// looked at without it; nothing waits for I/O while it holds mu.
type mapping struct {
	mu     sync.RWMutex
	l1     []uint64         // guarded by mu; as the guest sees it, ahead of the file
	slices map[int64]*slice // guarded by mu; by number
	clock  clock[*slice]    // guarded by mu; dirty slices are pinned
	dirty  []*slice         // guarded by mu; those that the last commit does not have

	// L2 tables by index in l1: fresh are not in the file yet; unnamed are,
	// and the L1 entry in the file does not name them yet.
	fresh   map[int64]*freshTable // guarded by mu
	unnamed map[int64]bool        // guarded by mu

	// linked: an entry names data since the last commit began. Guarded by mu.
	linked bool

	loading map[int64]*sliceLoad // guarded by mu; by number

	hits, misses atomic.Int64 // of lookups

	entries  int64 // of a slice
	coverage int64 // guest bytes of a slice
}

// slice is a piece of an L2 table, guarded by the mu of its mapping.
type slice struct {
	clockNode
	number int64           // its place among all slices of the disk
	words  []uint64        // one for each entry, or two
	dirty  bool            // changed since the last commit began
	busy   bool            // a commit is writing it
	bad    map[int64]error // entries that cannot be, nil for none
}

// freshTable is an L2 table that is not in the file yet.
type freshTable struct {
	run  space.Run // where it will be
	from int64     // the table that it is a copy of, 0 for an empty one

	entry uint64 // what the L1 table in the file has
}

// sliceLoad is a slice on its way. err is set before done is closed.
type sliceLoad struct {
	done chan struct{}
	err  error
}

// sliceCost is the memory of a slice without its words, roughly.
const sliceCost = 160

func (t *mapping) init(g *format.Geometry, l1 []byte, cacheBytes int64) {
	t.l1 = make([]uint64, len(l1)/8)
	for i := range t.l1 {
		t.l1[i] = be64(l1[i*8:])
	}
	t.entries = min(g.ClusterSize, limits.L2Slice) / g.EntrySize
	t.coverage = t.entries << g.ClusterBits
	t.slices, t.loading = map[int64]*slice{}, map[int64]*sliceLoad{}
	t.fresh, t.unnamed = map[int64]*freshTable{}, map[int64]bool{}
	if cacheBytes <= 0 {
		cacheBytes = limits.MapCache
	}
	t.clock.most = cacheBytes
}

// perTable is the number of slices of an L2 table.
func (d *disk) perTable() int64 { return d.g.L2Entries / d.m.entries }

// tableOf is the offset of the L2 table of a slice as it stands in memory, 0
// for none. With d.m.mu.
func (d *disk) tableOf(number int64) int64 {
	off, _, _ := d.g.DecodeL1(d.m.l1[number/d.perTable()]) // checked when the disk was opened
	return off
}

// place is where a slice is in the file, 0 for nowhere: it has no entries.
// With d.m.mu.
func (d *disk) place(number int64) int64 {
	off := d.tableOf(number)
	if f := d.m.fresh[number/d.perTable()]; f != nil {
		off = f.from
	}
	if off == 0 {
		return 0
	}
	return off + number%d.perTable()*d.m.entries*d.g.EntrySize
}

// load brings a slice into memory, once for all who ask meanwhile. It may be
// gone again when it returns.
func (d *disk) load(ctx context.Context, number int64) error {
	m := &d.m
	m.mu.Lock()
	if m.slices[number] != nil {
		m.mu.Unlock()
		return nil
	}
	if l := m.loading[number]; l != nil {
		m.mu.Unlock()
		select {
		case <-l.done:
			return l.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	at := d.place(number)
	l := &sliceLoad{done: make(chan struct{})}
	m.loading[number] = l
	m.mu.Unlock()

	s, err := d.readSlice(number, at)
	m.mu.Lock()
	delete(m.loading, number)
	if err == nil && m.slices[number] == nil {
		d.keep(s)
	}
	m.mu.Unlock()
	l.err = err
	close(l.done)
	if err == nil {
		for _, why := range s.bad {
			d.condemn(why)
			break
		}
	}
	return err
}

// keep puts a slice into memory. With d.m.mu.
func (d *disk) keep(s *slice) {
	m := &d.m
	m.slices[s.number] = s
	m.clock.add(s, sliceCost+int64(len(s.words))*8)
	s.touch()
	m.clock.pin(s)
	for old := range m.clock.evict(0) {
		delete(m.slices, old.number)
	}
	m.clock.unpin(s)
}

// Stats says how the mapping is cached: slices are its pages. What lies below
// is not in it.
func (d *disk) Stats() MapStats {
	d.m.mu.RLock()
	defer d.m.mu.RUnlock()
	return MapStats{
		Pages: int64(d.m.clock.count), Bytes: d.m.clock.bytes, Hits: d.m.hits.Load(), Misses: d.m.misses.Load(),
	}
}

// emptySlice has no entry set.
func (d *disk) emptySlice(number int64) *slice {
	return &slice{number: number, words: make([]uint64, d.m.entries*d.g.EntrySize/8)}
}

// readSlice reads a slice from the file and checks its entries. It does not
// heed any one caller's patience: others may wait for the same.
func (d *disk) readSlice(number, at int64) (*slice, error) {
	s := d.emptySlice(number)
	if at == 0 {
		return s, nil
	}
	if err := d.readWords(context.Background(), s.words, at); err != nil {
		return nil, err
	}
	for i := range d.m.entries {
		if err := d.checkEntry(s, i); err != nil {
			if s.bad == nil {
				s.bad = map[int64]error{}
			}
			s.bad[i] = err
		}
	}
	return s, nil
}

// words of entry i.
func (d *disk) entry(s *slice, i int64) (word, bitmap uint64) {
	if d.g.Extended {
		return s.words[2*i], s.words[2*i+1]
	}
	return s.words[i], 0
}

// cluster decodes entry i of a slice, which is none of the bad ones.
func (d *disk) cluster(s *slice, i int64) format.Cluster {
	c, _ := d.g.DecodeL2(d.entry(s, i)) // checked when the slice was read
	return c
}

// set changes entry i of a slice. With d.m.mu.
func (d *disk) set(s *slice, i int64, c format.Cluster) {
	word, bitmap := d.g.EncodeL2(c)
	if d.g.Extended {
		s.words[2*i], s.words[2*i+1] = word, bitmap
	} else {
		s.words[i] = word
	}
	d.soil(s)
}

// soil marks a slice as changed. With d.m.mu.
func (d *disk) soil(s *slice) {
	if !s.dirty {
		s.dirty = true
		d.m.dirty = append(d.m.dirty, s)
		d.m.clock.pin(s)
		d.commits.wind()
	}
}

// checkEntry says why entry i of a slice from the file cannot be.
func (d *disk) checkEntry(s *slice, i int64) error {
	c, err := d.g.DecodeL2(d.entry(s, i))
	guest := s.number*d.m.coverage + i<<d.g.ClusterBits
	switch {
	case err != nil:
	case c.Compressed:
		length := min(c.Length, d.end-c.Host)
		if length <= 0 || d.space.IsMeta(c.Host, length) {
			err = format.Corrupt(fmt.Sprintf("compressed data at %#x cannot be there", c.Host))
		}
	case !c.HasHost():
	case d.g.DataFile:
		if c.Host != guest {
			err = format.Corrupt(fmt.Sprintf("cluster at %#x of the data file has guest offset %#x", c.Host, guest))
		}
	case d.space.IsMeta(c.Host, d.g.ClusterSize):
		err = format.Corrupt(fmt.Sprintf("cluster at %#x lies in metadata", c.Host))
	}
	if err == nil {
		return nil
	}
	return &backing.Error{Op: "map", Path: d.path, Off: guest, Len: d.g.ClusterSize, Kind: backing.ErrIO, Err: err}
}

// lockSlice returns with d.m.mu locked and a slice in memory whose table may be
// written: one that is missing or shared with a snapshot has been replaced.
func (d *disk) lockSlice(ctx context.Context, number int64) (*slice, error) {
	for {
		d.m.mu.Lock()
		if s := d.m.slices[number]; s != nil {
			s.touch()
			err := d.own(number / d.perTable())
			if err == nil {
				return s, nil
			}
			d.m.mu.Unlock()
			if err := d.funded(ctx, err); err != nil {
				return nil, err
			}
			continue
		}
		d.m.mu.Unlock()
		if err := d.load(ctx, number); err != nil {
			return nil, err
		}
	}
}

// own makes the L2 table i one that the disk may write to. With d.m.mu.
func (d *disk) own(i int64) error {
	off, copied, _ := d.g.DecodeL1(d.m.l1[i])
	if off != 0 && copied {
		return nil
	}
	r, err := d.space.ReserveTable()
	if err != nil {
		return err
	}
	d.m.fresh[i] = &freshTable{run: r, from: off, entry: d.m.l1[i]}
	d.m.l1[i] = format.EncodeL1(r.Off, true)
	if off != 0 {
		d.unlink(space.Ref{Off: off, Len: d.g.ClusterSize})
	}
	d.commits.wind()
	return nil
}

// holed is the number of a slice that may have holes in the file.
type holed int64

func (holed) Error() string { return space.ErrUnfunded.Error() }

// mayChange answers holed where no entry of a slice may change before funded was
// called. With d.m.mu.
func (d *disk) mayChange(s *slice) error {
	if d.space.Funded(s.number) {
		return nil
	}
	return holed(s.number)
}

// funded gets host storage for metadata where err says that it is missing: nil
// is to try again. A host that is full is so for the guest's write, and not for
// the commit. What only changes entries takes no more than that: a trim of what
// has clusters finds their entries stored, and so passes when the host is full.
func (d *disk) funded(ctx context.Context, err error) error {
	if err == space.ErrUnfunded {
		return d.commits.exclusive(func() error { return d.space.Fund(ctx) })
	}
	number, ok := err.(holed)
	if !ok {
		return err
	}
	return d.commits.exclusive(func() error { return d.storeSlice(ctx, int64(number)) })
}

// storeSlice gets host storage for a slice of a table that the disk had at first.
// With commits.one.
func (d *disk) storeSlice(ctx context.Context, number int64) error {
	d.m.mu.RLock()
	at := d.place(number)
	d.m.mu.RUnlock()
	return d.space.FundSlice(ctx, number, space.Ref{Off: at, Len: d.m.entries * d.g.EntrySize})
}

package space

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// loadTable reads the refcount table, once.
func (s *Space) loadTable(ctx context.Context) error {
	k := &s.commit
	if k.loaded {
		return nil
	}
	if k.area.Len > format.MaxRefTable {
		return s.corrupt(k.area.Off>>s.g.ClusterBits, "begins a refcount table of %d bytes", k.area.Len)
	}
	p := make([]byte, k.area.Len)
	n, err := s.st.ReadAt(ctx, p, k.area.Off)
	if err != nil {
		return backing.WrapIn("read refcount table", "", k.area.Off, k.area.Len, err)
	}
	clear(p[n:])
	k.table = make([]uint64, len(p)/pointer)
	for i := range k.table {
		k.table[i] = binary.BigEndian.Uint64(p[i*pointer:])
	}
	k.loaded = true
	s.countSpare(s.max)
	return nil
}

// spareFor is how many clusters are kept for refcounts, of a device of as many as
// most, so that what is reserved can be counted: for each block that is not there,
// and for a table of more than the given entries, if the device needs it. The table
// wants them in a row, which is not promised. A file may always grow.
func (s *Space) spareFor(most, entries int64, has func(i int64) bool) int64 {
	if !s.fixed {
		return 0
	}
	n, blocks := int64(0), (most+s.g.BlockEntries-1)/s.g.BlockEntries
	for i := range blocks {
		if !has(i) {
			n++
		}
	}
	if entries < blocks {
		n += s.g.Clusters(blocks * pointer * limits.RefTableGrowth / 100)
	}
	return n
}

// countSpare counts anew, with the table, for as many clusters as most, which are
// handed out from then on.
func (s *Space) countSpare(most int64) {
	t := s.commit.table
	n := s.spareFor(most, int64(len(t)), func(i int64) bool { return i < int64(len(t)) && t[i] != 0 })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spare = n
	if most > s.max { // a device
		s.max = most
	}
	s.funds.entries = int64(len(t))
}

// block is the offset of refcount block i, 0 where there is none.
func (s *Space) block(i int64) (int64, error) {
	if i >= int64(len(s.commit.table)) {
		return 0, nil
	}
	off, err := s.g.DecodeRefTable(s.commit.table[i])
	if err != nil {
		return 0, s.corrupt(i*s.g.BlockEntries, "is in refcount block %d: %v", i, err)
	}
	if off>>s.g.ClusterBits >= s.limit {
		return 0, s.corrupt(i*s.g.BlockEntries, "is in refcount block %d, which lies beyond the image", i)
	}
	return off, nil
}

// newBlock makes block i, or what must be there before. It returns the blocks
// that count what it reserved.
func (s *Space) newBlock(ctx context.Context, i int64) (more []int64, err error) {
	if i >= int64(len(s.commit.table)) {
		return s.grow(ctx, i)
	}
	run, aside, err := s.blockRun(i)
	if err != nil {
		return nil, err
	}
	own := run.Off >> s.g.ClusterBits / s.g.BlockEntries
	turn, err := s.turn(own, i)
	if turn >= 0 && err == nil {
		if err = s.wipe(ctx, run); err == nil {
			s.commit.table[i] = uint64(run.Off)
			s.commit.fresh[i] = fresh{turn}
			s.mu.Lock()
			s.spare = max(0, s.spare-1)
			s.paidLocked(i, true)
			s.mu.Unlock()
			return []int64{own}, nil
		}
	}
	if aside {
		s.asideAgain(run)
	} else {
		s.Drop(run.Off, run.Len)
	}
	if err != nil {
		return nil, err
	}
	// The block that is to count this one comes first; it will find room in
	// its own part.
	return s.newBlock(ctx, own)
}

// blockRun reserves a cluster for block i, in its own part if there is room;
// of those that are aside if there are.
func (s *Space) blockRun(i int64) (r Run, aside bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.askLocked(s.g.ClusterSize); err != nil {
		return Run{}, false, err
	}
	if len(s.funds.aside) > 0 {
		return s.takeAsideLocked(i), true, nil
	}
	end := min((i+1)*s.g.BlockEntries, s.max)
	if c := s.used.NextAbsent(i*s.g.BlockEntries, end); c < end {
		hint := s.hint
		r := s.takeMetaLocked(c, c+1)
		s.hint = max(s.hint, hint)
		return r, false, nil
	}
	r, err = s.reserveMetaLocked(s.g.ClusterSize)
	return r, false, err
}

// turn is that of block i when block own counts it; -1 when there is no block
// own.
func (s *Space) turn(own, i int64) (int, error) {
	if own == i {
		return 0, nil
	}
	off, err := s.block(own)
	if err != nil || off == 0 {
		return -1, err
	}
	if f, ok := s.commit.fresh[own]; ok {
		return f.turn + 1, nil
	}
	return 0, nil
}

// wipe makes a run of the file exist and read as zeroes.
func (s *Space) wipe(ctx context.Context, r Run) error {
	if err := s.Extend(ctx, r.Off+r.Len); err != nil {
		return err
	}
	for at := r.Off; at < r.Off+r.Len; at += s.pieceSize() {
		delete(s.commit.pieces.clean, at)
	}
	if r.Zeroed {
		return nil
	}
	return s.put(ctx, make([]byte, r.Len), r.Off)
}

func (s *Space) put(ctx context.Context, p []byte, off int64) error {
	return backing.WrapIn("write refcounts", "", off, int64(len(p)), s.st.WriteAt(ctx, p, off, false))
}

// hook puts the fresh blocks into the table in the file. A block is durable
// before it is hooked, and so is the hook of the one that counts it.
func (s *Space) hook(ctx context.Context) error {
	k := &s.commit
	for turn := 0; len(k.fresh) > 0; turn++ {
		if err := s.sync(ctx); err != nil {
			return err
		}
		for _, i := range slices.Sorted(maps.Keys(k.fresh)) {
			if k.fresh[i].turn > turn {
				continue
			}
			b := binary.BigEndian.AppendUint64(nil, k.table[i])
			if err := s.put(ctx, b, k.area.Off+i*pointer); err != nil {
				return err
			}
		}
		maps.DeleteFunc(k.fresh, func(_ int64, f fresh) bool { return f.turn <= turn })
	}
	return nil
}

// tableSize is that of a refcount table with room for block i, in bytes.
func (s *Space) tableSize(i int64) int64 {
	entries := max(i+1, int64(len(s.commit.table))*limits.RefTableGrowth/100)
	return min(s.g.Clusters(entries*pointer)<<s.g.ClusterBits, format.MaxRefTable)
}

// tableRun reserves the n bytes of a table with room for block i.
func (s *Space) tableRun(i, n int64) (Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n/pointer <= i {
		return Run{}, s.noSpaceLocked(n)
	}
	return s.reserveMetaLocked(n)
}

// grow reserves a larger area for the table, with room for block i. It returns
// the blocks that count the area; where the table has no room for them, it
// grows once more.
func (s *Space) grow(ctx context.Context, i int64) (more []int64, err error) {
	k := &s.commit
	n := s.tableSize(i)
	run, err := s.tableRun(i, n)
	if err != nil {
		return nil, err
	}
	if err := s.fundRun(ctx, run); err != nil {
		s.Drop(run.Off, run.Len)
		return nil, err
	}
	if k.moved != nil {
		s.Drop(k.moved.Off, k.moved.Len)
	}
	k.moved = &run
	k.table = append(k.table, make([]uint64, n/pointer-int64(len(k.table)))...)
	s.countSpare(s.max)
	span := s.g.BlockEntries << s.g.ClusterBits
	for b := run.Off / span; b <= (run.Off+run.Len-1)/span; b++ {
		more = append(more, b)
	}
	return more, nil
}

// move writes the table to its new area, hooks that into the header, and with
// it all fresh blocks, and lets go of the old area. All pieces are written.
func (s *Space) move(ctx context.Context) error {
	k := &s.commit
	if err := s.Extend(ctx, k.moved.Off+k.moved.Len); err != nil {
		return err
	}
	p := make([]byte, 0, k.moved.Len)
	for _, e := range k.table {
		p = binary.BigEndian.AppendUint64(p, e)
	}
	if err := s.put(ctx, p, k.moved.Off); err != nil {
		return err
	}
	if err := s.sync(ctx); err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(k.moved.Off))
	b = binary.BigEndian.AppendUint32(b, uint32(k.moved.Len>>s.g.ClusterBits))
	k.header = true
	if err := s.put(ctx, b, format.OffRefTable); err != nil {
		return err
	}
	if err := s.sync(ctx); err != nil {
		return err
	}
	k.releases = append(k.releases, k.area)
	k.area, k.moved, k.header = Ref{k.moved.Off, k.moved.Len}, nil, false
	clear(k.fresh)
	return s.releaseAll(ctx)
}

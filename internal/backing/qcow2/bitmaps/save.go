package bitmaps

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/space"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Begun reports whether the disk may be written to: Begin has nothing to do.
func (s *Set) Begun() bool { return s.begun.Load() }

// Begin marks in the file, durably, all bitmaps that writes change, or should
// have changed: whoever finds the mark does not believe them. It has to have
// returned without an error before the first write to the disk, and before the
// first one after Save, Add or Enable; where Begun it does nothing. After an
// error it may be called again. Nobody else may change the header meanwhile.
func (s *Set) Begin(ctx context.Context) error {
	if s.begun.Load() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	return backing.Wrap("bitmaps", -1, 0, s.begin(ctx, s.toMark(false)))
}

func (s *Set) begin(ctx context.Context, marks map[*stored]bool) error {
	if len(marks) == 0 {
		s.begun.Store(true)
		return nil
	}
	s.changed = true
	dir, err := s.markedDirectory(marks)
	if err != nil {
		return err
	}
	head, err := readHead(ctx, s.st, s.g.ClusterSize)
	if err != nil {
		return err
	}
	// The directory may be torn while the bitmaps count as absent.
	if err := head.setValid(false); err != nil {
		return err
	}
	if err := s.st.WriteAt(ctx, dir, int64(s.h.Bitmaps.DirOffset), false); err != nil {
		return err
	}
	if err := s.st.Sync(ctx); err != nil {
		return err
	}
	if err := head.setValid(true); err != nil {
		return err
	}
	for e := range marks {
		e.entry.InUse = true
	}
	s.begun.Store(true)
	return nil
}

// toMark are the bitmaps in the file that are not marked and, unless all are
// asked for, are to be kept up to date, by what the file says or by what was
// said since.
func (s *Set) toMark(all bool) map[*stored]bool {
	marks := map[*stored]bool{}
	for _, e := range s.file {
		if (all || e.entry.Auto) && !e.entry.InUse {
			marks[e] = true
		}
	}
	for _, m := range s.all() {
		if e := m.stored; e != nil && m.auto.Load() && !e.entry.InUse {
			marks[e] = true
		}
	}
	return marks
}

// markedDirectory is the directory in the file with marks.
func (s *Set) markedDirectory(marks map[*stored]bool) ([]byte, error) {
	list := make([]format.Bitmap, len(s.file))
	for i, e := range s.file {
		list[i] = e.entry
		list[i].InUse = e.entry.InUse || marks[e]
	}
	dir, err := format.EncodeBitmaps(list)
	if err == nil && uint64(len(dir)) != s.h.Bitmaps.DirSize {
		err = errors.New("the bitmap directory has changed its length")
	}
	return dir, err
}

// Allocator is the account of host clusters of the image; offsets and lengths
// are in bytes. A space.Space is one.
type Allocator interface {
	ReserveMeta(n int64) (space.Run, error)
	Drop(off, n int64)
	Extend(ctx context.Context, end int64) error
	Write(ctx context.Context) error
	Release(ctx context.Context, refs []space.Ref) error
}

// Save makes the file hold the bitmaps as they are: bits, tables and directory
// go into fresh clusters, which become durable before the header names them,
// and those that it named before are given back to sp. The image then has
// consistent bitmaps, so that Begin has to come before the next write to the
// disk. Nothing is written where nothing has changed.
//
// No Mark, no write to the disk and nobody else who uses sp or changes the
// header may run meanwhile. After an error the file has the bitmaps as it had
// them before, or as they are, or none; when the header could not be written
// Begin and Save go on failing, else Save may be called again.
func (s *Set) Save(ctx context.Context, sp Allocator) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if s.mustSave() {
		v := &saver{s: s, ctx: ctx, sp: sp}
		if err := v.save(); err != nil {
			return backing.Wrap("bitmaps", -1, 0, err)
		}
	}
	if !s.freed {
		return nil
	}
	if err := sp.Write(ctx); err != nil {
		return backing.Wrap("bitmaps", -1, 0, err)
	}
	s.freed = false
	return nil
}

// mustSave reports whether the file says anything else than the memory.
func (s *Set) mustSave() bool {
	for _, m := range s.all() {
		if m.bits != nil && m.bits.changed.Load() {
			return true
		}
	}
	return s.changed
}

// saver is a Save in progress.
type saver struct {
	s    *Set
	ctx  context.Context
	sp   Allocator
	head *head

	runs  []space.Run // taken from sp
	next  []*stored   // for each bitmap, what it will be in the file
	dir   *format.BitmapsExtension
	freed []space.Ref // what the header will not lead to any more
}

func (v *saver) save() error {
	err := v.prepare()
	if err == nil {
		err = v.sp.Write(v.ctx)
	}
	if err == nil {
		err = v.s.st.Sync(v.ctx)
	}
	if err != nil {
		for _, r := range v.runs {
			v.sp.Drop(r.Off, r.Len)
		}
		return err
	}
	// Half of what follows is of no use.
	v.head.ctx = context.WithoutCancel(v.ctx)
	if err := v.publish(); err != nil {
		v.s.failed = backing.Wrap("bitmaps", -1, 0, err)
		return err
	}
	v.adopt()
	s := v.s
	s.freed = s.freed || len(v.freed) > 0
	return v.sp.Release(v.ctx, v.freed)
}

// prepare writes all that is new, where nothing leads to it.
func (v *saver) prepare() (err error) {
	s := v.s
	if v.head, err = readHead(v.ctx, s.st, s.g.ClusterSize); err != nil {
		return err
	}
	kept := map[*stored]bool{}
	for _, m := range s.all() {
		e := m.stored
		if e == nil || m.bits != nil && m.bits.changed.Load() {
			if e, err = v.store(m); err != nil {
				return err
			}
		} else {
			kept[e] = true
		}
		entry := e.entry
		if m.bits != nil {
			entry.InUse, entry.Auto = false, m.auto.Load()
		}
		v.next = append(v.next, &stored{entry, e.read, e.data})
	}
	if err := v.collect(kept); err != nil {
		return err
	}
	return v.directory()
}

// collect finds what becomes free: the directory, and the bitmaps in the file
// that are not kept.
func (v *saver) collect(kept map[*stored]bool) error {
	s := v.s
	if len(s.file) == 0 {
		return nil
	}
	v.free(int64(s.h.Bitmaps.DirOffset), int64(s.h.Bitmaps.DirSize))
	end, err := s.st.Size()
	if err != nil {
		return err
	}
	for _, e := range s.file {
		if kept[e] {
			continue
		}
		if !e.read {
			if _, err := s.readTable(v.ctx, e, end); err != nil {
				return err
			}
		}
		v.free(e.entry.TableOffset, int64(e.entry.TableEntries)*8)
		for _, off := range e.data {
			v.free(off, s.g.ClusterSize)
		}
	}
	return nil
}

// free notes n bytes that the header will not lead to any more.
func (v *saver) free(off, n int64) {
	if last := len(v.freed) - 1; last >= 0 && v.freed[last].Off+v.freed[last].Len == off {
		v.freed[last].Len += n
		return
	}
	v.freed = append(v.freed, space.Ref{Off: off, Len: n})
}

// reserve takes whole clusters for n bytes in a row.
func (v *saver) reserve(n int64) (space.Run, error) {
	n = v.s.g.Clusters(n) << v.s.g.ClusterBits
	r, err := v.sp.ReserveMeta(n)
	if err != nil {
		return space.Run{}, err
	}
	v.runs = append(v.runs, r)
	return r, v.sp.Extend(v.ctx, r.Off+r.Len)
}

// place writes p into fresh clusters, the rest of which is zero.
func (v *saver) place(p []byte) (off int64, err error) {
	r, err := v.reserve(int64(len(p)))
	if err != nil {
		return 0, err
	}
	p = append(p, make([]byte, r.Len-int64(len(p)))...)
	return r.Off, v.s.st.WriteAt(v.ctx, p, r.Off, false)
}

// store writes table and bits of m.
func (v *saver) store(m *bitmap) (*stored, error) {
	g := &v.s.g
	table := make([]uint64, g.Clusters(bytesOf(m.bits.n)))
	var data []int64 // indices of entries with bits of their own
	perEntry := g.ClusterSize * 8
	for i := range table {
		from := int64(i) * perEntry
		to := min(m.bits.n, from+perEntry)
		switch end, set := m.bits.run(from, to); {
		case end < to:
			data = append(data, int64(i))
		default:
			table[i] = format.EncodeBitmapTable(0, set)
		}
	}
	e := &stored{read: true}
	for len(data) > 0 {
		n := min(int64(len(data)), int64(max(1, limits.BitmapPiece>>g.ClusterBits)))
		if err := v.storeClusters(m.bits, data[:n], table, e); err != nil {
			return nil, err
		}
		data = data[n:]
	}
	b := make([]byte, 0, len(table)*8)
	for _, w := range table {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	off, err := v.place(b)
	e.entry = format.Bitmap{Name: m.name, TableOffset: off, TableEntries: uint32(len(table)),
		ExtraCompatible: m.extraCompat, GranularityBits: m.granularity, Extra: m.extra}
	return e, err
}

// storeClusters writes the bits of some entries of a table side by side, or
// wherever there is room for each.
func (v *saver) storeClusters(b *bitset, entries []int64, table []uint64, e *stored) error {
	size := v.s.g.ClusterSize
	r, err := v.reserve(int64(len(entries)) * size)
	if err != nil && len(entries) > 1 && errors.Is(err, backing.ErrNoSpace) {
		half := len(entries) / 2
		if err := v.storeClusters(b, entries[:half], table, e); err != nil {
			return err
		}
		return v.storeClusters(b, entries[half:], table, e)
	}
	if err != nil {
		return err
	}
	p := make([]byte, r.Len)
	for i, entry := range entries {
		at := int64(i) * size
		b.get(entry*size, p[at:at+size])
		table[entry] = format.EncodeBitmapTable(r.Off+at, false)
		e.data = append(e.data, r.Off+at)
	}
	return v.s.st.WriteAt(v.ctx, p, r.Off, false)
}

// directory writes the new directory, if there are bitmaps.
func (v *saver) directory() error {
	if len(v.next) == 0 {
		return nil
	}
	if err := v.head.room(); err != nil {
		return invalid("%v", err)
	}
	b, err := v.s.encodeDirectory(v.next)
	if err != nil {
		return err
	}
	off, err := v.place(b)
	v.dir = &format.BitmapsExtension{Count: uint32(len(v.next)), DirSize: uint64(len(b)), DirOffset: uint64(off)}
	return err
}

// encodeDirectory makes a directory that can be read again.
func (s *Set) encodeDirectory(list []*stored) ([]byte, error) {
	entries := make([]format.Bitmap, len(list))
	for i, e := range list {
		entries[i] = e.entry
	}
	b, err := format.EncodeBitmaps(entries)
	switch {
	case err != nil:
		return nil, invalid("%v", err)
	case len(b) > limits.BitmapDirectory:
		return nil, invalid("the bitmap directory of %d bytes is too large", len(b))
	}
	return b, nil
}

// publish makes the header name what was written.
func (v *saver) publish() error {
	if v.dir == nil {
		return v.head.forget()
	}
	return v.head.point(v.dir)
}

// adopt notes what the file says now.
func (v *saver) adopt() {
	s := v.s
	s.file, s.changed = v.next, false
	s.h.Bitmaps, s.h.BitmapsErr = v.dir, nil
	s.h.Autoclear &^= format.AutoclearBitmaps
	if v.dir != nil {
		s.h.Autoclear |= format.AutoclearBitmaps
	}
	s.h.StaleBitmaps = v.dir == nil && v.head.ext != 0
	for i, m := range s.all() {
		m.stored = v.next[i]
		if m.bits != nil {
			m.bits.changed.Store(false)
		}
	}
	s.begun.Store(len(s.toMark(false)) == 0)
}

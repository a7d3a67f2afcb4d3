package bitmaps

import (
	"context"
	"encoding/binary"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Load reads the bitmaps of the image in st, whose header is h and whose disk
// has size bytes. Where the header declares them not consistent there are none.
// It writes nothing. The Set keeps st and h; Begin and Save change the bitmaps
// and the autoclear bit of h as they change the file. What is wrong with the
// bitmaps is an error of the kind ErrInvalid; the disk can be read without
// them, and written to after Forget.
func Load(ctx context.Context, st store.Store, h *format.Header, size int64, o Options) (*Set, error) {
	s := newSet(st, h, size, o)
	if err := s.load(ctx); err != nil {
		return nil, backing.Wrap("bitmaps", -1, 0, err)
	}
	return s, nil
}

// Forget makes the image in st, whose header is h, one without bitmaps, durably. What
// they had are leaks then. The header is to be read anew. No Set may be in use.
func Forget(ctx context.Context, st store.Store, h *format.Header) error {
	g := h.Geometry()
	head, err := readHead(ctx, st, g.ClusterSize)
	if err == nil {
		err = head.forget()
	}
	return backing.Wrap("bitmaps", -1, 0, err)
}

func (s *Set) load(ctx context.Context) error {
	h := s.h
	if h.Autoclear&format.AutoclearBitmaps != 0 && h.BitmapsErr != nil {
		return invalid("%v", h.BitmapsErr)
	}
	if h.Autoclear&format.AutoclearBitmaps == 0 || h.Bitmaps == nil {
		s.setList(nil)
		return nil
	}
	end, err := s.st.Size()
	if err != nil {
		return err
	}
	entries, err := s.readDirectory(ctx, end)
	if err != nil {
		return err
	}
	list := make([]*bitmap, len(entries))
	for i := range entries {
		e := &entries[i]
		if err := s.checkEntry(e, end); err != nil {
			return err
		}
		m := &bitmap{name: e.Name, granularity: e.GranularityBits, extra: e.Extra,
			extraCompat: e.ExtraCompatible, stored: &stored{entry: *e}}
		m.auto.Store(e.Auto)
		list[i], s.file = m, append(s.file, m.stored)
		if !e.Usable() {
			s.log.Warn("bitmap cannot be used", "bitmap", e.Name, "in use", e.InUse)
			continue
		}
		if err := s.loadBits(ctx, m, end); err != nil {
			return err
		}
	}
	s.setList(list)
	return nil
}

// readDirectory reads the bitmap directory of a file of end bytes.
func (s *Set) readDirectory(ctx context.Context, end int64) ([]format.Bitmap, error) {
	x := s.h.Bitmaps
	if x.DirSize > limits.BitmapDirectory {
		return nil, invalid("the bitmap directory of %d bytes is too large", x.DirSize)
	}
	b, err := s.read(ctx, int64(x.DirOffset), int64(x.DirSize), end, "the bitmap directory")
	if err != nil {
		return nil, err
	}
	list, err := format.ParseBitmaps(b, int(x.Count))
	if err != nil {
		return nil, invalid("%v", err)
	}
	return list, nil
}

// read reads n bytes, which a file of end bytes must have.
func (s *Set) read(ctx context.Context, off, n, end int64, what string) ([]byte, error) {
	if off > end-n {
		return nil, invalid("%s at %#x lies beyond the end of the file", what, off)
	}
	p := make([]byte, n)
	got, err := s.st.ReadAt(ctx, p, off)
	if err != nil {
		return nil, err
	}
	if int64(got) < n {
		return nil, invalid("%s at %#x lies beyond the end of the file", what, off)
	}
	return p, nil
}

// checkEntry refuses a bitmap that does not suit the disk or the file.
func (s *Set) checkEntry(e *format.Bitmap, end int64) error {
	if err := e.Check(&s.g, s.size); err != nil {
		return invalid("%v", err)
	}
	if n := int64(e.TableEntries) * 8; e.TableOffset > end-n {
		return invalid("bitmap %q: the table at %#x lies beyond the end of the file", e.Name, e.TableOffset)
	}
	return nil
}

// bitsOf is how many bits cover a disk of size bytes.
func bitsOf(size int64, granularity uint8) int64 {
	gran := int64(1) << granularity
	return size/gran + min(1, size%gran)
}

// fixedCost is the memory of a bitmap without any page: what describes it, and
// a pointer for each page.
func fixedCost(n int64) int64 { return 512 + pagesOf(n)*8 }

// loadBits reads the table and the bits of m.
func (s *Set) loadBits(ctx context.Context, m *bitmap, end int64) error {
	n := bitsOf(s.size, m.granularity)
	m.fixed = fixedCost(n) + int64(m.stored.entry.TableEntries)*8
	if err := s.memory.take(m.fixed); err != nil {
		return err
	}
	table, err := s.readTable(ctx, m.stored, end)
	if err != nil {
		return err
	}
	m.bits, m.full = newBitset(n), m.auto.Load()
	if err := s.grow(m, s.pagesCost(table, len(m.stored.data))); err != nil {
		return err
	}
	perEntry := s.g.ClusterSize * 8
	for i := int64(0); i < int64(len(table)/8); i++ {
		off, ones, _ := s.g.DecodeBitmapTable(binary.BigEndian.Uint64(table[i*8:])) // checked by readTable
		switch {
		case ones:
			m.bits.mark(i*perEntry, min(n, (i+1)*perEntry))
		case off != 0:
			if err := s.loadCluster(ctx, m.bits, i*s.g.ClusterSize, off, end); err != nil {
				return err
			}
		}
	}
	m.bits.changed.Store(false)
	return nil
}

// pagesCost bounds the memory of the pages that a table with data clusters of
// bits makes, and how much of the file is read for them.
func (s *Set) pagesCost(table []byte, data int) int64 {
	full := int64(data)
	if s.g.ClusterSize < pageBytes {
		// A cluster of ones is a part of a page.
		for ; len(table) >= 8; table = table[8:] {
			if binary.BigEndian.Uint64(table)&1 != 0 {
				full++
			}
		}
	}
	return full*max(pageBytes, s.g.ClusterSize) + pageBytes
}

// grow accounts for n bytes of pages of m, or for all that m can have where
// that is less or where its bits may all be set one day.
func (s *Set) grow(m *bitmap, n int64) error {
	if all := pagesOf(m.bits.n) * pageBytes; m.full || n > all {
		n, m.full = all, true
	}
	if err := s.memory.take(n); err != nil {
		return err
	}
	m.pages += n
	return nil
}

// readTable reads the table of a bitmap and notes where its bits are. All
// entries are right, and lie in the file.
func (s *Set) readTable(ctx context.Context, e *stored, end int64) ([]byte, error) {
	n := int64(e.entry.TableEntries) * 8
	table, err := s.read(ctx, e.entry.TableOffset, n, end, "a bitmap table")
	if err != nil {
		return nil, err
	}
	var data []int64
	for i := int64(0); i < n; i += 8 {
		off, _, err := s.g.DecodeBitmapTable(binary.BigEndian.Uint64(table[i:]))
		if err != nil {
			return nil, invalid("bitmap %q: %v", e.entry.Name, err)
		}
		if off > end-1 {
			return nil, invalid("bitmap %q: bits at %#x lie beyond the end of the file", e.entry.Name, off)
		}
		if off != 0 {
			data = append(data, off)
		}
	}
	e.data, e.read = data, true
	return table, nil
}

// loadCluster reads the bits of one cluster, which begin at byte at of all.
func (s *Set) loadCluster(ctx context.Context, b *bitset, at, off, end int64) error {
	n := min(s.g.ClusterSize, bytesOf(b.n)-at)
	for done := int64(0); done < n; {
		step := min(limits.BitmapPiece, n-done)
		p, err := s.read(ctx, off+done, step, end, "bits of a bitmap")
		if err != nil {
			return err
		}
		b.put(at+done, append(p, make([]byte, -len(p)&7)...))
		done += step
	}
	return nil
}

package bitmaps

import (
	"slices"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// What the methods of this file change is kept by the next Save.

// defaultGranularity is QEMU's choice: a cluster, within 4 and 64 KiB.
func (s *Set) defaultGranularity() uint8 {
	return uint8(max(12, min(16, s.g.ClusterBits)))
}

// Add makes a bitmap without bits. A bit of it stands for 1<<granularityBits
// guest bytes, 0 means QEMU's default. With auto, writes that are marked from
// now on set bits. Errors are of the kind ErrInvalid.
func (s *Set) Add(name string, granularityBits uint8, auto bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if granularityBits == 0 {
		granularityBits = s.defaultGranularity()
	}
	if err := s.checkNew(name, granularityBits); err != nil {
		return err
	}
	n := bitsOf(s.size, granularityBits)
	m := &bitmap{name: name, granularity: granularityBits, bits: newBitset(n), full: auto, fixed: fixedCost(n)}
	m.auto.Store(auto)
	if err := s.memory.take(m.fixed); err != nil {
		return err
	}
	if err := s.grow(m, 0); err != nil {
		s.memory.used -= m.fixed
		return err
	}
	s.changed = true
	s.setList(append(slices.Clone(s.all()), m))
	return nil
}

// checkNew refuses a bitmap that the image cannot have.
func (s *Set) checkNew(name string, granularity uint8) error {
	switch {
	case s.g.Version < 3:
		return invalid("bitmaps need an image of version 3")
	case name == "" || len(name) > format.MaxBitmapName:
		return invalid("the name of a bitmap has 1 to %d bytes, not %d", format.MaxBitmapName, len(name))
	case !utf8.ValidString(name) || format.HasControl(name):
		return invalid("bitmap %q: the name is not plain text", name)
	case granularity < format.MinGranularityBits || granularity > format.MaxGranularityBits:
		return invalid("bitmap %q: granularity 2^%d, not 2^%d to 2^%d", name, granularity,
			format.MinGranularityBits, format.MaxGranularityBits)
	case s.size == 0:
		return invalid("bitmap %q: the disk is empty", name)
	case s.find(name) != nil:
		return invalid("there is a bitmap %q already", name)
	case len(s.all()) == format.MaxBitmaps:
		return invalid("there are %d bitmaps already", format.MaxBitmaps)
	case s.g.Clusters(bytesOf(bitsOf(s.size, granularity)))<<s.g.ClusterBits > format.MaxBitmapData:
		return invalid("bitmap %q: more than %d bytes of bits", name, format.MaxBitmapData)
	}
	return s.checkDirectory(name)
}

// checkDirectory refuses a name that the directory has no room for.
func (s *Set) checkDirectory(name string) error {
	list := []*stored{{entry: format.Bitmap{Name: name}}}
	for _, m := range s.all() {
		list = append(list, &stored{entry: format.Bitmap{Name: m.name, Extra: m.extra}})
	}
	_, err := s.encodeDirectory(list)
	return err
}

// Remove takes a bitmap away, also one that cannot be used.
func (s *Set) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.find(name)
	if m == nil {
		return invalid("there is no bitmap %q", name)
	}
	s.memory.used -= m.fixed + m.pages
	s.changed = true
	s.setList(slices.DeleteFunc(slices.Clone(s.all()), func(x *bitmap) bool { return x == m }))
	return nil
}

// Clear takes all bits of a bitmap away. A bit that is marked at the same time
// may stay.
func (s *Set) Clear(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.usable(name)
	if err != nil {
		return err
	}
	m.bits.clear()
	return nil
}

// Merge sets in dst all bits that are set in src. Where their granularities
// differ, dst covers at least what src does.
func (s *Set) Merge(dst, src string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	to, err := s.usable(dst)
	if err != nil {
		return err
	}
	from, err := s.usable(src)
	if err != nil {
		return err
	}
	if to == from {
		return nil
	}
	if err := s.growFull(to); err != nil {
		return err
	}
	for bit := int64(0); bit < from.bits.n; {
		end, set := from.bits.run(bit, from.bits.n)
		if set {
			stop := min(s.size, end<<from.granularity)
			to.bits.mark(bit<<from.granularity>>to.granularity, (stop-1)>>to.granularity+1)
		}
		bit = end
	}
	return nil
}

// growFull accounts for all bits that m can have.
func (s *Set) growFull(m *bitmap) error {
	if m.full {
		return nil
	}
	all := pagesOf(m.bits.n) * pageBytes
	if err := s.memory.take(all - m.pages); err != nil {
		return err
	}
	m.pages, m.full = all, true
	return nil
}

// Enable makes writes set bits from now on, Disable leaves the bits as they
// are.
func (s *Set) Enable(name string) error  { return s.setAuto(name, true) }
func (s *Set) Disable(name string) error { return s.setAuto(name, false) }

func (s *Set) setAuto(name string, on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.usable(name)
	if err != nil {
		return err
	}
	if m.auto.Load() == on {
		return nil
	}
	if on {
		if err := s.growFull(m); err != nil {
			return err
		}
	}
	m.auto.Store(on)
	s.changed = true
	s.setList(s.all())
	return nil
}

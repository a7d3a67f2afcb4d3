// Package bitmaps keeps the persistent dirty bitmaps of one qcow2 image
// (section "Bitmaps").
//
// They are read when the image is opened and kept in memory. Before the first
// write Begin marks those in the file that writes change, so that nobody
// believes them after a crash; Save puts all into fresh clusters and makes the
// header name them, which takes the mark away.
package bitmaps

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Prefix is what the name of a bitmap's metadata context begins with (QEMU's
// docs/interop/nbd.rst).
const Prefix = "qemu:dirty-bitmap:"

// Options of a Set.
type Options struct {
	Log   *slog.Logger // nil: slog.Default
	Limit int64        // bytes of memory for all bitmaps; 0: limits.BitmapMemory
}

// Set is the bitmaps of an image. All methods may be called at any time from
// any goroutine, unless they say otherwise.
type Set struct {
	st  store.Store
	g   format.Geometry
	log *slog.Logger

	list  atomic.Pointer[[]*bitmap] // in the order of the directory
	auto  atomic.Pointer[[]*bitmap] // those of list that Mark changes
	begun atomic.Bool

	// sizeMu guards size and the length of all bitmaps. Who holds mu may read
	// them without; both are held to change them.
	sizeMu sync.RWMutex
	size   int64 // of the disk in bytes

	mu      sync.Mutex // held by everything that changes the list or the file; before sizeMu
	h       *format.Header
	file    []*stored // guarded by mu: the directory in the file
	changed bool      // guarded by mu: list is not what the directory says
	freed   bool      // guarded by mu: what was given back counts as used in the file
	failed  error     // guarded by mu: it is not known what the header says
	memory  budget    // guarded by mu
}

// bitmap is one bitmap as it is now. It does not change but for auto.
type bitmap struct {
	name        string
	granularity uint8 // a bit stands for 1<<granularity guest bytes
	auto        atomic.Bool
	extra       []byte
	extraCompat bool

	bits *bitset // nil for one that cannot be used
	// fixed and pages are the memory that is accounted for, full says whether
	// that is enough for all its bits. Guarded by Set.mu.
	fixed, pages int64
	full         bool

	stored *stored // guarded by Set.mu: where it is in the file, or nil
}

// stored is a bitmap in the file.
type stored struct {
	entry format.Bitmap
	read  bool    // data is known
	data  []int64 // offsets of the clusters with its bits
}

// budget is memory that may still be taken.
type budget struct{ limit, used int64 }

func (b *budget) take(n int64) error {
	if n > b.limit-b.used {
		return invalid("the bitmaps take more than %d bytes of memory", b.limit)
	}
	b.used += n
	return nil
}

// invalid is an error about what an image has or is asked to have.
func invalid(text string, args ...any) error {
	return &backing.Error{Op: "bitmaps", Off: -1, Kind: backing.ErrInvalid, Err: fmt.Errorf(text, args...)}
}

func newSet(st store.Store, h *format.Header, size int64, o Options) *Set {
	s := &Set{st: st, h: h, g: h.Geometry(), size: size, log: o.Log, memory: budget{limit: o.Limit}}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.memory.limit == 0 {
		s.memory.limit = limits.BitmapMemory
	}
	return s
}

// setList makes list the bitmaps and finds those to keep up to date.
func (s *Set) setList(list []*bitmap) {
	var auto []*bitmap
	for _, m := range list {
		if m.bits != nil && m.auto.Load() {
			auto = append(auto, m)
		}
	}
	s.list.Store(&list)
	s.auto.Store(&auto)
	s.begun.Store(len(s.toMark(false)) == 0)
}

// all is the list; nobody changes it.
func (s *Set) all() []*bitmap { return *s.list.Load() }

// find is the bitmap of that name, or nil.
func (s *Set) find(name string) *bitmap {
	for _, m := range s.all() {
		if m.name == name {
			return m
		}
	}
	return nil
}

// usable finds a bitmap whose bits are known.
func (s *Set) usable(name string) (*bitmap, error) {
	m := s.find(name)
	switch {
	case m == nil:
		return nil, invalid("there is no bitmap %q", name)
	case m.bits == nil:
		return nil, invalid("bitmap %q is inconsistent", name)
	}
	return m, nil
}

// Names are the names of all bitmaps, also of those that cannot be used, as the
// file has them: quote them in a log.
func (s *Set) Names() []string {
	var names []string
	for _, m := range s.all() {
		names = append(names, m.name)
	}
	return names
}

// Info is what there is to know about a bitmap.
type Info struct {
	Name        string
	Granularity int64 // guest bytes for which a bit stands
	Auto        bool  // writes to the disk set bits
	Usable      bool  // its bits are known: it was stored after its last change
}

// List describes all bitmaps.
func (s *Set) List() []Info {
	var list []Info
	for _, m := range s.all() {
		list = append(list, Info{m.name, 1 << m.granularity, m.auto.Load(), m.bits != nil})
	}
	return list
}

// Exposed are the names of the metadata contexts of the bitmaps that clients
// may look at: on a writable disk those that writes do not change, on another
// all whose bits are known. At most limits.BitmapContexts; a name that is not
// text has none.
func (s *Set) Exposed(writable bool) []string {
	var names []string
	for _, m := range s.all() {
		hidden := m.bits == nil || writable && m.auto.Load() || !utf8.ValidString(m.name) || format.HasControl(m.name)
		switch {
		case hidden:
		case len(names) == limits.BitmapContexts:
			s.log.Warn("not all bitmaps are offered to clients", "offered", len(names))
			return names
		default:
			names = append(names, Prefix+m.name)
		}
	}
	return names
}

// Describe yields the dirty ranges of [off, off+n) with the value 1 and the
// clean ones with 0, no two of a kind in a row; it stops when yield says so.
// name is that of a metadata context, the range lies in the disk.
func (s *Set) Describe(name string, off, n int64, yield func(backing.Status) bool) error {
	name, found := strings.CutPrefix(name, Prefix)
	if !found {
		return invalid("no bitmap has the metadata context %q", name)
	}
	m, err := s.usable(name)
	if err != nil {
		return err
	}
	s.sizeMu.RLock()
	out := off < 0 || n < 0 || off > s.size-n
	s.sizeMu.RUnlock()
	if out {
		return backing.ErrOutOfRange
	}
	for end := off + n; off < end; {
		s.sizeMu.RLock()
		bit, set := m.bits.run(off>>m.granularity, (end-1)>>m.granularity+1)
		s.sizeMu.RUnlock()
		stop := min(end, bit<<m.granularity)
		var value uint32
		if set {
			value = 1
		}
		if !yield(backing.Status{Len: stop - off, Value: value}) {
			break
		}
		off = stop
	}
	return nil
}

// Tracking reports whether Mark has something to do.
func (s *Set) Tracking() bool { return len(*s.auto.Load()) > 0 }

// Mark sets the bits of a range that a write changes or may have changed, in
// all bitmaps that are kept up to date. A write is to be marked after Begin,
// before it is acknowledged; if it was done before it is marked, Clear loses
// none. It does not allocate where bits of the neighbourhood are set. Parts of
// the range that do not lie in the disk are ignored.
func (s *Set) Mark(off, n int64) {
	if !s.Tracking() {
		return
	}
	if off < 0 && n > 0 {
		off, n = 0, n+off
	}
	s.sizeMu.RLock()
	defer s.sizeMu.RUnlock()
	if n <= 0 || off >= s.size {
		return
	}
	end := off + min(n, s.size-off)
	for _, m := range *s.auto.Load() {
		m.bits.mark(off>>m.granularity, (end-1)>>m.granularity+1)
	}
}

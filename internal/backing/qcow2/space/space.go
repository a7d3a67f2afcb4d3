// Package space keeps the account of the clusters of a qcow2 image that is
// written: which are free, which hold metadata, which are known to be zero,
// and the refcounts of all in the file.
//
// What is reserved or dropped changes the account in memory at once and the
// refcounts in the file with the next Write. At every instant, whatever subset
// of the writes since the last Sync has landed, the refcount in the file is at
// least the number of references: a crash leaves leaks and no more.
package space

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/check"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/clusters"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

const (
	// hostBits bounds the offsets that the entries of an L2 table can name.
	hostBits = 56

	// pointer is the size of an entry of the refcount table in bytes.
	pointer = 8
)

// Run is a stretch of the file, whole clusters, in bytes.
type Run struct {
	Off, Len int64
	Zeroed   bool // the file reads as zeroes there, or ends before
}

// Ref is one reference to the bytes [Off, Off+Len) of the file.
type Ref struct{ Off, Len int64 }

// Space is the account of one image. Reserve, ReserveMeta, ReserveTable, Drop,
// IsMeta, Pending, Funded, Extend, Store and Zero are for any goroutine; Write,
// Release, Fund, FundSlice, Adopt and Trim for one at a time, which is called the
// commit. Lock order: extendMu, mu.
type Space struct {
	st    store.Store
	g     format.Geometry
	log   *slog.Logger
	fixed bool  // a block device: the size of the file cannot be changed here
	limit int64 // clusters that an image can have

	// max is how many clusters can be handed out: limit, or the device. That of a
	// device is guarded by mu, and changed by the commit, which reads it without.
	max int64

	mu   sync.Mutex
	used *clusters.Set // guarded by mu: not free
	meta *clusters.Set // guarded by mu: hold metadata, part of used
	zero clusters.Set  // guarded by mu: free and known to be zero, below virgin

	// The refcount of a cluster is what the refcount block, as the commit has
	// it, says, one more in raise, one less in lower; never is it in both.
	raise   clusters.Set       // guarded by mu
	lower   clusters.Set       // guarded by mu
	touched map[int64]struct{} // guarded by mu: blocks that raise and lower concern, by index

	hint   int64 // guarded by mu: where the next search begins
	top    int64 // guarded by mu: all clusters from here on are free
	virgin int64 // guarded by mu: from here on, nothing was ever handed out, and the file was not there
	spare  int64 // guarded by mu: free clusters kept for refcounts, on a device
	rest   bool  // guarded by mu: the commit has something to do besides touched
	bad    error // guarded by mu: the image is corrupt, for good
	funds  funds // guarded by mu

	extendMu sync.Mutex
	end      int64 // guarded by extendMu: the file reaches at least this far
	grown    bool  // guarded by extendMu: Extend moved the end

	commit commit
}

// New takes over the sets of r, which is a check of the image with header h in
// st that found no corruption. Nothing but Space may allocate in the image
// from then on. Errors: that of Size, ErrInvalid when r is not fit.
func New(st store.Store, h *format.Header, r *check.Report, log *slog.Logger) (*Space, error) {
	if r.Corruptions > 0 || r.Errors > 0 {
		return nil, &backing.Error{Op: "allocate", Off: -1, Kind: backing.ErrInvalid,
			Err: errors.New("the image is not known to be sound")}
	}
	size, err := st.Size()
	if err != nil {
		return nil, err
	}
	s := &Space{
		st: st, g: h.Geometry(), log: log, fixed: st.Fixed(),
		used: r.Used, meta: r.Meta, touched: map[int64]struct{}{}, end: size,
	}
	s.limit = min(1<<(hostBits-s.g.ClusterBits), format.MaxRefTable/pointer*s.g.BlockEntries)
	s.max = s.limit
	s.virgin = s.g.Clusters(size)
	if s.fixed {
		s.max = min(s.max, size>>s.g.ClusterBits)
		s.virgin = s.max
	}
	s.top = s.used.Last(s.limit) + 1
	s.commit = newCommit(Ref{int64(h.RefTableOffset), int64(h.RefTableClusters) << s.g.ClusterBits})
	s.spare = s.spareFor(s.max, s.commit.area.Len/pointer, func(i int64) bool {
		return s.used.HasAny(i*s.g.BlockEntries, s.g.BlockEntries)
	})
	return s, nil
}

// Reserve takes free clusters for n bytes, or for less: as many as there are
// in a row, one at least, all of them zeroed or none. Their refcount is 1 from
// the next Write on. Errors: ErrNoSpace, ErrInvalid, ErrUnfunded after Demand,
// and ErrIO once the image was found to be corrupt.
func (s *Space) Reserve(n int64) (Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.askLocked(n); err != nil {
		return Run{}, err
	}
	c, room := s.freeLocked(), s.roomLocked()
	if c >= s.max || room <= 0 {
		return Run{}, s.noSpaceLocked(n)
	}
	zeroed := s.zeroedLocked(c)
	want := min(s.g.Clusters(min(n, limits.ReserveRun)), room)
	end := s.used.Next(c, min(c+want, s.max))
	for e := c + 1; e < end; e++ {
		if s.zeroedLocked(e) != zeroed {
			end = e
		}
	}
	end, err := s.fundedLocked(c, end)
	if err != nil {
		return Run{}, err
	}
	return s.takeLocked(c, end), nil
}

// ReserveMeta takes free clusters for exactly n bytes, in a row, and marks
// them as metadata. They need not have storage, nor what counts them. Errors as
// of Reserve, without ErrUnfunded.
func (s *Space) ReserveMeta(n int64) (Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reserveMetaRoomLocked(n)
}

// reserveMetaRoomLocked leaves what is kept for refcounts.
func (s *Space) reserveMetaRoomLocked(n int64) (Run, error) {
	if s.bad == nil && s.g.Clusters(n) > s.roomLocked() {
		return Run{}, s.noSpaceLocked(n)
	}
	return s.reserveMetaLocked(n)
}

// reserveMetaLocked also takes what is kept for refcounts.
func (s *Space) reserveMetaLocked(n int64) (Run, error) {
	if err := s.askLocked(n); err != nil {
		return Run{}, err
	}
	want := s.g.Clusters(n)
	if want > s.max {
		return Run{}, s.noSpaceLocked(n)
	}
	c := s.gapLocked(s.hint, want)
	if c < 0 {
		c = s.gapLocked(0, want)
	}
	if c < 0 {
		return Run{}, s.noSpaceLocked(n)
	}
	return s.takeMetaLocked(c, c+want), nil
}

// askLocked says why n bytes cannot be asked for.
func (s *Space) askLocked(n int64) error {
	if s.bad != nil {
		return s.bad
	}
	if n <= 0 {
		return &backing.Error{Op: "allocate", Off: -1, Kind: backing.ErrInvalid, Err: fmt.Errorf("%d bytes", n)}
	}
	return nil
}

func (s *Space) noSpaceLocked(n int64) error {
	return &backing.Error{Op: "allocate", Off: -1, Kind: backing.ErrNoSpace,
		Err: fmt.Errorf("no room for %d bytes in an image of at most %d clusters", n, s.max)}
}

// roomLocked is how many clusters may be handed out.
func (s *Space) roomLocked() int64 { return s.max - s.used.Len() - s.spare }

// freeLocked is the next free cluster; max or more when there is none.
func (s *Space) freeLocked() int64 {
	if s.used.Len() >= s.top { // there are no gaps
		return s.top
	}
	end := min(s.top, s.max)
	if c := s.used.NextAbsent(s.hint, end); c < end {
		return c
	}
	if c := s.used.NextAbsent(0, end); c < end {
		return c
	}
	return s.top
}

// gapLocked is the first of n free clusters in a row, searched for from c on;
// -1 for none.
func (s *Space) gapLocked(c, n int64) int64 {
	for c = min(c, s.top); ; {
		if c = s.used.NextAbsent(c, s.top); c > s.max-n {
			return -1
		}
		next := s.used.Next(c, min(c+n, s.top))
		if next == c+n || next == s.top {
			return c
		}
		c = next
	}
}

func (s *Space) zeroedLocked(c int64) bool { return c >= s.virgin && !s.fixed || s.zero.Has(c) }

// takeLocked takes the free clusters of [from, to).
func (s *Space) takeLocked(from, to int64) Run {
	r := Run{Off: from << s.g.ClusterBits, Len: (to - from) << s.g.ClusterBits, Zeroed: true}
	for c := from; c < to; c++ {
		r.Zeroed = r.Zeroed && s.zeroedLocked(c)
		s.used.Add(c)
		s.zero.Remove(c)
		if !s.lower.Remove(c) {
			s.raise.Add(c)
			s.touched[c/s.g.BlockEntries] = struct{}{}
		}
	}
	for part := from / s.g.BlockEntries; part <= (to-1)/s.g.BlockEntries; part++ {
		s.oweLocked(part * s.g.BlockEntries)
	}
	s.hint, s.top, s.virgin = to, max(s.top, to), max(s.virgin, to)
	return r
}

func (s *Space) takeMetaLocked(from, to int64) Run {
	for c := from; c < to; c++ {
		s.meta.Add(c)
	}
	return s.takeLocked(from, to)
}

// Drop gives back clusters that were reserved and never linked, and to which
// no I/O is in flight. They are free at once.
func (s *Space) Drop(off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from, to, ok := s.touch(Ref{off, n})
	if !ok {
		s.corruptLocked(off>>s.g.ClusterBits, "is dropped and lies beyond the image")
		return
	}
	for c := from; c < to; c++ {
		s.dropLocked(c)
	}
	if s.hint == to {
		s.hint = from
	}
}

func (s *Space) dropLocked(c int64) {
	switch {
	case !s.used.Remove(c):
		s.corruptLocked(c, "is dropped and not in use")
		return
	case !s.raise.Remove(c):
		s.lower.Add(c)
		s.touched[c/s.g.BlockEntries] = struct{}{}
	}
	s.meta.Remove(c)
}

// IsMeta reports whether the n bytes at off touch metadata. What lies beyond
// every image does.
func (s *Space) IsMeta(off, n int64) bool {
	if n <= 0 {
		return false
	}
	from, to, ok := s.touch(Ref{off, n})
	if !ok {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta.HasAny(from, to-from)
}

// Pending reports whether Write has something to do.
func (s *Space) Pending() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pendingLocked()
}

func (s *Space) pendingLocked() bool { return s.rest || s.raise.Len() > 0 || s.lower.Len() > 0 }

// touch is the clusters [from, to) that r lies in; it is not ok when r lies
// beyond the image.
func (s *Space) touch(r Ref) (from, to int64, ok bool) {
	if r.Off < 0 || r.Len < 0 || r.Len > s.limit<<s.g.ClusterBits-r.Off {
		return 0, 0, false
	}
	if r.Len == 0 {
		return 0, 0, true
	}
	return r.Off >> s.g.ClusterBits, (r.Off+r.Len-1)>>s.g.ClusterBits + 1, true
}

// corruptLocked notes that cluster c is not as it must be, and returns the
// error that all calls have from now on.
func (s *Space) corruptLocked(c int64, text string, args ...any) error {
	if s.bad == nil {
		why := fmt.Sprintf(text, args...)
		s.bad = &backing.Error{Op: "allocate", Off: c << s.g.ClusterBits, Len: s.g.ClusterSize, Kind: backing.ErrIO,
			Err: format.Corrupt(fmt.Sprintf("cluster %d %s", c, why))}
		s.log.Error("the image is corrupt, nothing more is allocated", "cluster", c, "why", why)
	}
	return s.bad
}

func (s *Space) corrupt(c int64, text string, args ...any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.corruptLocked(c, text, args...)
}

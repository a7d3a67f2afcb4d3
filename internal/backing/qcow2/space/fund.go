package space

import (
	"context"
	"errors"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/clusters"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrUnfunded says that metadata to come has no storage on the host yet: Fund
// gets it.
var ErrUnfunded = errors.New("metadata has no storage")

// funds are what metadata to come will lie in. What is reserved is refused
// before a Write could find the host full: with each part of the image that
// gets its first cluster, a cluster for its refcount block is owed, and as many
// as are owed are set aside. A part is what one refcount block counts.
type funds struct {
	strict bool         // refuse what is not funded
	begun  bool         // the metadata that was there at first has its storage
	old    int64        // that before this cluster has; the commit's own
	stored clusters.Set // slices that have, by number

	aside   []int64      // clusters of used with storage, all zero, without a reference
	counted clusters.Set // parts that have a refcount block, by index
	owed    clusters.Set // parts that get one with the next Write
	need    int64        // clusters that must be aside: for those owed, and for the parts of aside
	entries int64        // of the refcount table, also of one that is to come
}

// slack is what is aside for one caller: an L2 table, and a refcount block for
// the part that its data lie in.
const slack = 2

// Demand has Reserve and ReserveTable answer ErrUnfunded from now on where the
// host may have no storage for the tables that this takes. On a device they
// never do.
func (s *Space) Demand() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.funds.strict = !s.fixed
}

// Funded reports whether metadata that was there at first has its storage: all of
// it, or the slice of that number. Else FundSlice gets it.
func (s *Space) Funded(slice int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.funds
	return !f.strict || f.begun || f.stored.Has(slice)
}

// FundSlice gets storage for r, metadata in use to which the caller gives a number.
// It is for the commit. Errors as of Store.
func (s *Space) FundSlice(ctx context.Context, slice int64, r Ref) error {
	if err := s.fundHoles(ctx, r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.funds.stored.Add(slice)
	return nil
}

func (s *Space) isStrict() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.funds.strict
}

// ReserveTable is ReserveMeta for one cluster that has its storage.
func (s *Space) ReserveTable() (Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.funds
	switch {
	case s.bad != nil || !f.strict:
		return s.reserveMetaRoomLocked(s.g.ClusterSize)
	case !f.begun || int64(len(f.aside)) <= f.need:
		return Run{}, ErrUnfunded
	}
	return s.takeAsideLocked(0), nil
}

// fundedLocked is how much of the free clusters [c, end) may be taken: what one
// refcount block counts.
func (s *Space) fundedLocked(c, end int64) (int64, error) {
	f := &s.funds
	if !f.strict {
		return end, nil
	}
	part := c / s.g.BlockEntries
	known := f.counted.Has(part) || f.owed.Has(part)
	if !f.begun || part >= f.entries || !known && int64(len(f.aside)) <= f.need {
		return c, ErrUnfunded
	}
	return min(end, (part+1)*s.g.BlockEntries), nil
}

// oweLocked notes that cluster c is to be counted.
func (s *Space) oweLocked(c int64) {
	f := &s.funds
	if part := c / s.g.BlockEntries; f.begun && !f.counted.Has(part) && f.owed.Add(part) {
		s.countNeedLocked()
	}
}

// paidLocked notes that a part owes no block any more; it may have one now.
func (s *Space) paidLocked(part int64, has bool) {
	if has {
		s.funds.counted.Add(part)
	}
	s.funds.owed.Remove(part)
	s.countNeedLocked()
}

// countNeedLocked counts need anew. aside is sorted.
func (s *Space) countNeedLocked() {
	f := &s.funds
	f.need = f.owed.Len()
	last := int64(-1)
	for _, c := range f.aside {
		part := c / s.g.BlockEntries
		if part != last && !f.counted.Has(part) && !f.owed.Has(part) {
			f.need++
		}
		last = part
	}
}

// takeAsideLocked takes a cluster that is aside, one of that part if there is.
func (s *Space) takeAsideLocked(part int64) Run {
	f, hint := &s.funds, s.hint
	i, _ := slices.BinarySearch(f.aside, part*s.g.BlockEntries)
	if i == len(f.aside) || f.aside[i]/s.g.BlockEntries != part {
		i = 0
	}
	c := f.aside[i]
	f.aside = slices.Delete(f.aside, i, i+1)
	s.used.Remove(c)
	r := s.takeMetaLocked(c, c+1)
	s.hint = hint
	s.countNeedLocked()
	return r
}

// asideAgain puts back what takeAsideLocked has taken and nobody has written.
func (s *Space) asideAgain(r Run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := r.Off >> s.g.ClusterBits
	s.dropLocked(c)
	s.addAsideLocked(c, c+1)
}

// addAsideLocked sets free clusters aside that have storage and are zero.
func (s *Space) addAsideLocked(from, to int64) {
	f := &s.funds
	for c := from; c < to; c++ {
		s.used.Add(c)
		s.zero.Add(c)
		f.aside = append(f.aside, c)
	}
	slices.Sort(f.aside)
	s.top, s.virgin = max(s.top, to), max(s.virgin, to)
	s.countNeedLocked()
}

// Fund gets the storage that Reserve and ReserveTable miss. It is for the
// commit. Errors: ErrNoSpace when the host is full, with nothing changed for
// others, and those of the file.
func (s *Space) Fund(ctx context.Context) error {
	if !s.isStrict() {
		return nil
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	defer s.settle()
	// A host that is full says so before the metadata that is there is searched.
	if err := s.fill(ctx, slack); err != nil {
		return err
	}
	if err := s.beginFunds(ctx); err != nil {
		return err
	}
	for {
		part, area := s.tableWants()
		if area == 0 {
			return nil
		}
		parts := area/s.g.BlockEntries + 2 // that the table itself lies in
		if err := s.fill(ctx, slack+parts); err != nil {
			return err
		}
		if _, err := s.grow(ctx, part); err != nil {
			return err
		}
	}
}

// beginFunds gets storage for the metadata that is there, and begins to count
// what is owed.
func (s *Space) beginFunds(ctx context.Context) error {
	if s.funds.begun {
		return nil
	}
	if err := s.fundOld(ctx); err != nil {
		return err
	}
	s.countOwed()
	return s.fill(ctx, slack)
}

func (s *Space) countOwed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.funds
	for i, e := range s.commit.table {
		if e != 0 {
			f.counted.Add(int64(i))
		}
	}
	f.begun = true
	for i := range s.touched {
		s.oweLocked(i * s.g.BlockEntries)
	}
	s.countNeedLocked()
}

// fundOld gets storage for the holes of all metadata there is: they are zero
// and stay so.
func (s *Space) fundOld(ctx context.Context) error {
	s.mu.Lock()
	end := s.meta.Last(s.top) + 1
	s.mu.Unlock()
	for old := &s.funds.old; ; {
		s.mu.Lock()
		from := s.meta.Next(*old, end)
		to := s.meta.NextAbsent(from, end)
		s.mu.Unlock()
		if from == end {
			return nil
		}
		if err := s.fundHoles(ctx, Ref{from << s.g.ClusterBits, (to - from) << s.g.ClusterBits}); err != nil {
			return err
		}
		*old = to
	}
}

// fundHoles gets storage for the holes of metadata in use. Some of them may have it
// already, and be counted on: nothing is given back.
func (s *Space) fundHoles(ctx context.Context, r Ref) error {
	if err := s.Extend(ctx, r.Off+r.Len); err != nil {
		return err
	}
	var holes []Ref
	at := r.Off
	err := s.st.Extents(ctx, r.Off, r.Len, func(e backing.Extent) bool {
		if e.Hole {
			holes = append(holes, Ref{at, e.Len})
		}
		at += e.Len
		return true
	})
	for _, h := range holes {
		if err == nil {
			err = s.Zero(ctx, h)
		}
	}
	return err
}

// fundRun gets storage for clusters that are metadata to come, if they must
// have it.
func (s *Space) fundRun(ctx context.Context, r Run) error {
	if !s.isStrict() {
		return nil
	}
	return s.Store(ctx, Ref{r.Off, r.Len})
}

// Store makes a range of clusters that nothing names yet zero, and gives it
// storage; after an error it has none. A block device has all of its storage, and
// is not written. Errors: those of Extend, and of the file.
func (s *Space) Store(ctx context.Context, r Ref) error {
	err := s.Zero(ctx, r)
	if err == nil {
		return nil
	}
	// A file system that has too little takes what there is before it says so: kept,
	// that would be missing for a smaller range, and for everybody on the host.
	if err := s.st.Punch(context.WithoutCancel(ctx), r.Off, r.Len); err != nil {
		s.log.Debug("a range without contents keeps its storage", "offset", r.Off, "length", r.Len, "error", err)
	}
	return err
}

// Zero is Store for clusters in use: after an error they have at least the storage
// that they had. What the file system took before stays as well, nothing tells it
// from theirs: to lseek(2) storage that was never written to is a hole.
func (s *Space) Zero(ctx context.Context, r Ref) error {
	if s.fixed {
		return nil
	}
	if err := s.Extend(ctx, r.Off+r.Len); err != nil {
		return err
	}
	return s.provide(ctx, r)
}

// provide makes a range of the file zero that has storage then: where the file
// cannot zero in place, such as on tmpfs, by writing.
func (s *Space) provide(ctx context.Context, r Ref) error {
	err := s.st.Zero(ctx, r.Off, r.Len)
	if !errors.Is(err, backing.ErrNotSupported) {
		return err
	}
	for end := r.Off + r.Len; r.Off < end; r.Off += int64(len(zeroes)) {
		if err := s.st.WriteAt(ctx, zeroes[:min(int64(len(zeroes)), end-r.Off)], r.Off, false); err != nil {
			return err
		}
	}
	return nil
}

// zeroes is what provide writes.
var zeroes [64 << 10]byte

// fill sets clusters aside until there are extra ones more than needed.
func (s *Space) fill(ctx context.Context, extra int64) error {
	for {
		s.mu.Lock()
		short := s.funds.need + extra - int64(len(s.funds.aside))
		s.mu.Unlock()
		if short <= 0 {
			return nil
		}
		err := s.setAside(ctx, max(short, limits.FundClusters))
		if errors.Is(err, backing.ErrNoSpace) && short < limits.FundClusters {
			err = s.setAside(ctx, short)
		}
		if err != nil {
			return err
		}
	}
}

// setAside gets storage for n clusters in a row.
func (s *Space) setAside(ctx context.Context, n int64) error {
	s.mu.Lock()
	c := s.gapLocked(s.hint, n)
	if c < 0 {
		c = s.gapLocked(0, n)
	}
	if c < 0 {
		defer s.mu.Unlock()
		return s.noSpaceLocked(n << s.g.ClusterBits)
	}
	for i := range n {
		s.used.Add(c + i)
	}
	top := s.top
	s.top = max(s.top, c+n)
	s.mu.Unlock()

	err := s.Store(ctx, Ref{c << s.g.ClusterBits, n << s.g.ClusterBits})
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.addAsideLocked(c, c+n)
		return nil
	}
	for i := range n {
		s.used.Remove(c + i)
	}
	if s.top == c+n {
		s.top = top
	}
	return err
}

// tableWants says which part the refcount table should have an entry for, and
// how many clusters a table with that takes; 0 for none.
func (s *Space) tableWants() (part, area int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	part = (s.top + limits.FundClusters) / s.g.BlockEntries
	if part < s.funds.entries || s.funds.entries == format.MaxRefTable/pointer {
		return part, 0
	}
	return part, s.tableSize(part) >> s.g.ClusterBits
}

// unsetAside gives back what is aside: all of it is free again. What lies
// before end of the file loses its storage, what lies behind has to be cut off.
func (s *Space) unsetAside(ctx context.Context) {
	s.mu.Lock()
	list := s.funds.aside
	s.funds.aside = nil
	s.funds.begun = false
	for _, c := range list {
		s.used.Remove(c)
	}
	s.mu.Unlock()
	for _, c := range list {
		if err := s.st.Punch(ctx, c<<s.g.ClusterBits, s.g.ClusterSize); err != nil {
			s.log.Debug("free clusters keep their storage", "cluster", c, "error", err)
		}
	}
}

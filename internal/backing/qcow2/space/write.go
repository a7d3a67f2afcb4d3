package space

import (
	"context"
	"maps"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// commit is what only the goroutine has that calls Write and Release.
type commit struct {
	pieces   pieces
	releases []Ref // asked for, not done

	loaded bool
	table  []uint64 // the refcount table, with what is yet to be hooked
	area   Ref      // where it is in the file
	fresh  map[int64]fresh
	moved  *Run // where it is to be
	header bool // the header may have the new place already
}

// fresh is a refcount block that the table in the file does not have. Its own
// refcount lies in a block of a lower turn or in itself; turn 0 also in a block
// that the table has.
type fresh struct{ turn int }

func newCommit(area Ref) commit {
	return commit{
		area:   area,
		pieces: pieces{clean: map[int64][]byte{}, dirty: map[int64][]byte{}},
		fresh:  map[int64]fresh{},
	}
}

// Write puts the refcounts of all that was reserved, dropped or released
// before the call into the file, and has the file reach all that was ever
// reserved: also clusters that are only there to be zero must not lie beyond
// its end. Nothing is durable but for the order that new refcount blocks need:
// the caller syncs. After an error all is pending and Write may be called
// again; ErrNoSpace is cured by Drop as well. Once it has found the image to be
// corrupt it always answers ErrIO.
func (s *Space) Write(ctx context.Context) error {
	s.mu.Lock()
	idle, bad, end := !s.pendingLocked(), s.bad, s.virgin<<s.g.ClusterBits
	s.mu.Unlock()
	if idle {
		return bad
	}
	defer s.settle()
	if err := s.Extend(ctx, end); err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	if err := s.releaseAll(ctx); err != nil {
		return err
	}
	for {
		if err := s.applyAll(ctx); err != nil {
			return err
		}
		if err := s.writeDirty(ctx); err != nil {
			return err
		}
		if s.commit.moved == nil {
			return s.hook(ctx)
		}
		if err := s.move(ctx); err != nil {
			return err
		}
	}
}

// begin makes the commit fit to work.
func (s *Space) begin(ctx context.Context) error {
	s.mu.Lock()
	err := s.bad
	s.mu.Unlock()
	if err == nil {
		err = s.loadTable(ctx)
	}
	if err == nil && s.commit.header {
		err = s.move(ctx)
	}
	return err
}

// settle tells Pending what the commit has left.
func (s *Space) settle() {
	k := &s.commit
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest = len(k.releases) > 0 || len(k.pieces.dirty) > 0 || len(k.fresh) > 0 || k.moved != nil
}

// applyAll puts raise and lower, as they are now, into the pieces, and so what
// is reserved on the way.
func (s *Space) applyAll(ctx context.Context) error {
	s.mu.Lock()
	work := slices.Sorted(maps.Keys(s.touched))
	s.mu.Unlock()
	for len(work) > 0 {
		i := work[len(work)-1]
		if !s.concerns(i) {
			work = work[:len(work)-1]
			continue
		}
		off, err := s.block(i)
		if err != nil {
			return err
		}
		if off == 0 {
			more, err := s.newBlock(ctx, i)
			if err != nil {
				return err
			}
			work = append(work, more...)
			continue
		}
		work = work[:len(work)-1]
		if err := s.apply(ctx, i, off); err != nil {
			return err
		}
	}
	return nil
}

// concerns reports whether block i has to change, and forgets it if not.
func (s *Space) concerns(i int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first, n := i*s.g.BlockEntries, s.g.BlockEntries; s.raise.HasAny(first, n) || s.lower.HasAny(first, n) {
		return true
	}
	delete(s.touched, i)
	s.paidLocked(i, false)
	return false
}

// apply puts what raise and lower have for block i, at off, into its pieces.
func (s *Space) apply(ctx context.Context, i, off int64) error {
	end := (i + 1) * s.g.BlockEntries
	for c := i * s.g.BlockEntries; ; {
		s.mu.Lock()
		c = min(s.raise.Next(c, end), s.lower.Next(c, end))
		s.mu.Unlock()
		if c >= end {
			return nil
		}
		if err := s.spill(ctx); err != nil {
			return err
		}
		at, first, last := s.piece(off, c)
		p, err := s.load(ctx, at)
		if err != nil {
			return err
		}
		if err := s.applyPiece(p, at, first, last); err != nil {
			return err
		}
		c = last
	}
}

// applyPiece puts what raise and lower have for [first, end) into piece p.
func (s *Space) applyPiece(p []byte, at, first, end int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := s.raise.Next(first, end); c < end; c = s.raise.Next(c+1, end) {
		if n := s.g.Refcount(p, c-first); n != 0 {
			return s.corruptLocked(c, "was free and has the refcount %d", n)
		}
	}
	for c := s.lower.Next(first, end); c < end; c = s.lower.Next(c+1, end) {
		if n := s.g.Refcount(p, c-first); n != 1 {
			return s.corruptLocked(c, "was reserved and has the refcount %d", n)
		}
	}
	for c := s.raise.Next(first, end); c < end; c = s.raise.Next(c+1, end) {
		s.raise.Remove(c)
		s.g.SetRefcount(p, c-first, 1)
	}
	for c := s.lower.Next(first, end); c < end; c = s.lower.Next(c+1, end) {
		s.lower.Remove(c)
		s.g.SetRefcount(p, c-first, 0)
	}
	s.commit.pieces.stain(at, p)
	return nil
}

// sync makes what was written durable.
func (s *Space) sync(ctx context.Context) error {
	return backing.WrapIn("sync refcounts", "", -1, 0, s.st.Sync(ctx))
}

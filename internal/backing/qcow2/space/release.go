package space

import "context"

// Release takes one reference from every cluster that each of refs touches.
// The removal of the reference must be durable, and no I/O to it be in flight.
// Clusters that have none left are punched and free. After an error the rest
// is done by the next Release or Write: refs must not be given again.
func (s *Space) Release(ctx context.Context, refs []Ref) error {
	s.commit.releases = append(s.commit.releases, refs...)
	if len(s.commit.releases) == 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.bad
	}
	defer s.settle()
	if err := s.begin(ctx); err != nil {
		return err
	}
	return s.releaseAll(ctx)
}

// releaseAll does what Release was asked for.
func (s *Space) releaseAll(ctx context.Context) error {
	k := &s.commit
	for len(k.releases) > 0 {
		r := &k.releases[0]
		from, to, ok := s.touch(*r)
		if !ok {
			return s.corrupt(r.Off>>s.g.ClusterBits, "is released and lies beyond the image")
		}
		for c := from; c < to; {
			end, err := s.releasePiece(ctx, c, to)
			if err != nil {
				return err
			}
			c = end
			rest := r.Off + r.Len - c<<s.g.ClusterBits
			*r = Ref{c << s.g.ClusterBits, max(0, rest)}
		}
		k.releases = k.releases[1:]
	}
	k.releases = nil
	return nil
}

// releasePiece releases clusters of [c, to) as far as one piece counts them,
// and returns the one after.
func (s *Space) releasePiece(ctx context.Context, c, to int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return c, err
	}
	if err := s.spill(ctx); err != nil {
		return c, err
	}
	var p []byte
	var at, first int64
	end := min(to, c/s.perPiece()*s.perPiece()+s.perPiece())
	if off, err := s.block(c / s.g.BlockEntries); err != nil {
		return c, err
	} else if off != 0 {
		at, first, _ = s.piece(off, c)
		if p, err = s.load(ctx, at); err != nil {
			return c, err
		}
	}
	free, err := s.decrement(p, at, first, c, end)
	if err != nil {
		return c, err
	}
	for _, r := range free {
		s.free(ctx, r)
	}
	return end, nil
}

// stretch is the clusters [from, to).
type stretch struct{ from, to int64 }

// decrement takes a reference from each cluster of [c, end) in piece p, which
// begins with first and is nil where there is no block. It returns those that
// have no more.
func (s *Space) decrement(p []byte, at, first, c, end int64) (free []stretch, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; c < end; c++ {
		left := uint64(0)
		if !s.raise.Remove(c) {
			if p != nil {
				left = s.g.Refcount(p, c-first)
			}
			if left == 0 || s.lower.Has(c) || !s.used.Has(c) {
				return free, s.corruptLocked(c, "is released and has no reference")
			}
			left--
			s.g.SetRefcount(p, c-first, left)
			s.commit.pieces.stain(at, p)
		}
		if left > 0 {
			continue
		}
		if n := len(free); n > 0 && free[n-1].to == c {
			free[n-1].to++
		} else {
			free = append(free, stretch{c, c + 1})
		}
	}
	return free, nil
}

// free punches clusters without references, then lets them be reserved.
func (s *Space) free(ctx context.Context, r stretch) {
	err := s.st.Punch(ctx, r.from<<s.g.ClusterBits, (r.to-r.from)<<s.g.ClusterBits)
	if err != nil {
		s.log.Debug("freed clusters keep their storage", "cluster", r.from, "n", r.to-r.from, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := r.from; c < r.to; c++ {
		s.used.Remove(c)
		s.meta.Remove(c)
		if err == nil && !s.fixed {
			s.zero.Add(c)
		}
	}
}

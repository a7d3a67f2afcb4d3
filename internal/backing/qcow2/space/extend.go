package space

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Extend makes the file reach at least end, so that no write within what was
// reserved moves its end: a sync of data alone then needs no new size. The
// file grows in larger steps. A block device has its size.
func (s *Space) Extend(ctx context.Context, end int64) error {
	if s.fixed {
		return nil
	}
	s.extendMu.Lock()
	defer s.extendMu.Unlock()
	if end <= s.end {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if end > s.max<<s.g.ClusterBits {
		return &backing.Error{Op: "extend", Off: end, Kind: backing.ErrOutOfRange}
	}
	size, err := s.st.Size()
	if err != nil {
		return err
	}
	s.end = max(s.end, size)
	if end <= s.end {
		return nil
	}
	step := min(max(s.end/limits.ExtendPart, limits.ExtendLeast), limits.ExtendMost)
	want := min(s.g.Clusters(end+step), s.max) << s.g.ClusterBits
	err = s.st.Truncate(want)
	if err != nil && want > end {
		want = end // the host may bound the size of files
		err = s.st.Truncate(want)
	}
	if err != nil {
		return backing.WrapIn("extend", "", end, 0, err)
	}
	s.end, s.grown = want, true
	return nil
}

// Adopt looks whether a block device has become larger, and has all of it handed
// out then. What cannot be asked is as it was. Errors: those of Write before it
// changes anything.
func (s *Space) Adopt(ctx context.Context) error {
	if !s.fixed {
		return nil
	}
	size, err := s.st.Size()
	most := min(s.limit, size>>s.g.ClusterBits)
	if err != nil || most <= s.max {
		return nil
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	s.countSpare(most)
	return nil
}

// Trim gives back what was set aside, and cuts the file behind the last cluster
// in use, if Extend grew it. Only when all is written and nothing is in flight:
// at close.
func (s *Space) Trim(ctx context.Context) error {
	s.extendMu.Lock()
	defer s.extendMu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	s.unsetAside(ctx)
	if s.fixed || !s.grown {
		return nil
	}
	s.mu.Lock()
	end, bad := (s.used.Last(s.top)+1)<<s.g.ClusterBits, s.bad
	s.mu.Unlock()
	if bad != nil || end >= s.end {
		return bad
	}
	if err := s.st.Truncate(end); err != nil {
		return backing.WrapIn("trim", "", end, 0, err)
	}
	s.end, s.grown = end, false
	return nil
}

package client

import (
	"slices"
	"sort"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// span is a range of a read that has arrived.
type span struct{ start, end uint64 }

// spans is the part of a read that has arrived: sorted, apart, none empty.
type spans struct {
	list []span
	n    uint64 // bytes in all
}

// add notes n bytes at start. A byte that arrives twice is an error, and so
// are more than limits.MaxSpans ranges with gaps between them.
func (s *spans) add(start, n uint64) error {
	end := start + n
	i := sort.Search(len(s.list), func(i int) bool { return s.list[i].end >= start })
	// list[i] is the first that ends at start or behind it.
	join := i < len(s.list) && s.list[i].end == start
	next := i
	if join {
		next++
	}
	if next < len(s.list) && s.list[next].start < end {
		return violation("bytes %d+%d of a read overlap others", start, n)
	}
	s.n += n
	meet := next < len(s.list) && s.list[next].start == end
	switch {
	case join && meet:
		s.list[i].end = s.list[next].end
		s.list = slices.Delete(s.list, next, next+1)
	case join:
		s.list[i].end = end
	case meet:
		s.list[next].start = start
	case len(s.list) == limits.MaxSpans:
		return violation("a read arrives in more than %d pieces", limits.MaxSpans)
	default:
		s.list = slices.Insert(s.list, i, span{start, end})
	}
	return nil
}

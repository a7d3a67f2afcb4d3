package layer

import (
	"cmp"
	"context"
	"slices"
	"sort"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ProtectOptions name what must not be changed.
type ProtectOptions struct {
	// Ranges may overlap, and may reach beyond the end of the disk, which
	// then protects what it grows by.
	Ranges []Range
}

// Protect refuses changes of some ranges with ErrReadOnly. A request that
// touches one of them changes nothing at all.
type Protect struct {
	backing.Transparent
	ranges []Range // sorted, apart from each other
}

// NewProtect protects ranges of dev: at most limits.ProtectRanges, none of them
// empty, else ErrInvalid.
func NewProtect(dev backing.Device, o ProtectOptions) (*Protect, error) {
	if len(o.Ranges) > limits.ProtectRanges {
		return nil, invalid("protect", "more than %d ranges", limits.ProtectRanges)
	}
	for _, r := range o.Ranges {
		if !r.valid() {
			return nil, invalid("protect", "range %d+%d", r.Off, r.Len)
		}
	}
	return &Protect{Transparent: over(dev), ranges: merge(slices.Clone(o.Ranges))}, nil
}

// merge sorts ranges and joins those that overlap or touch.
func merge(list []Range) []Range {
	slices.SortFunc(list, func(a, b Range) int { return cmp.Compare(a.Off, b.Off) })
	var out []Range
	for _, r := range list {
		if n := len(out); n > 0 && r.Off <= out[n-1].Off+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, r.Off+r.Len-out[n-1].Off)
			continue
		}
		out = append(out, r)
	}
	return out
}

// protected tells whether the range has a byte that must not be changed.
func (l *Protect) protected(off, n int64) bool {
	i := sort.Search(len(l.ranges), func(i int) bool { return l.ranges[i].Off+l.ranges[i].Len > off })
	return i < len(l.ranges) && overlap(off, n, l.ranges[i].Off, l.ranges[i].Len)
}

func (l *Protect) refuse(op string, off, n int64) error {
	return &backing.Error{Op: op, Off: off, Len: n, Kind: backing.ErrReadOnly}
}

func (l *Protect) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if n := int64(len(p)); l.protected(off, n) {
		return l.refuse("write", off, n)
	}
	return l.Next.WriteAt(ctx, p, off, f)
}

func (l *Protect) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if l.protected(off, n) {
		return l.refuse("zero", off, n)
	}
	return l.Next.Zero(ctx, off, n, f)
}

func (l *Protect) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	if l.protected(off, n) {
		return l.refuse("trim", off, n)
	}
	return l.Next.Trim(ctx, off, n, f)
}

// Map forwards reads, and writes that change nothing protected.
func (l *Protect) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op != engine.OpRead && l.protected(off, n) {
		return backing.ErrReadOnly
	}
	return l.Next.Map(op, off, n, m)
}

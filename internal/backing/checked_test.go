package backing_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// recorder notes the calls that reach it and answers err.
type recorder struct {
	info  backing.Info
	err   map[string]error // by operation
	calls []string
}

func (r *recorder) note(op string, off, n int64, f backing.Flags) error {
	r.calls = append(r.calls, fmt.Sprintf("%s %d+%d %d", op, off, n, f))
	return r.err[op]
}

func (r *recorder) Info() backing.Info { return r.info }
func (r *recorder) ReadAt(_ context.Context, p []byte, off int64) error {
	return r.note("read", off, int64(len(p)), 0)
}
func (r *recorder) WriteAt(_ context.Context, p []byte, off int64, f backing.Flags) error {
	return r.note("write", off, int64(len(p)), f)
}
func (r *recorder) Zero(_ context.Context, off, n int64, f backing.Flags) error {
	return r.note("zero", off, n, f)
}
func (r *recorder) Trim(_ context.Context, off, n int64, f backing.Flags) error {
	return r.note("trim", off, n, f)
}
func (r *recorder) Flush(context.Context) error { return r.note("flush", 0, 0, 0) }
func (r *recorder) Cache(_ context.Context, off, n int64) error {
	return r.note("cache", off, n, 0)
}
func (r *recorder) Extents(_ context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	yield(backing.Extent{Len: n, Hole: true, Zero: true})
	return r.note("extents", off, n, f)
}
func (r *recorder) Map(op engine.Op, off, n int64, _ *backing.Mapping) error {
	return r.note("map "+op.String(), off, n, 0)
}
func (r *recorder) Close() error { return r.note("close", 0, 0, 0) }

const allCaps = backing.CanWrite | backing.CanFlush | backing.CanFUA | backing.CanTrim | backing.CanZero |
	backing.CanFastZero | backing.CanCache | backing.CanExtents | backing.CanMultiConn

// ranged are all calls that take a range.
var ranged = map[string]func(*backing.Checked, int64, int64, backing.Flags) error{
	"read": func(c *backing.Checked, off, n int64, _ backing.Flags) error {
		return c.ReadAt(context.Background(), make([]byte, n), off)
	},
	"write": func(c *backing.Checked, off, n int64, f backing.Flags) error {
		return c.WriteAt(context.Background(), make([]byte, n), off, f)
	},
	"zero": func(c *backing.Checked, off, n int64, f backing.Flags) error {
		return c.Zero(context.Background(), off, n, f)
	},
	"trim": func(c *backing.Checked, off, n int64, f backing.Flags) error {
		return c.Trim(context.Background(), off, n, f)
	},
	"cache": func(c *backing.Checked, off, n int64, _ backing.Flags) error {
		return c.Cache(context.Background(), off, n)
	},
	"extents": func(c *backing.Checked, off, n int64, f backing.Flags) error {
		return c.Extents(context.Background(), off, n, f, func(backing.Extent) bool { return true })
	},
	"map read": func(c *backing.Checked, off, n int64, _ backing.Flags) error {
		return c.Map(engine.OpRead, off, n, new(backing.Mapping))
	},
	"map write": func(c *backing.Checked, off, n int64, _ backing.Flags) error {
		return c.Map(engine.OpWrite, off, n, new(backing.Mapping))
	},
}

func TestCheckedRanges(t *testing.T) {
	const size, block = 10240, 512
	for _, tt := range []struct {
		off, n int64
		want   error
	}{
		{0, block, nil}, {0, size, nil}, {size - block, block, nil},
		{0, 0, backing.ErrInvalid},
		{size, block, backing.ErrOutOfRange}, {size - block, 2 * block, backing.ErrOutOfRange},
		{0, size + block, backing.ErrOutOfRange}, {math.MaxInt64 - 511, block, backing.ErrOutOfRange},
		{1, block, backing.ErrAlignment}, {0, 511, backing.ErrAlignment}, {block, 513, backing.ErrAlignment},
	} {
		for name, call := range ranged {
			r := &recorder{info: backing.Info{Size: size, MinBlock: block, Preferred: 4096, Caps: allCaps}}
			err := call(backing.NewChecked(r, 0), tt.off, tt.n, 0)
			if !errors.Is(err, tt.want) {
				t.Errorf("%s at %d+%d: got %v, want %v", name, tt.off, tt.n, err, tt.want)
			}
			if (len(r.calls) == 1) != (tt.want == nil) {
				t.Errorf("%s at %d+%d: the device saw %q", name, tt.off, tt.n, r.calls)
			}
		}
	}
}

func TestCheckedNumbersTooLargeForTheWire(t *testing.T) {
	for name, call := range ranged {
		if name == "read" || name == "write" {
			continue // the length of a slice is what it is
		}
		for _, x := range [][2]int64{{-1, 512}, {0, -1}, {math.MinInt64, math.MinInt64}, {math.MaxInt64, math.MaxInt64}} {
			r := &recorder{info: backing.Info{Size: 10240, MinBlock: 1, Caps: allCaps}}
			if err := call(backing.NewChecked(r, 0), x[0], x[1], 0); err == nil || len(r.calls) != 0 {
				t.Errorf("%s at %d+%d: got %v, the device saw %q", name, x[0], x[1], err, r.calls)
			}
		}
	}
}

func TestCheckedFlags(t *testing.T) {
	all := backing.FUA | backing.NoHole | backing.FastZero | backing.ReqOne | backing.AsRead | backing.Partial
	allowed := map[string]backing.Flags{
		"write": backing.FUA, "zero": backing.FUA | backing.NoHole | backing.FastZero,
		"trim": backing.FUA, "extents": backing.ReqOne | backing.AsRead | backing.Partial,
	}
	for name, ok := range allowed {
		for f := range all << 1 {
			r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
			err := ranged[name](backing.NewChecked(r, 0), 0, 512, f)
			if f&^ok == 0 && err != nil || f&^ok != 0 && !errors.Is(err, backing.ErrInvalid) {
				t.Errorf("%s with flags %#x: got %v", name, f, err)
			}
			if want := fmt.Sprintf("%s 0+512 %d", name, f); err == nil && r.calls[0] != want {
				t.Errorf("%s with flags %#x: the device saw %q, want %q", name, f, r.calls, want)
			}
		}
	}
}

func TestCheckedCapabilities(t *testing.T) {
	for _, tt := range []struct {
		call string
		f    backing.Flags
		deny backing.Caps
		want error
	}{
		{"write", 0, backing.CanWrite, backing.ErrReadOnly},
		{"zero", 0, backing.CanWrite, backing.ErrReadOnly},
		{"trim", 0, backing.CanWrite, backing.ErrReadOnly},
		{"map write", 0, backing.CanWrite, backing.ErrReadOnly},
		{"read", 0, backing.CanWrite, nil},
		{"map read", 0, backing.CanWrite, nil},
		{"extents", 0, backing.CanWrite, nil},
		{"write", backing.FUA, backing.CanFUA, backing.ErrInvalid},
		{"zero", backing.FUA, backing.CanFUA, backing.ErrInvalid},
		{"trim", backing.FUA, backing.CanFUA, backing.ErrInvalid},
		{"write", 0, backing.CanFUA, nil},
		{"trim", 0, backing.CanTrim, backing.ErrInvalid},
		{"zero", backing.FastZero, backing.CanFastZero, backing.ErrInvalid},
		{"zero", 0, backing.CanFastZero, nil},
	} {
		r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
		err := ranged[tt.call](backing.NewChecked(r, tt.deny), 0, 512, tt.f)
		if !errors.Is(err, tt.want) || (err == nil) != (len(r.calls) == 1) {
			t.Errorf("%s with flags %#x without %#x: got %v, want %v; the device saw %q",
				tt.call, tt.f, tt.deny, err, tt.want, r.calls)
		}
	}
}

func TestCheckedReadOnlyViewTellsOfNoChange(t *testing.T) {
	r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
	got := backing.NewChecked(r, backing.CanWrite).Info().Caps
	want := backing.CanFlush | backing.CanCache | backing.CanExtents | backing.CanMultiConn
	if got != want {
		t.Errorf("caps of a read-only view: got %#x, want %#x", got, want)
	}
}

func TestCheckedKeepsTheSizeItTold(t *testing.T) {
	r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
	c := backing.NewChecked(r, 0)
	r.info.Size = 1024
	if err := c.ReadAt(t.Context(), make([]byte, 512), 512); !errors.Is(err, backing.ErrOutOfRange) {
		t.Errorf("read of what the device grew by: got %v, want %v", err, backing.ErrOutOfRange)
	}
	if err := backing.NewChecked(r, 0).ReadAt(t.Context(), make([]byte, 512), 512); err != nil {
		t.Errorf("read through a new view: %v", err)
	}
}

func TestCheckedCloseLeavesTheDeviceOpen(t *testing.T) {
	r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
	if err := backing.NewChecked(r, 0).Close(); err != nil || len(r.calls) != 0 {
		t.Errorf("close: got %v, the device saw %q", err, r.calls)
	}
}

// TestCheckedCutsAHint: one request that costs its sender nothing may name the whole
// of any disk.
func TestCheckedCutsAHint(t *testing.T) {
	for n, want := range map[int64]string{
		4096:                 fmt.Sprintf("cache 4096+%d 0", 4096),
		limits.CacheMost:     fmt.Sprintf("cache 4096+%d 0", limits.CacheMost),
		limits.CacheMost + 1: fmt.Sprintf("cache 4096+%d 0", limits.CacheMost),
		1 << 60:              fmt.Sprintf("cache 4096+%d 0", limits.CacheMost),
	} {
		r := &recorder{info: backing.Info{Size: 1 << 62, MinBlock: 1, Caps: allCaps}}
		if err := backing.NewChecked(r, 0).Cache(t.Context(), 4096, n); err != nil || !slices.Equal(r.calls, []string{want}) {
			t.Errorf("cache of %d bytes: got %v, the device saw %q, want %q", n, err, r.calls, want)
		}
	}
}

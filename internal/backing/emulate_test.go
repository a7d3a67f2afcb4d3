package backing_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/backingtest"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func emulated(caps backing.Caps, errs map[string]error) (*backing.Emulate, *recorder) {
	r := &recorder{info: backing.Info{Size: 1 << 30, MinBlock: 1, Preferred: 4096, Caps: caps}, err: errs}
	return backing.NewEmulate(r), r
}

func TestEmulateAddsWhatItCanMake(t *testing.T) {
	for _, tt := range []struct{ native, want backing.Caps }{
		{0, backing.CanExtents | backing.CanCache | backing.CanFlush},
		{backing.CanWrite, backing.CanWrite | backing.CanZero | backing.CanFUA | backing.CanTrim |
			backing.CanExtents | backing.CanCache | backing.CanFlush},
		{allCaps, allCaps},
	} {
		if e, _ := emulated(tt.native, nil); e.Info().Caps != tt.want {
			t.Errorf("caps over %#x: got %#x, want %#x", tt.native, e.Info().Caps, tt.want)
		}
	}
}

// TestEmulateCalls names what reaches the device for each call and capability.
func TestEmulateCalls(t *testing.T) {
	const w = backing.CanWrite
	unsupported := func(op string) map[string]error { return map[string]error{op: backing.ErrNotSupported} }
	full := backing.NoHole | backing.FUA
	for _, tt := range []struct {
		name   string
		native backing.Caps
		errs   map[string]error
		do     string
		n      int64
		f      backing.Flags
		want   []string
		err    error
	}{
		{"plain write", w, nil, "write", 512, 0, []string{"write 0+512 0"}, nil},
		{"FUA write natively", w | backing.CanFUA, nil, "write", 512, backing.FUA, []string{"write 0+512 1"}, nil},
		{"FUA write by flush", w, nil, "write", 512, backing.FUA, []string{"write 0+512 0", "flush 0+0 0"}, nil},
		{"failed write is not flushed", w, map[string]error{"write": backing.ErrIO}, "write", 512, backing.FUA, []string{"write 0+512 0"}, backing.ErrIO},
		{"zero natively", w | backing.CanZero | backing.CanFUA, nil, "zero", 512, full, []string{"zero 0+512 3"}, nil},
		{"zero natively, FUA by flush", w | backing.CanZero, nil, "zero", 512, full, []string{"zero 0+512 2", "flush 0+0 0"}, nil},
		{"zero by writes", w, nil, "zero", 600 << 10, 0, []string{"write 0+262144 0", "write 262144+262144 0", "write 524288+90112 0"}, nil},
		{"zero by writes, FUA by one flush", w | backing.CanFUA, nil, "zero", 512, backing.FUA, []string{"write 0+512 0", "flush 0+0 0"}, nil},
		{"zero that turns out to be unsupported", w | backing.CanZero, unsupported("zero"), "zero", 512, 0, []string{"zero 0+512 0", "write 0+512 0"}, nil},
		{"fast zero that is unsupported", w | backing.CanZero, unsupported("zero"), "zero", 512, backing.FastZero, []string{"zero 0+512 4"}, backing.ErrNotSupported},
		{"fast zero without native zero", w, nil, "zero", 512, backing.FastZero, nil, backing.ErrNotSupported},
		{"zero that fails", w | backing.CanZero, map[string]error{"zero": backing.ErrNoSpace}, "zero", 512, 0, []string{"zero 0+512 0"}, backing.ErrNoSpace},
		{"trim natively", w | backing.CanTrim | backing.CanFUA, nil, "trim", 512, backing.FUA, []string{"trim 0+512 1"}, nil},
		{"trim natively, FUA by flush", w | backing.CanTrim, nil, "trim", 512, backing.FUA, []string{"trim 0+512 0", "flush 0+0 0"}, nil},
		{"trim by nothing", w, nil, "trim", 512, 0, nil, nil},
		{"trim by nothing, FUA by flush", w, nil, "trim", 512, backing.FUA, []string{"flush 0+0 0"}, nil},
		{"trim that is unsupported", w | backing.CanTrim | backing.CanFUA, unsupported("trim"), "trim", 512, backing.FUA, []string{"trim 0+512 1", "flush 0+0 0"}, nil},
		{"trim that fails", w | backing.CanTrim, map[string]error{"trim": backing.ErrIO}, "trim", 512, 0, []string{"trim 0+512 0"}, backing.ErrIO},
		{"cache natively", backing.CanCache, nil, "cache", 512, 0, []string{"cache 0+512 0"}, nil},
		{"cache by nothing", 0, nil, "cache", 512, 0, nil, nil},
		{"cache that is unsupported", backing.CanCache, unsupported("cache"), "cache", 512, 0, []string{"cache 0+512 0"}, nil},
		{"cache that fails", backing.CanCache, map[string]error{"cache": backing.ErrIO}, "cache", 512, 0, []string{"cache 0+512 0"}, backing.ErrIO},
		{"extents natively", backing.CanExtents, nil, "extents", 512, backing.ReqOne, []string{"extents 0+512 8"}, nil},
		{"extents by claiming data", 0, nil, "extents", 512, 0, nil, nil},
		{"map", 0, nil, "map read", 512, 0, []string{"map read 0+512 0"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, r := emulated(tt.native, tt.errs)
			err := ranged[tt.do](backing.NewChecked(everything{e}, 0), 0, tt.n, tt.f)
			if !errors.Is(err, tt.err) || !slices.Equal(r.calls, tt.want) {
				t.Errorf("got %v, calls %q, want %v, %q", err, r.calls, tt.err, tt.want)
			}
		})
	}
}

// givenUp is a disk whose caller gives up during each write.
type givenUp struct {
	*recorder
	giveUp context.CancelFunc
}

func (d givenUp) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	d.giveUp()
	return d.recorder.WriteAt(ctx, p, off, f)
}

func TestZeroByWritesEndsWithItsContext(t *testing.T) {
	ctx, giveUp := context.WithCancel(t.Context())
	_, r := emulated(backing.CanWrite, nil)
	err := backing.NewEmulate(givenUp{r, giveUp}).Zero(ctx, 0, 1<<30, backing.FUA)
	if want := []string{"write 0+262144 0"}; !errors.Is(err, context.Canceled) || !slices.Equal(r.calls, want) {
		t.Errorf("got %v after %d calls, want %v after %q", err, len(r.calls), context.Canceled, want)
	}
}

// everything claims to be able to do all, so that Checked lets all through.
type everything struct{ backing.Device }

func (e everything) Info() backing.Info {
	i := e.Device.Info()
	i.Caps = allCaps
	return i
}

func TestEmulateCallsUnknownExtentsData(t *testing.T) {
	e, _ := emulated(backing.CanWrite, nil)
	var got []backing.Extent
	err := e.Extents(t.Context(), 100, 5000, 0, func(x backing.Extent) bool { got = append(got, x); return true })
	if err != nil || len(got) != 1 || got[0] != (backing.Extent{Len: 5000}) {
		t.Errorf("extents: got %+v, %v, want one of 5000 bytes of data", got, err)
	}
}

// smallest is a disk that can only read, write and flush.
type smallest struct {
	backing.Unsupported
	disk *mem.Disk
}

func (s smallest) Info() backing.Info {
	i := s.disk.Info()
	i.Caps = backing.CanWrite | backing.CanFlush
	return i
}

func (s smallest) ReadAt(ctx context.Context, p []byte, off int64) error {
	return s.disk.ReadAt(ctx, p, off)
}

func (s smallest) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if f != 0 {
		return backing.ErrInvalid
	}
	return s.disk.WriteAt(ctx, p, off, f)
}

func (s smallest) Close() error { return s.disk.Close() }

func TestSmallestBackendConformsUnderEmulate(t *testing.T) {
	backingtest.Run(t, backingtest.Maker{New: func(_ testing.TB, size int64) backing.Device {
		return backing.NewEmulate(smallest{disk: mem.New(size, nil)})
	}})
}

func TestUnsupportedRefuses(t *testing.T) {
	var u backing.Unsupported
	ctx := t.Context()
	for name, err := range map[string]error{
		"zero": u.Zero(ctx, 0, 1, 0), "trim": u.Trim(ctx, 0, 1, 0), "cache": u.Cache(ctx, 0, 1),
		"extents": u.Extents(ctx, 0, 1, 0, nil),
	} {
		if !errors.Is(err, backing.ErrNotSupported) {
			t.Errorf("%s: got %v, want %v", name, err, backing.ErrNotSupported)
		}
	}
	if err := u.WriteAt(ctx, nil, 0, 0); !errors.Is(err, backing.ErrReadOnly) {
		t.Errorf("write: got %v, want %v", err, backing.ErrReadOnly)
	}
	if err := u.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}
	if err := u.Map(engine.OpRead, 0, 1, nil); !errors.Is(err, backing.ErrNotMappable) {
		t.Errorf("map: got %v, want %v", err, backing.ErrNotMappable)
	}
}

func TestLayersForwardAllButWhatTheyMust(t *testing.T) {
	for name, layer := range map[string]func(backing.Device) backing.Device{
		"Passthrough": func(d backing.Device) backing.Device { return backing.Passthrough{Next: d} },
		"Transparent": func(d backing.Device) backing.Device {
			return backing.Transparent{Passthrough: backing.Passthrough{Next: d}}
		},
	} {
		r := &recorder{info: backing.Info{Size: 512, MinBlock: 1, Caps: allCaps}}
		l := layer(r)
		c := backing.NewChecked(l, 0)
		for op, call := range ranged {
			r.calls = nil
			err := call(c, 0, 512, 0)
			forwarded := slices.Equal(r.calls, []string{fmt.Sprintf("%s 0+512 0", op)})
			isMap := op == "map read" || op == "map write"
			if want := !isMap || name == "Transparent"; forwarded != want {
				t.Errorf("%s of %s: forwarded %v, want %v", op, name, forwarded, want)
			}
			if isMap && !forwarded && !errors.Is(err, backing.ErrNotMappable) {
				t.Errorf("%s of %s: got %v, want %v", op, name, err, backing.ErrNotMappable)
			}
		}
		r.calls = nil
		if err := errors.Join(l.Flush(t.Context()), l.Close()); err != nil || len(r.calls) != 2 {
			t.Errorf("flush and close of %s: got %v, calls %q", name, err, r.calls)
		}
	}
}

func TestMappingReleasesItsLeaseOnce(t *testing.T) {
	l := new(countingLease)
	m := backing.Mapping{N: 2, Lease: l}
	m.Release()
	m.Release()
	if l.n != 1 || m.N != 0 || m.Lease != nil {
		t.Errorf("after two releases: %d of the lease, %d runs, want 1, 0", l.n, m.N)
	}
}

type countingLease struct{ n int }

func (l *countingLease) Release() { l.n++ }

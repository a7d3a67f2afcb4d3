package layer_test

import (
	"context"
	"math"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestWindowConforms(t *testing.T) {
	for i, off := range []int64{64 << 10, 4096 + 7} {
		conformOn(t, bases[i:], off+100, func(t testing.TB, d backing.Device) backing.Device {
			w := must(layer.NewWindow(d, layer.WindowOptions{Off: off, Size: d.Info().Size - off - 100}))
			return w
		})
	}
}

func TestWindowTouchesNothingOutside(t *testing.T) {
	d := mem.New(30000, nil)
	all := fill(t, d, 0, 30000, 7)
	w := must(layer.NewWindow(d, layer.WindowOptions{Off: 10000, Size: 10000}))
	if err := w.Zero(t.Context(), 0, 10000, 0); err != nil {
		t.Fatal(err)
	}
	fill(t, w, 5000, 5000, 9)
	holds(t, d, 0, all[:10000])
	holds(t, d, 20000, all[:10000])
	holds(t, d, 10000, make([]byte, 5000))
}

func TestWindowMustLieInTheDisk(t *testing.T) {
	coarse := must(layer.NewBlockSize(mem.New(1<<20, nil), layer.BlockSizeOptions{Min: 4096}))
	for _, tt := range []struct {
		dev       backing.Device
		off, size int64
		want      backing.Kind
	}{
		{mem.New(1000, nil), 1000, 0, backing.ErrOutOfRange},
		{mem.New(1000, nil), -1, 10, backing.ErrOutOfRange},
		{mem.New(1000, nil), 0, -1, backing.ErrOutOfRange},
		{mem.New(1000, nil), 1, 1000, backing.ErrOutOfRange},
		{mem.New(1000, nil), math.MaxInt64, math.MaxInt64, backing.ErrOutOfRange},
		{coarse, 512, 4096, backing.ErrAlignment},
		{coarse, 4096, 512, backing.ErrAlignment},
	} {
		_, err := layer.NewWindow(tt.dev, layer.WindowOptions{Off: tt.off, Size: tt.size})
		isKind(t, "window", err, tt.want)
	}
}

func TestWindowPrefersBlocksOfTheDisk(t *testing.T) {
	for off, want := range map[int64]int64{0: 4096, 8192: 4096, 2048: 2048, 1536: 512, 7: 512} {
		w := must(layer.NewWindow(mem.New(1<<20, nil), layer.WindowOptions{Off: off}))
		if got := w.Info().Preferred; got != want {
			t.Errorf("window at %d: got preferred block %d, want %d", off, got, want)
		}
	}
}

// growing is a disk with a description that notes what it is asked.
type growing struct {
	backing.Device
	off, n, size int64
}

func (g *growing) Descriptions() []string { return []string{"x"} }

func (g *growing) Describe(_ context.Context, _ string, off, n int64, _ backing.Flags, yield func(backing.Status) bool) error {
	g.off, g.n = off, n
	yield(backing.Status{Len: n, Value: 5})
	return nil
}

func (g *growing) Resize(_ context.Context, size int64) error {
	g.size = size
	return nil
}

func (g *growing) Info() backing.Info {
	i := g.Device.Info()
	i.Size = max(i.Size, g.size)
	return i
}

func TestWindowTranslatesDescriptionsAndGrowth(t *testing.T) {
	g := &growing{Device: mem.New(1000, nil)}
	w := must(layer.NewWindow(g, layer.WindowOptions{Off: 100}))
	var got []backing.Status
	err := w.Describe(t.Context(), "x", 5, 10, 0, func(s backing.Status) bool { got = append(got, s); return true })
	if err != nil || g.off != 105 || g.n != 10 || !slices.Equal(got, []backing.Status{{Len: 10, Value: 5}}) {
		t.Errorf("describe 5+10: disk was asked for %d+%d, got %v, %v", g.off, g.n, got, err)
	}
	if err := w.Resize(t.Context(), 2000); err != nil || g.size != 2100 || w.Info().Size != 2000 {
		t.Errorf("resize to 2000: disk got %d, window has %d, %v", g.size, w.Info().Size, err)
	}
	isKind(t, "resize beyond all", w.Resize(t.Context(), math.MaxInt64), backing.ErrOutOfRange)
	fixed := must(layer.NewWindow(g, layer.WindowOptions{Off: 100, Size: 50}))
	isKind(t, "resize of a fixed window", fixed.Resize(t.Context(), 60), backing.ErrNotSupported)
}

func TestWindowMapsWithoutAllocating(t *testing.T) {
	w := closing(t, must(layer.NewWindow(newRaw(t, "pool", 1<<20, 0), layer.WindowOptions{Off: 4096})))
	var m backing.Mapping
	if err := w.Map(engine.OpRead, 512, 1024, &m); err != nil || m.N != 1 || m.Runs[0].Off != 4608 || m.Runs[0].Len != 1024 {
		t.Errorf("map 512+1024: got %+v, %v, want the file at 4608+1024", m, err)
	}
	m.Release()
	if n := mapAllocates(t, w); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

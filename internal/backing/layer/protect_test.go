package layer_test

import (
	"bytes"
	"fmt"
	"math"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// The suite works in a window beside what is protected.
func TestProtectConforms(t *testing.T) {
	conformOn(t, bases[1:], 128<<10, func(_ testing.TB, d backing.Device) backing.Device {
		size := d.Info().Size
		p := must(layer.NewProtect(d, layer.ProtectOptions{Ranges: []layer.Range{{Off: 0, Len: 64 << 10}, {Off: size - 64<<10, Len: 64 << 10}}}))
		return must(layer.NewWindow(p, layer.WindowOptions{Off: 64 << 10, Size: size - 128<<10}))
	})
}

func TestProtectRefusesWhatTouchesARange(t *testing.T) {
	d := mem.New(10000, nil)
	want := fill(t, d, 0, 10000, 1)
	p := must(layer.NewProtect(d, layer.ProtectOptions{Ranges: []layer.Range{
		{Off: 5000, Len: 10}, {Off: 100, Len: 50}, {Off: 120, Len: 5}, {Off: 150, Len: 50}, {Off: 9990, Len: math.MaxInt64 - 9990},
	}}))
	for _, tt := range []struct {
		off, n  int64
		refused bool
	}{
		{0, 100, false}, {0, 101, true}, {99, 1, false}, {100, 1, true}, {140, 1, true}, {160, 1, true}, {199, 1, true}, {200, 1, false},
		{200, 4800, false}, {200, 4801, true}, {5009, 1, true}, {5010, 4980, false}, {5010, 4981, true}, {9999, 1, true}, {0, 10000, true},
	} {
		t.Run(fmt.Sprintf("%d+%d", tt.off, tt.n), func(t *testing.T) {
			var m backing.Mapping
			for what, err := range map[string]error{
				"write": p.WriteAt(t.Context(), want[:tt.n], tt.off, 0),
				"zero":  p.Zero(t.Context(), tt.off, tt.n, 0),
				"trim":  p.Trim(t.Context(), tt.off, tt.n, 0),
				"map":   p.Map(engine.OpWrite, tt.off, tt.n, &m),
			} {
				switch {
				case tt.refused:
					isKind(t, what, err, backing.ErrReadOnly)
				case what == "map":
					isKind(t, what, err, backing.ErrNotMappable)
				case err != nil:
					t.Errorf("%s: got %v, want none", what, err)
				}
			}
			got := make([]byte, 10000)
			if err := d.ReadAt(t.Context(), got, 0); err != nil {
				t.Fatal(err)
			}
			if tt.refused && !bytes.Equal(got, want) {
				t.Error("a refused request changed the disk")
			}
			fill(t, d, 0, 10000, 1)
		})
	}
}

func TestProtectRefusesBadRanges(t *testing.T) {
	for _, r := range []layer.Range{{Off: -1, Len: 1}, {Off: 0, Len: 0}, {Off: 1, Len: -1}, {Off: 1, Len: math.MaxInt64}, {Off: math.MaxInt64, Len: 1}} {
		_, err := layer.NewProtect(mem.New(1, nil), layer.ProtectOptions{Ranges: []layer.Range{r}})
		isKind(t, fmt.Sprintf("range %+v", r), err, backing.ErrInvalid)
	}
	_, err := layer.NewProtect(mem.New(1, nil), layer.ProtectOptions{Ranges: make([]layer.Range, limits.ProtectRanges+1)})
	isKind(t, "too many ranges", err, backing.ErrInvalid)
}

func TestProtectMapsWithoutAllocating(t *testing.T) {
	d := newRaw(t, "pool", 1<<20, 0)
	p := closing(t, must(layer.NewProtect(d, layer.ProtectOptions{Ranges: []layer.Range{{Off: 0, Len: 4096}, {Off: 1 << 19, Len: 1}}})))
	if n := mapAllocates(t, p); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

package layer_test

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// everyServed are the layers of an export that has none of its own: what it
// costs to map through them is what a service costs more than a single disk.
func everyServed(t testing.TB, dev backing.Device, each func(name string, dev backing.Device)) {
	each("none", dev)
	dev = layer.NewSwap(dev)
	each("swap", dev)
	l, err := layer.NewLimiter(layer.Rates{})
	if err != nil {
		t.Fatal(err)
	}
	if dev, err = layer.NewRateLimit(dev, layer.RateOptions{Limiters: []*layer.Limiter{l}}); err != nil {
		t.Fatal(err)
	}
	each("rate", dev)
	dev = layer.NewRequestLog(dev, layer.RequestLogOptions{Log: quiet})
	each("log", dev)
	each("pause", layer.NewPause(dev))
}

// BenchmarkMap shows what each layer adds.
func BenchmarkMap(b *testing.B) {
	everyServed(b, closing(b, newRaw(b, "pool", 1<<20, 0)), func(name string, dev backing.Device) {
		b.Run(name, func(b *testing.B) {
			var m backing.Mapping
			for b.Loop() {
				if err := dev.Map(engine.OpRead, 0, 4096, &m); err != nil {
					b.Fatal(err)
				}
				m.Release()
			}
		})
	})
}

// TestLayersMapWithoutAllocating: also all of them together.
func TestLayersMapWithoutAllocating(t *testing.T) {
	everyServed(t, closing(t, newRaw(t, "pool", 1<<20, 0)), func(name string, dev backing.Device) {
		var m backing.Mapping
		n := testing.AllocsPerRun(1000, func() {
			if err := dev.Map(engine.OpRead, 0, 4096, &m); err != nil {
				t.Fatal(err)
			}
			m.Release()
		})
		if n != 0 {
			t.Errorf("%s: %v allocations in a Map, want none", name, n)
		}
	})
}

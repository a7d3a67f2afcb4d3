package layer_test

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestReadOnlyConformsWhileOff(t *testing.T) {
	conformOn(t, bases[:2], 0, func(t testing.TB, d backing.Device) backing.Device {
		return layer.NewReadOnly(d, false)
	})
}

// refusesChanges asks for every kind of change.
func refusesChanges(t *testing.T, d backing.Device) {
	t.Helper()
	var m backing.Mapping
	for what, err := range map[string]error{
		"write":  d.WriteAt(t.Context(), make([]byte, 512), 0, 0),
		"zero":   d.Zero(t.Context(), 0, 512, 0),
		"trim":   d.Trim(t.Context(), 0, 512, 0),
		"map":    d.Map(engine.OpWrite, 0, 512, &m),
		"resize": d.(backing.Resizer).Resize(t.Context(), 1<<21),
	} {
		isKind(t, what, err, backing.ErrReadOnly)
	}
}

func TestReadOnlyIsSwitchedWhileInUse(t *testing.T) {
	g := &growing{Device: mem.New(1<<20, nil)}
	l := layer.NewReadOnly(g, true)
	caps := l.Info().Caps
	refusesChanges(t, l)
	l.Set(false)
	want := fill(t, l, 0, 512, 1)
	if err := l.Resize(t.Context(), 1<<21); err != nil || g.size != 1<<21 {
		t.Errorf("resize: got %v, size %d", err, g.size)
	}
	l.Set(true)
	refusesChanges(t, l)
	holds(t, l, 0, want)
	if now := l.Info().Caps; now != caps || !caps.Has(backing.CanWrite) {
		t.Errorf("caps: got %#x, then %#x, want the same with a right to write", caps, now)
	}
}

func TestReadOnlyMapsWithoutAllocating(t *testing.T) {
	l := closing(t, layer.NewReadOnly(newRaw(t, "pool", 1<<20, 0), false))
	if n := mapAllocates(t, l); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

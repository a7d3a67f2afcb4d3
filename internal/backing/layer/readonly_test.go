package layer_test

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
)

func TestSwitchedReadOnlyConformsWhileOff(t *testing.T) {
	conformOn(t, bases[:2], 0, func(t testing.TB, d backing.Device) backing.Device {
		l := layer.NewReadOnly(d, layer.ReadOnlyOptions{Switched: true})
		if err := l.Set(false); err != nil {
			t.Fatal(err)
		}
		return l
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

func TestReadOnlyRefusesChanges(t *testing.T) {
	d := mem.New(1<<20, nil)
	want := fill(t, d, 0, 4096, 3)
	l := layer.NewReadOnly(d, layer.ReadOnlyOptions{})
	refusesChanges(t, l)
	holds(t, l, 0, want)
	if c := l.Info().Caps; c&(backing.CanWrite|backing.CanTrim|backing.CanZero|backing.CanFastZero|backing.CanFUA) != 0 || !c.Has(backing.CanExtents|backing.CanFlush) {
		t.Errorf("info: got caps %#x, want none that write and the others", c)
	}
	isKind(t, "set", l.Set(false), backing.ErrInvalid)
}

func TestReadOnlyIsSwitchedWhileInUse(t *testing.T) {
	g := &growing{Device: mem.New(1<<20, nil)}
	l := layer.NewReadOnly(g, layer.ReadOnlyOptions{Switched: true})
	caps := l.Info().Caps
	refusesChanges(t, l)
	if err := l.Set(false); err != nil || l.On() {
		t.Fatalf("set: got %v, on is %v", err, l.On())
	}
	fill(t, l, 0, 512, 1)
	if err := l.Resize(t.Context(), 1<<21); err != nil || g.size != 1<<21 {
		t.Errorf("resize: got %v, size %d", err, g.size)
	}
	if err := l.Set(true); err != nil {
		t.Fatal(err)
	}
	refusesChanges(t, l)
	if now := l.Info().Caps; now != caps || !caps.Has(backing.CanWrite) {
		t.Errorf("caps: got %#x, then %#x, want the same with a right to write", caps, now)
	}
}

func TestReadOnlyMapsWithoutAllocating(t *testing.T) {
	l := closing(t, layer.NewReadOnly(newRaw(t, "pool", 1<<20, 0), layer.ReadOnlyOptions{Switched: true}))
	if err := l.Set(false); err != nil {
		t.Fatal(err)
	}
	if n := mapAllocates(t, l); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

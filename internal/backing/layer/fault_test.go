package layer_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

func faulty(d backing.Device, seed uint64, rules ...layer.Fault) *layer.Faults {
	return must(layer.NewFaults(d, layer.FaultOptions{Enabled: true, Seed: seed, Faults: rules}))
}

const every = layer.FaultRead | layer.FaultWrite | layer.FaultZero | layer.FaultTrim | layer.FaultFlush | layer.FaultCache | layer.FaultExtents

func TestFaultsConformWhileTheyOnlyDelay(t *testing.T) {
	conformOn(t, bases[:2], 0, func(_ testing.TB, d backing.Device) backing.Device {
		return faulty(d, 1, layer.Fault{Ops: every, Probability: 0.2, Delay: time.Microsecond},
			layer.Fault{Ops: layer.FaultRead, Range: layer.Range{Off: 0, Len: 4096}, Probability: 1, Delay: 1})
	})
}

func TestFaultsNeedTheOperatorsWord(t *testing.T) {
	_, err := layer.NewFaults(mem.New(1, nil), layer.FaultOptions{})
	isKind(t, "faults that are not enabled", err, backing.ErrNotSupported)
}

// hits asks for n reads of the first byte and tells which failed.
func hits(t *testing.T, d backing.Device, n int) (pattern string) {
	t.Helper()
	for range n {
		switch err := d.ReadAt(t.Context(), make([]byte, 1), 0); {
		case err == nil:
			pattern += "."
		case errors.Is(err, backing.ErrIO):
			pattern += "x"
		default:
			t.Fatalf("read: got %v", err)
		}
	}
	return pattern
}

func TestFaultsHitAsTheirRulesSay(t *testing.T) {
	fault := layer.Fault{Ops: layer.FaultRead, Probability: 1, After: 3, Count: 2, Error: backing.ErrIO}
	d := faulty(mem.New(4096, nil), 0, fault)
	if got := hits(t, d, 8); got != "...xx..." || d.Hits() != 2 {
		t.Errorf("after 3, count 2: got %s, %d hits", got, d.Hits())
	}
	fault = layer.Fault{Ops: layer.FaultRead, Probability: 0.25, Error: backing.ErrIO}
	first, again := hits(t, faulty(mem.New(1, nil), 5, fault), 1000), hits(t, faulty(mem.New(1, nil), 5, fault), 1000)
	n := 0
	for _, c := range first {
		if c == 'x' {
			n++
		}
	}
	if first != again || n < 180 || n > 320 {
		t.Errorf("probability 0.25: got %d of 1000, same pattern again is %v", n, first == again)
	}
}

func TestFaultsHitTheirOpsAndRange(t *testing.T) {
	for op, do := range map[layer.FaultOps]func(d backing.Device, off, n int64) error{
		layer.FaultRead:  func(d backing.Device, off, n int64) error { return d.ReadAt(t.Context(), make([]byte, n), off) },
		layer.FaultWrite: func(d backing.Device, off, n int64) error { return d.WriteAt(t.Context(), make([]byte, n), off, 0) },
		layer.FaultZero:  func(d backing.Device, off, n int64) error { return d.Zero(t.Context(), off, n, 0) },
		layer.FaultTrim:  func(d backing.Device, off, n int64) error { return d.Trim(t.Context(), off, n, 0) },
		layer.FaultCache: func(d backing.Device, off, n int64) error { return d.Cache(t.Context(), off, n) },
		layer.FaultExtents: func(d backing.Device, off, n int64) error {
			return d.Extents(t.Context(), off, n, 0, func(backing.Extent) bool { return true })
		},
		layer.FaultFlush: func(d backing.Device, _, _ int64) error { return d.Flush(t.Context()) },
	} {
		rule := layer.Fault{Ops: op, Range: layer.Range{Off: 100, Len: 50}, Probability: 1, Error: backing.ErrNoSpace}
		hit, others := faulty(mem.New(4096, nil), 0, rule), rule
		others.Ops = every &^ op
		spared := faulty(mem.New(4096, nil), 0, others)
		isKind(t, fmt.Sprintf("op %d in range", op), do(hit, 140, 20), backing.ErrNoSpace)
		if err := do(hit, 150, 20); err != nil && op != layer.FaultFlush {
			t.Errorf("op %d out of range: got %v", op, err)
		}
		if err := do(spared, 140, 20); err != nil {
			t.Errorf("op %d with a rule for the others: got %v", op, err)
		}
	}
}

// TestFaultsHitReadsThatAreHoles: what stands for a read is none where a rule for
// reads may hit, and is no block status that another rule counts.
func TestFaultsHitReadsThatAreHoles(t *testing.T) {
	asRead := func(d backing.Device, off int64) error {
		return d.Extents(t.Context(), off, 4096, backing.ReqOne|backing.AsRead, func(backing.Extent) bool { return true })
	}
	d := faulty(mem.New(1<<20, nil), 0,
		layer.Fault{Ops: layer.FaultRead, Range: layer.Range{Off: 100, Len: 50}, Probability: 1, After: 1, Error: backing.ErrIO},
		layer.Fault{Ops: layer.FaultExtents, Probability: 1, Error: backing.ErrIO})
	for range 3 {
		isKind(t, "in range", asRead(d, 0), backing.ErrNotMappable)
	}
	if err := asRead(d, 4096); err != nil || d.Hits() != 0 {
		t.Errorf("out of range: got %v, %d hits of rules, want none", err, d.Hits())
	}
}

func TestFailedWriteChangesNothing(t *testing.T) {
	m := mem.New(4096, nil)
	want := fill(t, m, 0, 4096, 1)
	d := faulty(m, 0, layer.Fault{Ops: every, Probability: 1, Error: backing.ErrIO})
	isKind(t, "write", d.WriteAt(t.Context(), make([]byte, 10), 5, 0), backing.ErrIO)
	isKind(t, "zero", d.Zero(t.Context(), 0, 10, 0), backing.ErrIO)
	holds(t, m, 0, want)
	if err := d.Set(0, nil); err != nil {
		t.Fatal(err)
	}
	fill(t, d, 0, 10, 3)
}

func TestDelayEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := faulty(mem.New(4096, nil), 0, layer.Fault{Ops: layer.FaultRead, Probability: 1, Delay: time.Minute})
		if got := elapsed(t, func() error { return d.ReadAt(t.Context(), make([]byte, 1), 0) }); got != time.Minute {
			t.Errorf("delayed read: took %v, want 1m", got)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := d.ReadAt(ctx, make([]byte, 1), 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("read: got %v, want %v", err, context.DeadlineExceeded)
		}
	})
}

func TestWhatARuleNamesIsNotMapped(t *testing.T) {
	d := faulty(mem.Null(1<<20), 0, layer.Fault{Ops: layer.FaultRead, Range: layer.Range{Off: 4096, Len: 4096}, Probability: 0.001, Error: backing.ErrIO})
	var m backing.Mapping
	isKind(t, "map in range", d.Map(engine.OpRead, 0, 4097, &m), backing.ErrNotMappable)
	if err := d.Map(engine.OpRead, 0, 4096, &m); err != nil {
		t.Errorf("map out of range: %v", err)
	}
	rest := faulty(mem.Null(1<<20), 0, layer.Fault{Ops: every, Range: layer.Range{Off: 8192}, Probability: 1, Error: backing.ErrIO})
	isKind(t, "map at the end of the disk", rest.Map(engine.OpRead, 1<<20-1, 1, &m), backing.ErrNotMappable)
	if err := rest.Map(engine.OpRead, 8191, 1, &m); err != nil {
		t.Errorf("map before the rest of the disk: %v", err)
	}
	raw := closing(t, faulty(newRaw(t, "pool", 1<<20, 0), 0, layer.Fault{Ops: every, Range: layer.Range{Off: 0, Len: 1}, Probability: 1, Delay: 1}))
	if n := mapAllocates(t, raw); n != 0 {
		t.Errorf("map: got %v allocations, want none", n)
	}
}

func TestBadRulesAreRefused(t *testing.T) {
	good := layer.Fault{Ops: layer.FaultRead, Probability: 1, Error: backing.ErrIO}
	bad := map[string]func(f *layer.Fault){
		"no ops":          func(f *layer.Fault) { f.Ops = 0 },
		"unknown op":      func(f *layer.Fault) { f.Ops = 1 << 7 },
		"probability 0":   func(f *layer.Fault) { f.Probability = 0 },
		"probability 2":   func(f *layer.Fault) { f.Probability = 2 },
		"probability NaN": func(f *layer.Fault) { f.Probability = math.NaN() },
		"negative after":  func(f *layer.Fault) { f.After = -1 },
		"negative count":  func(f *layer.Fault) { f.Count = -1 },
		"negative delay":  func(f *layer.Fault) { f.Delay = -1 },
		"endless delay":   func(f *layer.Fault) { f.Delay = limits.InjectDelay + 1 },
		"odd range":       func(f *layer.Fault) { f.Range = layer.Range{Off: -5} },
		"overflowing":     func(f *layer.Fault) { f.Range = layer.Range{Off: 5, Len: math.MaxInt64} },
		"not an error":    func(f *layer.Fault) { f.Error = "x" },
		"not for guests":  func(f *layer.Fault) { f.Error = backing.ErrNotMappable },
		"nothing happens": func(f *layer.Fault) { f.Error = "" },
	}
	d := faulty(mem.New(1, nil), 0, good)
	for name, spoil := range bad {
		f := good
		spoil(&f)
		isKind(t, name, d.Set(0, []layer.Fault{good, f}), backing.ErrInvalid)
	}
	isKind(t, "too many", d.Set(0, make([]layer.Fault, limits.FaultRules+1)), backing.ErrInvalid)
	if got := hits(t, d, 2); got != "xx" {
		t.Errorf("after refused rules: got %s, want the old rule at work", got)
	}
}

package layer

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// FaultOps are sets of kinds of requests.
type FaultOps uint8

const (
	FaultRead FaultOps = 1 << iota
	FaultWrite
	FaultZero
	FaultTrim
	FaultFlush
	FaultCache
	FaultExtents
)

// faultErrors are the errors that may be injected.
var faultErrors = []backing.Kind{"", backing.ErrIO, backing.ErrNoSpace, backing.ErrReadOnly, backing.ErrNotSupported, backing.ErrPoisoned}

// Fault is a rule: which requests are hit, and by what.
type Fault struct {
	Ops   FaultOps // at least one
	Range Range    // Len 0: to the end of the disk. A flush is everywhere.

	Probability float64 // of a request to be hit, above 0 and at most 1
	After       int64   // so many are spared first
	Count       int64   // no more than so many are hit; 0: no bound

	// Delay comes before the request, or before its error. At most
	// limits.InjectDelay.
	Delay time.Duration

	// Error takes the place of the request; "" lets it go on. ErrIO, ErrNoSpace,
	// ErrReadOnly, ErrNotSupported or ErrPoisoned.
	Error backing.Kind
}

func (f Fault) valid() bool {
	return f.Ops != 0 && f.Ops < FaultExtents<<1 && (f.Range.Len == 0 && f.Range.Off >= 0 || f.Range.valid()) &&
		f.Probability > 0 && f.Probability <= 1 && f.After >= 0 && f.Count >= 0 &&
		f.Delay >= 0 && f.Delay <= limits.InjectDelay && slices.Contains(faultErrors, f.Error) &&
		(f.Delay > 0 || f.Error != "")
}

func (f Fault) touches(op FaultOps, off, n int64) bool {
	r := f.Range
	if r.Len == 0 {
		r.Len = maxOff - r.Off
	}
	return f.Ops&op != 0 && (op == FaultFlush || overlap(off, n, r.Off, r.Len))
}

// FaultOptions are the rules of a disk, in order: the first that hits a request
// decides.
type FaultOptions struct {
	// Enabled is the operator's word that this program may harm disks.
	// Without it there are no faults.
	Enabled bool
	Seed    uint64 // the same seed and requests give the same faults
	Faults  []Fault
}

// Faults makes requests slow or fail, for tests of what depends on the disk.
// Requests that a rule may hit are not mapped.
type Faults struct {
	backing.Passthrough
	rules atomic.Pointer[[]Fault] // nil: none; what they name does not change
	hits  atomic.Int64

	mu   sync.Mutex
	rnd  *rand.Rand // guarded by mu
	seen []int64    // guarded by mu; by rule
	hit  []int64    // guarded by mu; by rule
}

// NewFaults stands on dev. Without o.Enabled it is ErrNotSupported; bad rules
// are ErrInvalid.
func NewFaults(dev backing.Device, o FaultOptions) (*Faults, error) {
	if !o.Enabled {
		return nil, &backing.Error{Op: "inject faults", Off: -1, Kind: backing.ErrNotSupported, Err: errors.New("the daemon was not started with --enable-fault-injection")}
	}
	l := &Faults{Passthrough: backing.Passthrough{Next: dev}}
	return l, l.Set(o.Seed, o.Faults)
}

// Set puts new rules in the place of the old ones. A rule that makes no sense,
// or more than limits.FaultRules, are ErrInvalid and change nothing.
func (l *Faults) Set(seed uint64, rules []Fault) error {
	if len(rules) > limits.FaultRules {
		return invalid("inject faults", "more than %d rules", limits.FaultRules)
	}
	for i, f := range rules {
		if !f.valid() {
			return invalid("inject faults", "rule %d makes no sense", i)
		}
	}
	rules = slices.Clone(rules)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rnd = rand.New(rand.NewPCG(seed, 0))
	l.seen, l.hit = make([]int64, len(rules)), make([]int64, len(rules))
	l.rules.Store(&rules)
	return nil
}

// Hits counts the requests that were hit since the layer was made.
func (l *Faults) Hits() int64 { return l.hits.Load() }

// pick finds the rule that hits a request, if there is one.
func (l *Faults) pick(op FaultOps, off, n int64) (Fault, bool) {
	if len(*l.rules.Load()) == 0 {
		return Fault{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, f := range *l.rules.Load() {
		if !f.touches(op, off, n) || f.Count > 0 && l.hit[i] >= f.Count {
			continue
		}
		if l.seen[i]++; l.seen[i] <= f.After || f.Probability < 1 && l.rnd.Float64() >= f.Probability {
			continue
		}
		l.hit[i]++
		l.hits.Add(1)
		return f, true
	}
	return Fault{}, false
}

// strike delays a request, and gives the error that takes its place.
func (l *Faults) strike(ctx context.Context, op FaultOps, verb string, off, n int64) error {
	f, ok := l.pick(op, off, n)
	if !ok {
		return nil
	}
	if f.Delay > 0 {
		if err := sleep(ctx, f.Delay, nil); err != nil {
			return err
		}
	}
	if f.Error == "" {
		return nil
	}
	return &backing.Error{Op: "injected fault of " + verb, Off: off, Len: n, Kind: f.Error}
}

func (l *Faults) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := l.strike(ctx, FaultRead, "read", off, int64(len(p))); err != nil {
		return err
	}
	return l.Next.ReadAt(ctx, p, off)
}

func (l *Faults) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	if err := l.strike(ctx, FaultWrite, "write", off, int64(len(p))); err != nil {
		return err
	}
	return l.Next.WriteAt(ctx, p, off, f)
}

func (l *Faults) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if err := l.strike(ctx, FaultZero, "zero", off, n); err != nil {
		return err
	}
	return l.Next.Zero(ctx, off, n, f)
}

func (l *Faults) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	if err := l.strike(ctx, FaultTrim, "trim", off, n); err != nil {
		return err
	}
	return l.Next.Trim(ctx, off, n, f)
}

func (l *Faults) Flush(ctx context.Context) error {
	if err := l.strike(ctx, FaultFlush, "flush", -1, 0); err != nil {
		return err
	}
	return l.Next.Flush(ctx)
}

func (l *Faults) Cache(ctx context.Context, off, n int64) error {
	if err := l.strike(ctx, FaultCache, "cache", off, n); err != nil {
		return err
	}
	return l.Next.Cache(ctx, off, n)
}

// Extents fails where a rule says so. What would stand for a read that a rule may hit
// is ErrNotMappable: then there is a read.
func (l *Faults) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	if f&backing.AsRead != 0 {
		if l.names(FaultRead, off, n) {
			return backing.ErrNotMappable
		}
		return l.Next.Extents(ctx, off, n, f, yield)
	}
	if err := l.strike(ctx, FaultExtents, "extents", off, n); err != nil {
		return err
	}
	return l.Next.Extents(ctx, off, n, f, yield)
}

// Describe fails as Extents does.
func (l *Faults) Describe(ctx context.Context, name string, off, n int64, f backing.Flags, yield func(backing.Status) bool) error {
	if err := l.strike(ctx, FaultExtents, "extents", off, n); err != nil {
		return err
	}
	return l.Passthrough.Describe(ctx, name, off, n, f, yield)
}

// Map forwards what no rule names.
func (l *Faults) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	kind := FaultRead
	if op != engine.OpRead {
		kind = FaultWrite
	}
	if l.names(kind, off, n) {
		return backing.ErrNotMappable
	}
	return l.Next.Map(op, off, n, m)
}

// names tells whether a rule may hit a request.
func (l *Faults) names(op FaultOps, off, n int64) bool {
	return slices.ContainsFunc(*l.rules.Load(), func(f Fault) bool { return f.touches(op, off, n) })
}

package backingtest

import (
	"sync"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// Fault is the end of a transfer that goes wrong.
type Fault struct {
	Errno syscall.Errno // 0 with Moved: a transfer that is short without an error
	Moved int           // bytes that are really moved before that
}

// Gate holds transfers back until Open.
type Gate struct {
	// Arrived gets one token for every transfer that comes to the gate.
	Arrived chan struct{}
	open    chan struct{}
}

// NewGate makes a closed gate.
func NewGate() *Gate {
	return &Gate{Arrived: make(chan struct{}, 1024), open: make(chan struct{})}
}

// Open lets through what waits, and all that comes later. It is called once.
func (g *Gate) Open() { close(g.open) }

// Rule says which transfers are hit, and by what: the Gate first, if there is
// one, then the Fault, if it is not empty.
type Rule struct {
	Match func(*engine.IO) bool // nil: every transfer
	After int                   // so many matching ones go unharmed first
	Times int                   // so many are hit; 0: one, negative: all
	Gate  *Gate
	Fault Fault
}

// Ops matches the operations named.
func Ops(ops ...engine.Op) func(*engine.IO) bool {
	return func(io *engine.IO) bool {
		for _, op := range ops {
			if io.Op == op {
				return true
			}
		}
		return false
	}
}

// FaultEngine stands before an engine and makes transfers fail, fall short or
// wait. Without a rule it only counts. ReadNow finds nothing, so that every
// read is a transfer.
type FaultEngine struct {
	engine.Engine
	waiting sync.WaitGroup

	mu    sync.Mutex
	rules []*Rule // guarded by mu
	seen  int     // guarded by mu
}

// NewFaultEngine stands before e and closes it in Close.
func NewFaultEngine(e engine.Engine) *FaultEngine { return &FaultEngine{Engine: e} }

// Inject adds a rule. The first that matches decides.
func (f *FaultEngine) Inject(r Rule) {
	if r.Times == 0 {
		r.Times = 1
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &r)
}

// FailNth makes the n-th transfer from now fail, n from 1.
func (f *FaultEngine) FailNth(n int, e syscall.Errno) {
	f.Inject(Rule{After: n - 1, Fault: Fault{Errno: e}})
}

// Clear drops all rules and returns the number of transfers since the last
// Clear.
func (f *FaultEngine) Clear() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.seen
	f.rules, f.seen = nil, 0
	return n
}

// ReadNow finds nothing.
func (f *FaultEngine) ReadNow(*engine.File, []byte, int64) int { return 0 }

// WriteNow leaves every write to Submit too.
func (f *FaultEngine) WriteNow(*engine.File, []byte, int64) (int, error) { return 0, nil }

// Submit applies the rules and hands over the rest as one batch.
func (f *FaultEngine) Submit(batch []*engine.IO) {
	var healthy []*engine.IO
	for _, io := range batch {
		switch r := f.ruleFor(io); {
		case r == nil:
			healthy = append(healthy, io)
		case r.Gate == nil:
			f.strike(io, r.Fault)
		default:
			f.waiting.Go(func() {
				r.Gate.Arrived <- struct{}{}
				<-r.Gate.open
				f.strike(io, r.Fault)
			})
		}
	}
	if len(healthy) > 0 {
		f.Engine.Submit(healthy)
	}
}

// ruleFor counts io and uses up a rule for it.
func (f *FaultEngine) ruleFor(io *engine.IO) *Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen++
	for _, r := range f.rules {
		if r.Times == 0 || r.Match != nil && !r.Match(io) {
			continue
		}
		if r.After > 0 {
			r.After--
			continue
		}
		r.Times--
		return r
	}
	return nil
}

// strike does what the fault leaves of io.
func (f *FaultEngine) strike(io *engine.IO, x Fault) {
	if x == (Fault{}) {
		f.Engine.Submit([]*engine.IO{io})
		return
	}
	if x.Moved == 0 {
		io.N, io.Err = 0, errnoError(x.Errno)
		io.Done(io)
		return
	}
	part := &engine.IO{Op: io.Op, File: io.File, Buf: io.Buf[:min(x.Moved, len(io.Buf))], Off: io.Off}
	part.Done = func(p *engine.IO) {
		io.N, io.Err = p.N, p.Err
		if io.Err == nil {
			io.Err = errnoError(x.Errno)
		}
		io.Done(io)
	}
	f.Engine.Submit([]*engine.IO{part})
}

func errnoError(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// Close waits for transfers at gates, which must be open.
func (f *FaultEngine) Close() error {
	f.waiting.Wait()
	return f.Engine.Close()
}

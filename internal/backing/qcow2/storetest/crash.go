package storetest

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/store"
)

// maxUnits bounds the log of a Crash. Beyond, the older half lands, as it does
// when a kernel writes back on its own.
const maxUnits = 1 << 16

// Call is a call to a Crash, as a hook sees it.
type Call struct {
	Op       Op
	Off, Len int64 // bytes; of Truncate, Off is the new end
	Durable  bool
	Done     bool // the call has been carried out, with Err
	Err      error
}

// Unit is the smallest change that a power cut can keep or lose: what one call
// made of one sector, or a move of the end.
type Unit struct {
	Call int   // number of the call, rising
	Op   Op    // Write, Punch, Zero or Truncate
	Off  int64 // of the sector; of Truncate, the new end

	from int64           // Truncate: the old end
	end  int64           // else: how far the file reached into the sector or behind it
	page *[pageSize]byte // the sector as it was then; nil for zeroes
}

// Crash is a file in memory that knows what of it is durable. Reads see all
// that was written. Of what was written since the last Sync, a power cut keeps
// any part: sectors of one call apart, later without earlier ones, and of a
// sector written twice the older or the newer. Moves of the end keep their
// order among each other. The file reaches at least to the last sector kept,
// and what was written behind an end that moved back is only kept with that
// move. After a failed Sync nothing becomes durable any more.
//
// The embedded Mem shall only be used for faults and counts, and to look.
type Crash struct {
	*Mem

	mu    sync.Mutex                // taken before that of Mem
	pages map[int64]*[pageSize]byte // guarded by mu: what is durable
	size  int64                     // guarded by mu: where that ends
	log   []Unit                    // guarded by mu: what is not durable
	calls int                       // guarded by mu
	hook  func(Call)                // guarded by mu
}

var _ store.Store = (*Crash)(nil)

// NewCrash makes a Crash whose contents, all durable, are those of m now. It
// takes m over.
func NewCrash(m *Mem) *Crash {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Crash{Mem: m, pages: maps.Clone(m.pages), size: m.size}
}

// SetHook has f called before each read, and before and after each call that
// changes the file or syncs it, in the goroutine of that call, which waits. f may take states, and
// use the file, which calls f again.
func (c *Crash) SetHook(f func(Call)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hook = f
}

func (c *Crash) tell(x Call) {
	c.mu.Lock()
	f := c.hook
	c.mu.Unlock()
	if f != nil {
		f(x)
	}
}

// do carries out a call between its two hooks.
func (c *Crash) do(x Call, call func() error) error {
	c.tell(x)
	c.mu.Lock()
	c.calls++
	x.Err = call()
	c.boundLocked()
	c.mu.Unlock()
	x.Done = true
	c.tell(x)
	return x.Err
}

// ReadAt fills p as far as the file reaches.
func (c *Crash) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.tell(Call{Op: Read, Off: off, Len: int64(len(p))})
	return c.Mem.ReadAt(ctx, p, off)
}

// WriteAt writes p. Durable writes are so at once, in whole sectors, together
// with all that was done before the last move of the end.
func (c *Crash) WriteAt(ctx context.Context, p []byte, off int64, durable bool) error {
	n := int64(len(p))
	return c.do(Call{Op: Write, Off: off, Len: n, Durable: durable}, func() error {
		if err := c.Mem.WriteAt(ctx, p, off, durable); err != nil {
			return err
		}
		c.recordLocked(Write, off, n)
		if durable {
			moved := c.lastMoveLocked()
			c.settleLocked(func(u *Unit) bool {
				return u.Call <= moved || u.Op != Truncate && u.Off < off+n && u.Off+pageSize > off
			})
		}
		return nil
	})
}

// Patch writes p beside the calls, as the Patch of Mem does. It is no more
// durable than a write.
func (c *Crash) Patch(off int64, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	c.Mem.Patch(off, p)
	c.recordLocked(Write, off, int64(len(p)))
	c.boundLocked()
}

// lastMoveLocked is the last call in the log that moved the end, 0 for none.
func (c *Crash) lastMoveLocked() int {
	for _, u := range slices.Backward(c.log) {
		if u.Op == Truncate {
			return u.Call
		}
	}
	return 0
}

// recordLocked puts the sectors of a range, as they are now, into the log.
func (c *Crash) recordLocked(op Op, off, n int64) {
	if n <= 0 {
		return
	}
	c.Mem.mu.Lock()
	defer c.Mem.mu.Unlock()
	for i := off / pageSize; i*pageSize < off+n; i++ {
		c.log = append(c.log, Unit{
			Call: c.calls, Op: op, Off: i * pageSize, end: min((i+1)*pageSize, c.Mem.size), page: c.Mem.pages[i]})
	}
}

// settleLocked makes those units durable that pick wants.
func (c *Crash) settleLocked(pick func(*Unit) bool) {
	durable := Mem{pages: c.pages, size: c.size}
	c.log = slices.DeleteFunc(c.log, func(u Unit) bool {
		if !pick(&u) {
			return false
		}
		durable.landLocked(&u)
		return true
	})
	c.size = durable.size
}

// landLocked carries out u in m, whose lock is held or that nobody else knows.
func (m *Mem) landLocked(u *Unit) {
	if u.Op == Truncate {
		m.cutLocked(u.Off)
		return
	}
	m.size = max(m.size, u.end)
	if u.page == nil {
		delete(m.pages, u.Off/pageSize)
	} else {
		m.pages[u.Off/pageSize] = u.page
	}
}

// boundLocked lets the older half of a log that is too long land.
func (c *Crash) boundLocked() {
	if len(c.log) > maxUnits {
		old := c.log[len(c.log)/2].Call
		c.settleLocked(func(u *Unit) bool { return u.Call <= old })
	}
}

// Sync makes durable what was written before.
func (c *Crash) Sync(ctx context.Context) error {
	return c.do(Call{Op: Sync}, func() error {
		if err := c.Mem.Sync(ctx); err != nil {
			return err
		}
		c.settleLocked(func(*Unit) bool { return true })
		return nil
	})
}

// Punch makes a range read as zeroes and frees its memory.
func (c *Crash) Punch(ctx context.Context, off, n int64) error {
	return c.wipe(Call{Op: Punch, Off: off, Len: n}, func() error { return c.Mem.Punch(ctx, off, n) })
}

// Zero makes a range read as zeroes.
func (c *Crash) Zero(ctx context.Context, off, n int64) error {
	return c.wipe(Call{Op: Zero, Off: off, Len: n}, func() error { return c.Mem.Zero(ctx, off, n) })
}

func (c *Crash) wipe(x Call, call func() error) error {
	return c.do(x, func() error {
		c.Mem.mu.Lock()
		size := c.Mem.size
		touched := c.Mem.touchedLocked(x.Off, x.Off+x.Len)
		c.Mem.mu.Unlock()
		if err := call(); err != nil {
			return err
		}
		for _, i := range touched {
			c.recordLocked(x.Op, i*pageSize, min(pageSize, size-i*pageSize))
		}
		return nil
	})
}

// Truncate moves the end of the file.
func (c *Crash) Truncate(size int64) error {
	return c.do(Call{Op: Truncate, Off: size}, func() error {
		c.Mem.mu.Lock()
		from := c.Mem.size
		c.Mem.mu.Unlock()
		if err := c.Mem.Truncate(size); err != nil {
			return err
		}
		c.log = append(c.log, Unit{Call: c.calls, Op: Truncate, Off: size, from: from})
		return nil
	})
}

// Log is what a power cut now may keep or lose, oldest first.
func (c *Crash) Log() []Unit {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.log)
}

// State is the file after a power cut now that keeps what keep wants; nil
// keeps nothing. keep must not use c.
func (c *Crash) State(keep func(Unit) bool) *Mem { return CutPower(c)[0].State(keep) }

// Crashes is CutPower for one file.
func (c *Crash) Crashes(rnd *rand.Rand, n int) iter.Seq2[string, *Mem] {
	return CutPower(c)[0].Crashes(rnd, n)
}

// Cut is all that a power cut at one moment can leave of a file.
type Cut struct {
	pages map[int64]*[pageSize]byte
	size  int64
	fixed bool
	log   []Unit
}

// CutPower cuts the power of all files at the same moment. The files go on.
// Two calls at the same time shall have the files in the same order.
func CutPower(files ...*Crash) []*Cut {
	cuts := make([]*Cut, len(files))
	for i, c := range files {
		c.mu.Lock()
		defer c.mu.Unlock()
		cuts[i] = &Cut{maps.Clone(c.pages), c.size, c.Fixed(), slices.Clone(c.log)}
	}
	return cuts
}

// State is the file that keeps what keep wants; nil keeps nothing.
func (k *Cut) State(keep func(Unit) bool) *Mem {
	m := New(nil)
	m.pages, m.size, m.fixed = maps.Clone(k.pages), k.size, k.fixed
	if keep == nil {
		return m
	}
	moves, edge := true, int64(1<<62) // whether ends still move; the lowest end that was lost
	for i := range k.log {
		u := &k.log[i]
		wanted := keep(*u)
		switch {
		case u.Op == Truncate && !(wanted && moves):
			moves = false
			if u.Off < u.from {
				edge = min(edge, u.Off)
			}
		case wanted && (u.Op == Truncate || u.Off+pageSize <= edge):
			m.landLocked(u)
		}
	}
	m.had = m.size // nobody has it open
	return m
}

// Crashes yields up to n files that can be left, each with a name: all that
// there are, if they are so few, else those with one edge or one exception and
// then any, as rnd picks them.
func (k *Cut) Crashes(rnd *rand.Rand, n int) iter.Seq2[string, *Mem] {
	return func(yield func(string, *Mem) bool) {
		for _, p := range k.plans(rnd, n) {
			if !yield(p.name, k.State(p.keep)) {
				return
			}
		}
	}
}

// plan says what of a log is kept.
type plan struct {
	name string
	keep func(Unit) bool
}

// plans chooses up to n plans.
func (k *Cut) plans(rnd *rand.Rand, n int) []plan {
	if len(k.log) < 16 && 1<<len(k.log) <= n {
		return k.subsets()
	}
	list := []plan{
		{"nothing", func(Unit) bool { return false }},
		{"everything", func(Unit) bool { return true }},
	}
	if n < 8 {
		list = list[:0] // room for others
	}
	telling := k.regular(rnd, n)
	rnd.Shuffle(len(telling), func(i, j int) { telling[i], telling[j] = telling[j], telling[i] })
	list = append(list, telling[:min(len(telling), n*rnd.IntN(4)/4)]...)
	for len(list) < n {
		list = append(list, random(rnd))
	}
	return list[:n]
}

// place tells units apart.
type place struct {
	call int
	off  int64
}

func placeOf(u Unit) place { return place{u.Call, u.Off} }

// subsets are all plans there are.
func (k *Cut) subsets() (list []plan) {
	for bits := range 1 << len(k.log) {
		kept := map[place]bool{}
		for i, u := range k.log {
			kept[placeOf(u)] = bits>>i&1 == 1
		}
		list = append(list, plan{fmt.Sprintf("subset %b of %d", bits, len(k.log)), func(u Unit) bool { return kept[placeOf(u)] }})
	}
	return list
}

// regular are the plans with one edge or one exception: by call, and by unit
// for n units that are picked evenly.
func (k *Cut) regular(rnd *rand.Rand, n int) (list []plan) {
	add := func(what string, u Unit, same func(Unit) bool) {
		at := fmt.Sprintf("%s of call %d (%s at %#x)", what, u.Call, u.Op, u.Off)
		list = append(list,
			plan{"all but " + at, func(v Unit) bool { return !same(v) }},
			plan{"only " + at, same},
			plan{"all before " + at, func(v Unit) bool { return v.Call < u.Call || v.Call == u.Call && v.Off < u.Off }},
			plan{"all from " + at, func(v Unit) bool { return v.Call > u.Call || v.Call == u.Call && v.Off >= u.Off }})
	}
	var calls []Unit // the first unit of each
	for i, u := range k.log {
		if i == 0 || u.Call != k.log[i-1].Call {
			calls = append(calls, u)
		}
	}
	for u := range evenly(rnd, calls, n) {
		add("all", u, func(v Unit) bool { return v.Call == u.Call })
	}
	for u := range evenly(rnd, k.log, n) {
		add("a sector", u, func(v Unit) bool { return placeOf(v) == placeOf(u) })
	}
	return list
}

// evenly yields about n of list.
func evenly(rnd *rand.Rand, list []Unit, n int) iter.Seq[Unit] {
	return func(yield func(Unit) bool) {
		step := max(1, len(list)/max(1, n))
		for i := rnd.IntN(step); i < len(list) && yield(list[i]); i += step {
		}
	}
}

// random keeps calls, or sectors, or sectors of some calls, by lot. What it
// does to a unit depends on the unit alone, so that it can be asked again.
func random(rnd *rand.Rand) plan {
	seed, chance, whole := rnd.Uint64(), 0.1+0.8*rnd.Float64(), rnd.Float64()
	return plan{fmt.Sprintf("random %#x", seed), func(u Unit) bool {
		if lot(seed, u.Call, -1) < whole {
			return lot(seed, u.Call, -2) < chance
		}
		return lot(seed, u.Call, u.Off) < chance
	}}
}

// lot is a number in [0, 1) that the arguments determine.
func lot(seed uint64, call int, off int64) float64 {
	x := seed
	for _, v := range []uint64{uint64(call), uint64(off)} {
		x = (x ^ v) * 0x9e3779b97f4a7c15
		x = (x ^ x>>32) * 0xd6e8feb86659fd93
		x ^= x >> 29
	}
	return float64(x>>11) / (1 << 53)
}

package engine

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

const (
	alice Owner = 1
	bob   Owner = 2
)

// fakeDisk is a disk that serves transfers in the order in which it gets them,
// as many at a time as the queue lets it have.
type fakeDisk struct {
	q    *Queue
	has  []*IO
	file *File

	clock time.Time // does not go by itself
}

func newFakeDisk(places int) *fakeDisk {
	d := &fakeDisk{q: NewQueue(places), file: &File{disk: 7}}
	d.q.now = func() time.Time { return d.clock }
	return d
}

func (d *fakeDisk) io(o Owner, op Op, n int) *IO {
	return &IO{Op: op, Owner: o, File: d.file, Buf: make([]byte, n)}
}

// push has n transfers of one owner wait.
func (d *fakeDisk) push(n int, o Owner, op Op, size int) {
	for range n {
		d.q.Push(d.io(o, op, size))
	}
}

// fill gives the disk all that it may have.
func (d *fakeDisk) fill() {
	for io := d.q.Pop(); io != nil; io = d.q.Pop() {
		d.has = append(d.has, io)
	}
}

// serve ends the transfer that the disk has had for longest.
func (d *fakeDisk) serve() *IO {
	d.fill()
	if len(d.has) == 0 {
		return nil
	}
	io := d.has[0]
	d.has = d.has[1:]
	d.q.Leave(io)
	return io
}

// work ends n transfers, those that the disk has had for longest, and has another one
// wait for each: what works has all the places that it may have.
func (d *fakeDisk) work(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		io := d.serve()
		if io == nil {
			t.Fatalf("nothing is in flight after %d of %d transfers", i, n)
		}
		d.q.Push(io)
	}
	d.fill()
}

func TestOwnerWhoIsAloneIsServedInOrder(t *testing.T) {
	for _, o := range []Owner{0, alice} {
		d := newFakeDisk(256)
		for i := range 1000 {
			io := d.io(o, OpWrite, 4096)
			io.Off = int64(i)
			d.q.Push(io)
		}
		want := 256 - limits.ShareKept
		if o != 0 { // one part is for other disks, one for others of this one
			want = 256 - 2*limits.ShareKept
			want -= want / limits.ShareSpare
			want -= want / limits.ShareSpare
		}
		most := 0
		for i := range 1000 {
			if io := d.serve(); io == nil || io.Off != int64(i) || io.Next != nil {
				t.Fatalf("owner %d, transfer %d: got %+v", o, i, io)
			}
			most = max(most, len(d.has)+1)
		}
		if most != want {
			t.Errorf("owner %d: %d in flight, want %d", o, most, want)
		}
		if d.serve() != nil || d.q.Waiting() != 0 {
			t.Errorf("owner %d: there is more than was pushed", o)
		}
	}
}

// TestReadsAreNotBehindTheNeighboursQueue is LM-04 on a disk without a clock:
// between two reads of one guest it serves a handful of the neighbour's
// requests, however many of them wait.
func TestReadsAreNotBehindTheNeighboursQueue(t *testing.T) {
	for _, tt := range []struct {
		name string
		op   Op
		size int
		most int
	}{
		{"small writes", OpWrite, 4096, 8},
		{"large writes", OpWrite, 1 << 20, 1},
		{"flushes", OpSync, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newFakeDisk(511)
			d.push(1023, alice, tt.op, tt.size)
			d.fill()
			d.push(1, bob, OpRead, 4096)
			between, reads := 0, 0
			for reads < 1000 {
				switch io := d.serve(); {
				case io == nil:
					t.Fatalf("after %d reads: nothing is in flight", reads)
				case io.Owner == alice:
					between++
					d.push(1, alice, tt.op, tt.size)
				default:
					// The first one finds what was there before anybody had
					// heard of bob.
					if reads > 0 && between > tt.most {
						t.Fatalf("before read %d: %d of the neighbour's, want at most %d", reads, between, tt.most)
					}
					reads++
					between = 0
					d.push(1, bob, OpRead, 4096)
				}
			}
		})
	}
}

// TestCalledOffTakesNothingOfTheShare: of a disk that hangs all that waits may leave at
// once when it is called off, and nothing more begins for that.
func TestCalledOffTakesNothingOfTheShare(t *testing.T) {
	d := newFakeDisk(64)
	gone := make(chan struct{})
	const deep = 100
	for range deep {
		io := d.io(alice, OpWrite, 4096)
		io.Cancel = gone
		d.q.Push(io)
	}
	d.fill()
	begun := len(d.has)
	if begun == 0 || begun == deep || d.q.Ready() {
		t.Fatalf("%d of %d have begun, more may: %v", begun, deep, d.q.Ready())
	}
	before := *d.q.disks[d.file.disk]
	close(gone)
	for i := range deep - begun {
		if !d.q.Ready() {
			t.Fatalf("%d of %d may leave, want all", i, deep-begun)
		}
		d.q.Leave(d.q.Pop())
	}
	d.push(deep, alice, OpWrite, 4096)
	if io := d.q.Pop(); io != nil || d.q.Ready() {
		t.Error("another transfer began before one of the disk was over")
	}
	after := d.q.disks[d.file.disk]
	if after.moved != before.moved || after.ahead != before.ahead || after.flying != begun {
		t.Errorf("the disk: got %+v, want %+v", *after, before)
	}
	for range begun + deep {
		if d.serve() == nil {
			t.Fatal("the disk goes on, and does not have everything")
		}
	}
	if d.q.flying != 0 || d.q.house.flying != 0 || d.q.house.cost != 0 || d.q.Waiting() != 0 {
		t.Errorf("afterwards: got %d in flight, %d waiting", d.q.flying, d.q.Waiting())
	}
}

// TestFastDiskHasMoreInFlight has two owners with as much as they can have,
// on disks that take so long for each transfer.
func TestFastDiskHasMoreInFlight(t *testing.T) {
	for _, tt := range []struct {
		each        time.Duration
		least, most int
	}{{time.Microsecond, 200, 300}, {2 * time.Microsecond, 100, 150}, {11 * time.Microsecond, 18, 26}, {time.Millisecond, 16, 16}} {
		d := newFakeDisk(511)
		again := func(io *IO) { d.push(1, io.Owner, OpWrite, 4096) }
		d.push(512, alice, OpWrite, 4096)
		d.push(512, bob, OpWrite, 4096)
		for range 20_000 {
			d.clock = d.clock.Add(tt.each)
			again(d.serve())
		}
		d.fill()
		if n := len(d.has); n < tt.least || n > tt.most {
			t.Errorf("%v each: %d in flight, want %d to %d", tt.each, n, tt.least, tt.most)
		}
		for range 2_000 { // slower by now
			d.clock = d.clock.Add(time.Millisecond)
			again(d.serve())
		}
		d.fill()
		if n := len(d.has); n > 16 {
			t.Errorf("%v each, then slow: %d in flight", tt.each, n)
		}
	}
}

// TestTurnsAreWorthTheSame has one place, for which owners with transfers of
// all sizes wait.
func TestTurnsAreWorthTheSame(t *testing.T) {
	kinds := []struct {
		op   Op
		size int
	}{{OpRead, 4096}, {OpWrite, 1 << 20}, {OpSync, 0}, {OpRead, 64 << 10}}
	d := newFakeDisk(1)
	spent := make([]int64, len(kinds))
	again := func(k int) { d.push(1, Owner(k+1), kinds[k].op, kinds[k].size) }
	for k := range kinds {
		again(k)
		again(k)
	}
	largest := (&IO{Op: OpWrite, Buf: make([]byte, 1<<20)}).cost()
	for i := range 10_000 {
		io := d.serve()
		k := int(io.Owner - 1)
		spent[k] += io.cost()
		again(k)
		for k, s := range spent {
			if ahead := s - spent[(k+1)%len(kinds)]; ahead > largest+2*limits.ShareTurn {
				t.Fatalf("after %d transfers owner %d is %d ahead: %v", i, k, ahead, spent)
			}
		}
	}
}

func TestOwnerWhoIsSilentDoesNotCount(t *testing.T) {
	d := newFakeDisk(511)
	d.push(1, bob, OpRead, 4096)
	d.serve()
	d.push(600, alice, OpWrite, 4096)
	d.fill()
	if n := len(d.has); n != 8 {
		t.Errorf("beside one who was there: %d in flight, want 8", n)
	}
	for moved := int64(0); moved <= limits.ShareIdle+limits.ShareIdle/4; {
		moved += d.serve().cost()
		d.push(1, alice, OpWrite, 4096)
	}
	d.fill()
	if n := len(d.has); n < 380 {
		t.Errorf("alone again: %d in flight, want most of 511", n)
	}
}

// TestHangingStorageLeavesPlaces has disks that hang one after the other: new, or
// when they had as much in flight as they may.
func TestHangingStorageLeavesPlaces(t *testing.T) {
	const many = limits.ShareOwners
	for _, tt := range []struct {
		places, hanging, owners int
		full                    bool
	}{
		{limits.PoolWorkers, 7, 1, false}, {limits.PoolWorkers, 2, 1, true},
		{limits.PoolWorkers, 5, many, false}, {limits.PoolWorkers, 1, many, true},
		{limits.RemoteWorkers, 14, 1, false}, {limits.RemoteWorkers, 8, 1, true},
		{limits.RemoteWorkers, 9, many, false}, {limits.RemoteWorkers, 4, many, true},
		{limits.RingWorkers, 22, 1, false}, {limits.RingWorkers, 12, 1, true},
		{limits.RingWorkers, 12, many, false}, {limits.RingWorkers, 6, many, true},
	} {
		q := NewQueue(tt.places)
		for i := range tt.hanging {
			d := &fakeDisk{q: q, file: &File{disk: uint64(i)}}
			d.push(2*tt.places, alice, OpWrite, 4096)
			d.fill()
			if tt.full {
				d.work(t, 4*tt.places)
			}
			for o := range Owner(tt.owners - 1) {
				d.push(2, 100+o, OpWrite, 4096)
				d.fill()
			}
		}
		for range 100 {
			q.Push(&IO{Owner: bob, File: &File{disk: 99}})
			io := q.Pop()
			if io == nil || io.Owner != bob {
				t.Errorf("%+v: %d in flight, then got %+v", tt, q.flying, io)
				break
			}
			q.Leave(io)
		}
	}
}

// TestPulseHasAPlace, whatever hangs, even if the program's own transfers do.
func TestPulseHasAPlace(t *testing.T) {
	for _, places := range []int{limits.PoolWorkers, limits.RingWorkers, 511} {
		for _, house := range []int{0, places} {
			q := NewQueue(places)
			for o := range Owner(2 * places) {
				q.Push(&IO{Owner: 100 + o, File: &File{disk: uint64(o)}})
			}
			for q.Pop() != nil {
			}
			if want := places - 2*limits.ShareKept; q.flying != want {
				t.Errorf("%d places: owners have %d in flight, want %d", places, q.flying, want)
			}
			for range house {
				q.Push(&IO{File: &File{disk: 1}})
			}
			for q.Pop() != nil {
			}
			for range 100 {
				q.Push(&IO{Owner: Pulse, File: &File{disk: 2}})
				io := q.Pop()
				if io == nil || io.Owner != Pulse {
					t.Fatalf("%d places, %d in flight: got %+v", places, q.flying, io)
				}
				q.Leave(io)
			}
		}
	}
}

// TestHangingDiskOfManyLeavesPlaces: however many owners wait for it, there are
// places for the owners of another, and for one more of its own.
func TestHangingDiskOfManyLeavesPlaces(t *testing.T) {
	for _, places := range []int{limits.PoolWorkers, 256, 511} {
		for _, owners := range []int{1, 2, places, 3 * places} {
			d := newFakeDisk(places)
			q, hangs := d.q, d.file
			for o := range Owner(owners) {
				d.push(2*places, 100+o, OpRead, 0)
				d.fill()
				if o == 0 {
					d.work(t, 8*places)
				}
			}
			most := places - places/limits.ShareSpare
			if least := places/limits.ShareSpare*6 - 2*limits.ShareKept; q.flying < least || q.flying > most {
				t.Errorf("%d places, %d owners: %d in flight of the disk that hangs, want %d to %d", places, owners, q.flying, least, most)
			}
			if owners == 1 {
				q.Push(&IO{Owner: alice, File: hangs})
				if io := q.Pop(); io == nil || io.Owner != alice {
					t.Errorf("%d places: another owner of the disk got %+v", places, io)
				}
			}
			for i := range places/limits.ShareSpare - 2*limits.ShareKept {
				q.Push(&IO{Owner: bob, File: &File{disk: 99 + uint64(i)}})
				if io := q.Pop(); io == nil || io.File == hangs {
					t.Errorf("%d places, %d owners: disk %d of others got %+v", places, owners, i, io)
					break
				}
			}
		}
	}
}

// TestProgramIsNeverHeldBack, nor does it hold an owner back.
func TestProgramIsNeverHeldBack(t *testing.T) {
	d := newFakeDisk(64)
	d.push(60, alice, OpWrite, 4096)
	d.push(60, 0, OpWrite, 4096)
	d.fill()
	var mine int
	for _, io := range d.has {
		if io.Owner == 0 {
			mine++
		}
	}
	// Nothing of alice's has ended: with that, some half of them were hers.
	if want := 64 - limits.ShareKept; len(d.has) != want || mine < 28 || mine > 52 {
		t.Errorf("%d in flight, %d of them the program's; want %d, and 28 to 52 of them", len(d.has), mine, want)
	}
}

// TestOtherDisksAreNotShared: each neighbour has a disk of its own.
func TestOtherDisksAreNotShared(t *testing.T) {
	d := newFakeDisk(256)
	for i := range 256 {
		d.q.Push(&IO{Owner: 1 + Owner(i%2), File: &File{disk: uint64(i % 2)}, Buf: make([]byte, 4096)})
	}
	d.work(t, 1000)
	if n := len(d.has); n < 200 {
		t.Errorf("%d in flight, want nearly 256", n)
	}
}

// TestOwnersComeAndGo: what is kept of them is bounded.
func TestOwnersComeAndGo(t *testing.T) {
	d := newFakeDisk(16)
	for o := range Owner(10_000) {
		d.push(1, o+1, OpRead, 4096)
		if io := d.serve(); io == nil || io.Owner != o+1 {
			t.Fatalf("owner %d: got %+v", o+1, io)
		}
	}
	if n := len(d.q.flows); n > limits.ShareOwners || n != len(d.q.disks[7].flows) {
		t.Errorf("%d owners are remembered, %d of the disk", n, len(d.q.disks[7].flows))
	}
}

// TestNothingIsLostInTheQueue pushes, pops and ends at random.
func TestNothingIsLostInTheQueue(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	q := NewQueue(1 + rnd.IntN(20))
	var waiting, flying int
	var has []*IO
	for step := range 200_000 {
		switch rnd.IntN(5) {
		case 0, 1:
			if waiting > 300 {
				continue
			}
			q.Push(&IO{Owner: Owner(rnd.IntN(6)), Op: Op(rnd.IntN(5)), File: &File{disk: rnd.Uint64N(3)}, Buf: make([]byte, rnd.IntN(1<<19))})
			waiting++
		case 2, 3:
			ready := q.Ready()
			io := q.Pop()
			if ready != (io != nil) || io == nil && waiting > 0 && flying == 0 {
				t.Fatalf("seed %d, step %d: ready %v, got %v; %d wait, %d in flight", seed, step, ready, io, waiting, flying)
			}
			if io != nil {
				has = append(has, io)
				waiting--
				flying++
			}
		case 4:
			if flying > 0 {
				i := rnd.IntN(flying)
				q.Leave(has[i])
				has[i] = has[flying-1]
				has = has[:flying-1]
				flying--
			}
		}
		if q.Waiting() != waiting || q.flying != flying || flying > q.places {
			t.Fatalf("seed %d, step %d: %d wait, %d in flight of %d; want %d and %d", seed, step, q.Waiting(), q.flying, q.places, waiting, flying)
		}
	}
}

// TestFirstOwnerCostsNoMemory: what serves swap has one, on one disk.
func TestFirstOwnerCostsNoMemory(t *testing.T) {
	var queues [12]*Queue // AllocsPerRun has one run more
	for i := range queues {
		queues[i] = NewQueue(limits.PoolWorkers)
	}
	ios := [2]IO{{File: &File{disk: 1}}, {Owner: alice, File: &File{disk: 1}}}
	next := 0
	if n := testing.AllocsPerRun(len(queues)-1, func() {
		q := queues[next]
		next++
		q.Push(&ios[0])
		q.Push(&ios[1])
		q.Leave(q.Pop())
		q.Leave(q.Pop())
	}); n != 0 {
		t.Errorf("%v allocations in a new queue", n)
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	q, f := NewQueue(64), &File{disk: 1}
	var ios [90]IO
	if n := testing.AllocsPerRun(1000, func() {
		for i := range ios {
			ios[i] = IO{Owner: Owner(i % 3), File: f}
			q.Push(&ios[i])
		}
		for q.Waiting() > 0 {
			q.Leave(q.Pop())
		}
	}); n != 0 {
		t.Errorf("%v allocations for 90 transfers of three owners", n)
	}
}

// noted keeps the owner of what is submitted.
type noted struct {
	Engine
	owner Owner
}

func (n *noted) Submit(batch []*IO) {
	n.owner = batch[0].Owner
	for _, io := range batch {
		io.finish()
	}
}

func TestOwnerComesWithTheContext(t *testing.T) {
	e := new(noted)
	ctx, cancel := context.WithCancel(WithOwner(context.Background(), OwnerOf("guest")))
	defer cancel()
	if err := Do(context.WithoutCancel(ctx), e, &IO{}); err != nil || e.owner != OwnerOf("guest") || e.owner == 0 {
		t.Errorf("owner is %d, %v; want %d", e.owner, err, OwnerOf("guest"))
	}
	if err := Do(context.Background(), e, &IO{Owner: bob}); err != nil || e.owner != 0 {
		t.Errorf("without one: owner is %d, %v", e.owner, err)
	}
	if OwnerOf("guest") == OwnerOf("other") {
		t.Error("two guests are one")
	}
}

// BenchmarkQueue is what the queue costs a transfer of one owner.
func BenchmarkQueue(b *testing.B) {
	q, f := NewQueue(511), &File{disk: 1}
	var ios [32]IO
	for i := range ios {
		ios[i] = IO{Owner: alice, File: f}
	}
	for b.Loop() {
		for i := range ios {
			q.Push(&ios[i])
		}
		for range ios {
			q.Leave(q.Pop())
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(ios)), "ns/transfer")
}

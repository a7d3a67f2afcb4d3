package engine

import (
	"context"
	"hash/maphash"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Owner is on whose behalf a transfer is made. Owners share an engine; the
// zero value is the program itself, which is never held back.
type Owner uint64

// Pulse owns what finds out whether an engine makes transfers at all. It needs one
// place at a time, which nobody else takes.
const Pulse Owner = 1 << 63 // even, unlike what OwnerOf gives

var ownerSeed = maphash.MakeSeed()

// OwnerOf is the owner that name stands for, never the zero value. It means
// something within this process only.
func OwnerOf(name string) Owner { return Owner(maphash.String(ownerSeed, name) | 1) }

// ownerKey is the key of the owner in a context.
type ownerKey struct{}

// WithOwner makes o the owner of all that Do is given with the context.
func WithOwner(ctx context.Context, o Owner) context.Context {
	return context.WithValue(ctx, ownerKey{}, o)
}

// owner is whom ctx works for.
func owner(ctx context.Context) Owner {
	o, _ := ctx.Value(ownerKey{}).(Owner)
	return o
}

// cost is what io takes from its owner's share.
func (io *IO) cost() int64 {
	if io.Op == OpRead || io.Op == OpWrite {
		return limits.ShareOp + int64(len(io.Buf))
	}
	return limits.ShareSync
}

// Queue holds the transfers that wait for a place in flight, and decides whose
// comes next: by deficit round robin among the owners. It is for
// implementations of Engine and not safe for concurrent use.
//
// Turns alone would not help a guest with one request at a time: what the
// neighbour has in flight stands before it in the queue of the disk. So, while
// several owners use a disk, each has a part of what the disk moves in
// limits.ShareDelay in flight there, so that a fast disk has more. And a disk
// always leaves some places free, however many owners it has, so that storage
// that hangs does not hang what others have elsewhere; what it takes, one owner
// leaves some of to the others of the disk. As several disks may
// hang, a disk takes places step by step while transfers of it end.
type Queue struct {
	places  int // bound of the transfers in flight
	kept    int // of them, for the pulse alone, and as many for the house
	flying  int
	waiting int

	house  flow // of those without an owner
	pulse  flow
	flows  map[flowKey]*flow
	disks  map[uint64]*disk
	last   *flow   // that of the last Push: the next one often has the same
	ready  []*flow // with something waiting
	turn   int     // place in ready of the one whose turn it is
	spare  []*flow
	unused *disk // the first disk to come, then nil
	now    func() time.Time
}

type flowKey struct {
	owner Owner
	disk  uint64
}

// flow is what one owner has on one disk.
type flow struct {
	key        flowKey
	disk       *disk // nil for the house and the pulse
	head, tail *IO   // waiting, linked by Next
	flying     int
	cost       int64 // of those in flight
	credit     int64 // what it may still start in this round
	seen       int64 // disk.moved when it was last heard of
}

// disk is what the queue knows of a disk that has owners.
type disk struct {
	flows  []*flow
	flying int   // of all owners
	ahead  int   // transfers begun since one ended, less those that ended in a row before
	moved  int64 // cost of all that was started
	look   int64 // moved when measure comes again
	bound  int64 // cost of what several owners may have in flight

	measured int64     // moved when measure came last
	since    time.Time // when that was
}

// NewQueue makes a queue for an engine with that many places in flight. It has
// all that one owner on one disk needs: who serves swap must not allocate then.
func NewQueue(places int) *Queue {
	q := &Queue{
		places: places,
		kept:   min(limits.ShareKept, places/(2*limits.ShareSpare)),
		pulse:  flow{key: flowKey{owner: Pulse}},
		flows:  make(map[flowKey]*flow, limits.ShareOwners),
		disks:  make(map[uint64]*disk, limits.ShareOwners),
		ready:  make([]*flow, 0, limits.ShareOwners),
		spare:  []*flow{new(flow)},
		unused: newDisk(),
		now:    time.Now,
	}
	q.last = &q.house
	return q
}

func newDisk() *disk {
	return &disk{flows: make([]*flow, 0, limits.ShareOwners), bound: limits.ShareFlying}
}

// measure follows what the disk moves. A pause counts as slow: what is learned
// then is forgotten as soon as there is much to do again.
func (d *disk) measure(now time.Time) {
	if took := now.Sub(d.since); took > 0 {
		moves := (d.moved - d.measured) * int64(limits.ShareDelay) / int64(took)
		d.bound = max(limits.ShareFlying, d.bound+(moves-d.bound)/4)
	}
	d.measured, d.since = d.moved, now
	d.look = d.moved + limits.ShareLook
}

// Waiting is the number of transfers that wait.
func (q *Queue) Waiting() int { return q.waiting }

// Push takes io, whose Next it uses.
func (q *Queue) Push(io *IO) {
	f := q.last
	if io.Owner != f.key.owner || f.disk != nil && io.File.disk != f.key.disk {
		f = q.find(io)
		q.last = f
	}
	io.flow, io.Next = f, nil
	if f.tail == nil {
		f.head = io
		q.ready = append(q.ready, f)
	} else {
		f.tail.Next = io
	}
	f.tail = io
	q.waiting++
	if f.disk != nil {
		f.seen = f.disk.moved
	}
}

// Pop returns the transfer to start next, or nil: then none waits, or those
// that do have to wait until another one has left. It is in flight until Leave.
func (q *Queue) Pop() *IO {
	if q.flying >= q.places {
		return nil
	}
	for held := 0; held < len(q.ready); {
		f := q.ready[q.turn]
		switch {
		case f.head.calledOff():
			return q.drop(f)
		case !q.may(f):
			held++
			q.pass()
		case len(q.ready) > 1 && f.credit < f.head.cost():
			held = 0
			f.credit += limits.ShareTurn
			q.pass()
		default:
			return q.start(f)
		}
	}
	return nil
}

// Ready reports whether Pop would return a transfer.
func (q *Queue) Ready() bool { return q.flying < q.places && slices.ContainsFunc(q.ready, q.leads) }

// leads tells whether the first transfer of f may stop waiting. One that was called
// off always may: it is over at once.
func (q *Queue) leads(f *flow) bool { return f.head.calledOff() || q.may(f) }

// pass gives the turn to the next one.
func (q *Queue) pass() {
	if q.turn++; q.turn >= len(q.ready) {
		q.turn = 0
	}
}

// may tells whether f may have one more in flight. A disk that has none may, as
// long as there is a place, and so may an owner as long as the disk may.
func (q *Queue) may(f *flow) bool {
	free, d := q.free(f), f.disk
	if d == nil || free <= 0 {
		return free > 0
	}
	if !q.trusts(f) || q.room(f.flying, q.room(d.flying, free)) <= 0 {
		return false
	}
	n := int64(len(d.flows))
	return n == 1 || f.cost < d.bound/n
}

// free is how many more f may take of all places, if nobody else comes.
func (q *Queue) free(f *flow) int {
	free := q.places - q.flying
	if f != &q.pulse {
		free -= q.kept
	}
	if f.disk != nil {
		free -= max(q.kept-q.house.flying, 0)
	}
	return free
}

// trusts tells whether f may have one more in flight before anything of its disk
// ends. All of the disk may take one in limits.ShareTrial of what was free when
// something ended last, and one owner leaves some of that to others.
func (q *Queue) trusts(f *flow) bool {
	ahead := f.disk.ahead
	return ahead <= 0 || q.room(min(f.flying, ahead), (ahead+q.places-q.flying)/limits.ShareTrial-ahead) > 0
}

// room is how many more of the free places may be taken by who has some: it
// leaves one in limits.ShareSpare of both together, but at least one in
// limits.ShareLast of all places, or half of both where that is less.
func (q *Queue) room(has, free int) int {
	both := has + free
	return free - max(both/limits.ShareSpare, min(both/2, q.places/limits.ShareLast))
}

// pull takes the first transfer of f, whose turn it is, from those that wait.
func (q *Queue) pull(f *flow) *IO {
	io := f.head
	f.head, io.Next = io.Next, nil
	if f.head == nil {
		f.tail, f.credit = nil, 0
		q.ready = slices.Delete(q.ready, q.turn, q.turn+1)
		if q.turn >= len(q.ready) {
			q.turn = 0
		}
	}
	q.waiting--
	return io
}

// drop takes the first transfer of f, which was called off. Until it leaves it is the
// house's: f has taken nothing of its share, and its disk has moved nothing.
func (q *Queue) drop(f *flow) *IO {
	io := q.pull(f)
	io.flow = &q.house
	q.fly(io.flow, io.cost())
	return io
}

// fly counts a transfer of f as in flight.
func (q *Queue) fly(f *flow, cost int64) {
	q.flying++
	f.flying++
	f.cost += cost
}

// start takes the first transfer of f, at its cost.
func (q *Queue) start(f *flow) *IO {
	cost := f.head.cost()
	f.credit -= cost
	io := q.pull(f)
	if len(q.ready) == 1 {
		f.credit = 0
	}
	q.fly(f, cost)
	if d := f.disk; d != nil {
		d.flying++
		d.ahead++
		if d.moved += cost; d.moved >= d.look {
			d.measure(q.now())
			q.forget(d, limits.ShareIdle)
		}
	}
	return io
}

// Leave ends what Pop began. It is called before Done.
func (q *Queue) Leave(io *IO) { q.leave(io.flow, io.cost()) }

// leave is Leave for an IO that has gone back to its owner.
func (q *Queue) leave(f *flow, cost int64) {
	q.flying--
	f.flying--
	f.cost -= cost
	if d := f.disk; d != nil {
		d.flying--
		d.ahead = max(min(d.ahead, 0)-1, -d.flying)
		f.seen = d.moved
	}
}

// find is the flow of io, a new one if need be.
func (q *Queue) find(io *IO) *flow {
	switch io.Owner {
	case 0:
		return &q.house
	case Pulse:
		return &q.pulse
	}
	key := flowKey{io.Owner, io.File.disk}
	if f := q.flows[key]; f != nil {
		return f
	}
	d := q.disks[key.disk]
	if d == nil {
		if d, q.unused = q.unused, nil; d == nil {
			d = newDisk()
		}
		q.disks[key.disk] = d
	}
	if len(d.flows) >= limits.ShareOwners {
		q.forget(d, 0)
	}
	var f *flow
	if n := len(q.spare); n > 0 {
		f, q.spare = q.spare[n-1], q.spare[:n-1]
	} else {
		f = new(flow)
	}
	*f = flow{key: key, disk: d}
	d.flows = append(d.flows, f)
	q.flows[key] = f
	return f
}

// forget drops the owners that have nothing to do and were not heard of while
// others moved more than idle. One that is alone disturbs nobody and stays.
func (q *Queue) forget(d *disk, idle int64) {
	if len(d.flows) == 1 {
		return
	}
	d.flows = slices.DeleteFunc(d.flows, func(f *flow) bool {
		if f.head != nil || f.flying > 0 || d.moved-f.seen <= idle {
			return false
		}
		delete(q.flows, f.key)
		if q.last == f {
			q.last = &q.house
		}
		q.spare = append(q.spare, f)
		return true
	})
}

package qcow2

import (
	"iter"
	"sync/atomic"
)

// clock finds what a cache drops when it is full: entries that were not used
// since its hand last passed them. It knows what the entries cost and nothing
// else of them. All methods need the lock of the cache; touch does not.
type clock[E clocked] struct {
	most  int64 // cost that evict leaves
	bytes int64 // cost of all entries, pinned or not
	count int   // all entries, pinned or not

	ring []E // entries that are not pinned
	hand int // in ring, or behind it
}

// clocked is a pointer to a struct that embeds a clockNode.
type clocked interface {
	comparable
	node() *clockNode
}

// clockNode is what a clock keeps in an entry, which is in one clock at a time.
type clockNode struct {
	used atomic.Bool // since the hand passed
	cost int64       // guarded by the lock of the cache
	pins int         // guarded by the lock of the cache
	at   int         // guarded by the lock of the cache; place in the ring, if not pinned
}

func (n *clockNode) node() *clockNode { return n }

// touch keeps the entry until the hand has passed it once more. It needs no
// lock, and does not write to memory that others read if there is no need.
func (n *clockNode) touch() {
	if !n.used.Load() {
		n.used.Store(true)
	}
}

// add takes e, which is in no clock, with what it costs. It evicts nothing, and
// e may be the next to go unless it is touched or pinned.
func (c *clock[E]) add(e E, cost int64) {
	n := e.node()
	n.cost, n.pins = cost, 0
	c.bytes += cost
	c.count++
	c.enter(e)
}

// remove forgets e, which is in the clock.
func (c *clock[E]) remove(e E) {
	n := e.node()
	if n.pins == 0 {
		c.leave(e)
	}
	n.pins = 0
	c.bytes -= n.cost
	c.count--
}

// pin keeps e, which is in the clock, from eviction until unpin was called as
// often. Pinned entries do not slow evict down.
func (c *clock[E]) pin(e E) {
	n := e.node()
	if n.pins++; n.pins == 1 {
		c.leave(e)
	}
}

// unpin takes one pin from e. It evicts nothing: where pins may have kept the
// clock above its budget, evict follows.
func (c *clock[E]) unpin(e E) {
	n := e.node()
	if n.pins--; n.pins == 0 {
		c.enter(e)
	}
}

// evict makes room for so many bytes more: it removes entries, those that it
// yields, until what is left leaves that room in the budget or is all pinned.
// The caller does not change the clock meanwhile.
func (c *clock[E]) evict(room int64) iter.Seq[E] {
	return func(yield func(E) bool) {
		for c.bytes > c.most-room && len(c.ring) > 0 {
			if c.hand >= len(c.ring) {
				c.hand = 0
			}
			e := c.ring[c.hand]
			if e.node().used.Swap(false) {
				c.hand++
				continue
			}
			c.remove(e)
			if !yield(e) {
				return
			}
		}
	}
}

// enter puts e into the ring, which the hand reaches last.
func (c *clock[E]) enter(e E) {
	e.node().at = len(c.ring)
	c.ring = append(c.ring, e)
}

// leave takes e out of the ring; the last one takes its place.
func (c *clock[E]) leave(e E) {
	at, last := e.node().at, len(c.ring)-1
	c.ring[at] = c.ring[last]
	c.ring[at].node().at = at
	var none E
	c.ring[last] = none
	c.ring = c.ring[:last]
}

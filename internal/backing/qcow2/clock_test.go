package qcow2

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// hour is an entry of a clock.
type hour struct {
	clockNode
	name int
}

func evicted(c *clock[*hour], room int64) (names []int) {
	for e := range c.evict(room) {
		names = append(names, e.name)
	}
	return names
}

// fullClock has n entries of 10 bytes and room for no more.
func fullClock(n int) (*clock[*hour], []*hour) {
	c := &clock[*hour]{most: int64(10 * n)}
	all := make([]*hour, n)
	for i := range all {
		all[i] = &hour{name: i}
		c.add(all[i], 10)
	}
	return c, all
}

func TestClockEvictsWhatWasNotUsed(t *testing.T) {
	c, all := fullClock(5)
	if got := evicted(c, 0); got != nil {
		t.Fatalf("a clock within its budget evicts %v", got)
	}
	all[0].touch()
	all[1].touch()
	if got := evicted(c, 1); !slices.Equal(got, []int{2}) {
		t.Fatalf("room for one byte evicts %v, want [2]", got)
	}
	if c.bytes != 40 || c.count != 4 {
		t.Errorf("%d entries of %d bytes are left, want 4 of 40", c.count, c.bytes)
	}
	// All go at last, used or not.
	all[3].touch()
	got := evicted(c, 50)
	if slices.Sort(got); !slices.Equal(got, []int{0, 1, 3, 4}) || c.bytes != 0 || c.count != 0 {
		t.Errorf("room for everything evicts %v and leaves %d of %d bytes", got, c.count, c.bytes)
	}
}

func TestClockKeepsWhatIsPinned(t *testing.T) {
	c, all := fullClock(4)
	c.pin(all[0])
	c.pin(all[2])
	c.pin(all[2])
	got := evicted(c, 100)
	if slices.Sort(got); !slices.Equal(got, []int{1, 3}) || c.bytes != 20 {
		t.Fatalf("with two pinned, eviction takes %v and leaves %d bytes", got, c.bytes)
	}
	c.unpin(all[0])
	c.unpin(all[2]) // one of two pins
	if got := evicted(c, 100); !slices.Equal(got, []int{0}) {
		t.Fatalf("after one was unpinned, eviction takes %v", got)
	}
	c.remove(all[2])
	if c.bytes != 0 || c.count != 0 {
		t.Errorf("%d entries of %d bytes are left", c.count, c.bytes)
	}
	c.add(all[2], 7)
	if got := evicted(c, 100); !slices.Equal(got, []int{2}) {
		t.Errorf("removed while pinned and added again, eviction takes %v", got)
	}
}

// TestClockCountsRight compares a clock with a plain account of it.
func TestClockCountsRight(t *testing.T) {
	const seed = 12
	r := rand.New(rand.NewPCG(seed, 1))
	c := &clock[*hour]{most: 500}
	in := map[*hour]int{} // to pins
	pick := func() *hour {
		for e := range in {
			return e
		}
		return nil
	}
	for step := range 20000 {
		switch e := pick(); {
		case e == nil || r.IntN(3) == 0:
			cost := int64(1 + r.IntN(90))
			for e := range c.evict(cost) {
				if in[e] != 0 {
					t.Fatalf("seed %d, step %d: a pinned entry was evicted", seed, step)
				}
				delete(in, e)
			}
			e = &hour{name: step}
			c.add(e, cost)
			in[e] = 0
		case r.IntN(4) == 0:
			c.remove(e)
			delete(in, e)
		case in[e] > 0 && r.IntN(4) != 0:
			c.unpin(e)
			in[e]--
		case r.IntN(2) == 0:
			c.pin(e)
			in[e]++
		default:
			e.touch()
		}
		checkClock(t, c, in)
	}
}

func checkClock(t *testing.T, c *clock[*hour], in map[*hour]int) {
	t.Helper()
	var bytes int64
	free := 0
	for e, pins := range in {
		bytes += e.cost
		if pins == 0 {
			free++
		}
	}
	if c.bytes != bytes || c.count != len(in) || len(c.ring) != free {
		t.Fatalf("%d entries of %d bytes, %d free; want %d of %d, %d free", c.count, c.bytes, len(c.ring), len(in), bytes, free)
	}
	for i, e := range c.ring {
		if e.at != i || e.pins != 0 {
			t.Fatalf("entry at %d thinks it is at %d with %d pins", i, e.at, e.pins)
		}
		if _, ok := in[e]; !ok {
			t.Fatalf("entry at %d was removed", i)
		}
	}
}

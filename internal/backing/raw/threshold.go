package raw

import "sync/atomic"

// Threshold tells of the first write to a file that goes beyond an offset, and
// is disarmed by it, as block-set-write-threshold of QEMU is. It may outlive the
// devices that it is given to. Its methods may be called at any time; nil is one
// that is never armed.
type Threshold struct {
	at      atomic.Int64 // bytes; 0: disarmed
	reached func(at, beyond int64)
}

// NewThreshold is armed at an offset in bytes, or with 0 disarmed. Whenever it
// is reached, reached is called with that offset and by how many bytes the write
// ends beyond it: once for each time that it was armed, before the write is
// answered. It does not wait for anything.
func NewThreshold(at int64, reached func(at, beyond int64)) *Threshold {
	t := &Threshold{reached: reached}
	t.Set(at)
	return t
}

// Set arms it at an offset in bytes, 0 disarms it. What was written before does
// not count.
func (t *Threshold) Set(at int64) { t.at.Store(at) }

// At is where it is armed, 0 if it is not.
func (t *Threshold) At() int64 { return t.at.Load() }

// writes is told of each write with the offset in bytes at which that ends.
func (t *Threshold) writes(end int64) {
	if t == nil || !passes(end, t.at.Load()) {
		return
	}
	t.reach(end)
}

func passes(end, at int64) bool { return at != 0 && end > at }

// reach disarms it, unless another write was first. One that was armed anew
// meanwhile is another.
func (t *Threshold) reach(end int64) {
	for at := t.at.Load(); passes(end, at); at = t.at.Load() {
		if t.at.CompareAndSwap(at, 0) {
			t.reached(at, end-at)
			return
		}
	}
}

// SetThreshold has t told of all that is written from then on, and of zeroes that
// take storage: not of holes that are made. It comes before the first write. What
// a write is to a mapping is known when it is mapped.
func (d *Device) SetThreshold(t *Threshold) { d.threshold = t }

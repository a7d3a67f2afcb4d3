package raw

import (
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// growth asks a file for its size, one question at a time: storage that hangs
// holds one thread, however many want to know.
type growth struct {
	mu     sync.Mutex
	asking *question // guarded by mu; nil if none is under way
}

// question is one look at the size of a file.
type question struct {
	until time.Time     // how long it is waited for
	over  chan struct{} // closed when there is an answer
}

// Info asks the file for its size again: growth is adopted. A file that
// shrank keeps its size here, and reads beyond its end fail. It is waited for
// limits.AskSize at most; what hangs has the size that it had.
func (d *Device) Info() backing.Info {
	for range 2 {
		q, mine := d.ask()
		if !q.wait() || mine {
			break
		}
		// The answer may be older than this call; that of the next one is not.
	}
	return backing.Info{Size: d.size.Load(), MinBlock: 1, Preferred: d.geo.preferred, Sector: d.Sector(), Caps: d.caps}
}

// ask is the question that is under way, or a new one. Who began it waits for it
// no longer than anybody else: what does not answer ends with the process.
func (d *Device) ask() (q *question, mine bool) {
	g := &d.growth
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.asking != nil {
		return g.asking, false
	}
	q = &question{until: time.Now().Add(limits.AskSize), over: make(chan struct{})}
	g.asking = q
	go func() {
		_ = d.adopt() // the size stays as it was
		g.mu.Lock()
		g.asking = nil
		g.mu.Unlock()
		close(q.over)
	}()
	return q, true
}

// wait reports whether the answer came in time.
func (q *question) wait() bool {
	late := time.NewTimer(time.Until(q.until))
	defer late.Stop()
	select {
	case <-q.over:
		return true
	case <-late.C:
		return false
	}
}

// adopt asks the file for its size, however long that takes, and makes growth
// known.
func (d *Device) adopt() error {
	now, err := currentSize(d.file.FD(), d.geo.block)
	if err == nil {
		d.grown(now)
	}
	return err
}

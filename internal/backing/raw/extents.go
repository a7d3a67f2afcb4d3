package raw

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// run is a stretch [lo, hi) of data, or of a hole.
type run struct {
	lo, hi int64
	hole   bool
}

// extents remembers runs that lseek found. A run is used only while nothing
// was written since before it was looked for: every change counts gen up
// before it is answered. Mapped writes may be answered before their lease
// ends, so nothing is used while one is open.
type extents struct {
	mapped atomic.Int64
	gen    atomic.Uint64

	mu   sync.Mutex
	at   uint64                 // guarded by mu; the gen that runs belong to
	runs [limits.ExtentRuns]run // guarded by mu
	next int                    // guarded by mu; the slot to overwrite
}

// changed makes all runs void. It comes after the change and before its reply.
func (x *extents) changed() { x.gen.Add(1) }

// find returns a run that covers off.
func (x *extents) find(off int64) (run, bool) {
	// In this order: the end of a lease counts gen up before mapped down.
	if x.mapped.Load() != 0 {
		return run{}, false
	}
	gen := x.gen.Load()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.at != gen {
		return run{}, false
	}
	for _, r := range x.runs {
		if r.lo <= off && off < r.hi {
			return r, true
		}
	}
	return run{}, false
}

// keep remembers r, which was looked for after gen was read.
func (x *extents) keep(r run, gen uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.gen.Load() != gen {
		return
	}
	if x.at != gen {
		x.at, x.runs, x.next = gen, [limits.ExtentRuns]run{}, 0
	}
	x.runs[x.next] = r
	x.next = (x.next + 1) % len(x.runs)
}

// Extents asks the file system. A block device is all data, as is a file
// system that knows no holes, and what lies beyond the end of a file that
// shrank: who reads that finds out.
func (d *Device) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	if err := d.usable(); err != nil {
		return err
	}
	for end := off + n; off < end; {
		if err := d.mayAsk(ctx); err != nil {
			return err
		}
		r, err := d.runAt(off, end)
		<-d.seeks
		if err != nil {
			return d.failed("extents", off, end-off, err)
		}
		hi := min(r.hi, end)
		if !yield(backing.Extent{Len: hi - off, Hole: r.hole, Zero: r.hole}) || f&backing.ReqOne != 0 {
			return nil
		}
		off = hi
	}
	return nil
}

// mayAsk waits for one of the places in d.seeks, or for the end of ctx: storage
// that hangs holds limits.ExtentSeeks threads, however many ask.
func (d *Device) mayAsk(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case d.seeks <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// runAt finds the run at off. end is where the caller's interest ends.
func (d *Device) runAt(off, end int64) (run, error) {
	if d.geo.block || d.noSeek.Load() {
		return run{off, end, false}, nil
	}
	if d.locked {
		if r, ok := d.seen.find(off); ok && d.stands(r) {
			return r, nil
		}
	}
	gen := d.seen.gen.Load()
	r, err := seekRun(d.file.FD(), off, end)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		d.noSeek.Store(true)
		return run{off, end, false}, nil
	}
	if err == nil && d.locked {
		d.seen.keep(r, gen)
	}
	return r, err
}

// knownHole tells whether somebody asked for the extents of the range, found a
// hole, and nothing has changed since. It does not look itself.
func (d *Device) knownHole(off, n int64) bool {
	if !d.locked {
		return false
	}
	r, ok := d.seen.find(off)
	return ok && r.hole && n <= r.hi-off && d.stands(r)
}

// stands makes sure that the file did not lose the part that was a hole.
func (d *Device) stands(r run) bool {
	if !r.hole {
		return true
	}
	size, err := currentSize(d.file.FD(), false)
	return err == nil && size >= r.hi
}

// seekRun asks the kernel for the run at off.
func seekRun(fd uintptr, off, end int64) (run, error) {
	data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // no data up to the end of the file
		size, err := currentSize(fd, false)
		if err != nil || size <= off {
			return run{off, end, false}, err
		}
		return run{off, size, true}, nil
	}
	if err != nil {
		return run{}, err
	}
	if data > off {
		return run{off, data, true}, nil
	}
	hole, err := unix.Seek(int(fd), off, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) {
		return run{off, end, false}, nil // truncated meanwhile
	}
	if err == nil && hole <= off { // a hole was punched meanwhile
		hole = min(off+fileBlock, end)
	}
	return run{off, hole, false}, err
}

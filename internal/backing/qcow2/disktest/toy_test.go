package disktest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// toy is a disk of sectors that are never written in place: a table in front
// says where each sector lies, and is written between two barriers.
type toy struct {
	backing.Unsupported
	f    Files
	bugs bugs

	mu    sync.Mutex
	table [toySectors]int64 // guarded by mu: offsets of sectors, 0 for zeroes
	dirty map[int]bool      // guarded by mu
	end   int64             // guarded by mu
	free  []int64           // guarded by mu
	late  []int64           // guarded by mu: free after the next flush
}

// bugs are ways to be wrong.
type bugs struct {
	noBarrierA, noBarrierB bool
	reuseAtOnce            bool
	misplaces, trimsEdges  bool
	forgetsAtClose         bool
	saysZero               bool
}

const (
	toySectors = 1024
	toySize    = toySectors * Sector
	toyTable   = toySectors * 8
)

func openToy(b bugs) func(context.Context, Files, bool) (backing.Device, error) {
	return func(ctx context.Context, f Files, _ bool) (backing.Device, error) {
		d := &toy{f: f, bugs: b, dirty: map[int]bool{}, end: toyTable}
		p := make([]byte, toyTable)
		if _, err := f.Image.ReadAt(ctx, p, 0); err != nil {
			return nil, err
		}
		used := map[int64]bool{}
		for i := range d.table {
			d.table[i] = int64(binary.BigEndian.Uint64(p[i*8:]))
			used[d.table[i]] = true
			d.end = max(d.end, d.table[i]+Sector)
		}
		for off := int64(toyTable); off < d.end; off += Sector {
			if !used[off] {
				d.free = append(d.free, off)
			}
		}
		return d, nil
	}
}

// auditToy finds sectors that two entries claim, or that are nowhere.
func auditToy(ctx context.Context, f Files) (int64, error) {
	p := make([]byte, toyTable)
	if _, err := f.Image.ReadAt(ctx, p, 0); err != nil {
		return 0, err
	}
	size, err := f.Image.Size()
	seen := map[uint64]bool{}
	for i := range toySectors {
		at := binary.BigEndian.Uint64(p[i*8:])
		if at != 0 && (seen[at] || at%Sector != 0 || at < toyTable || at >= uint64(size)) {
			return 0, fmt.Errorf("sector %d is at %d of %d", i, at, size)
		}
		seen[at] = true
	}
	return 0, err
}

func (d *toy) Info() backing.Info {
	return backing.Info{Size: toySize, MinBlock: 1, Preferred: 512, Caps: backing.CanWrite | backing.CanFlush |
		backing.CanFUA | backing.CanTrim | backing.CanZero | backing.CanMultiConn | backing.CanExtents}
}

// each calls fn for each sector of a range with where it begins and ends in it.
func each(off, n int64, fn func(i int, lo, hi int64) error) error {
	for end := off + n; off < end; {
		lo, i := off%Sector, off/Sector
		hi := min(Sector, lo+end-off)
		if err := fn(int(i), lo, hi); err != nil {
			return err
		}
		off += hi - lo
	}
	return nil
}

func (d *toy) sectorLocked(ctx context.Context, i int) (p [Sector]byte, err error) {
	if d.table[i] != 0 {
		_, err = d.f.Image.ReadAt(ctx, p[:], d.table[i])
	}
	return p, err
}

func (d *toy) ReadAt(ctx context.Context, p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return each(off, int64(len(p)), func(i int, lo, hi int64) error {
		s, err := d.sectorLocked(ctx, i)
		p = p[copy(p, s[lo:hi]):]
		return err
	})
}

func (d *toy) WriteAt(ctx context.Context, p []byte, off int64, f backing.Flags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bugs.misplaces && off > 0 && len(p) > 2*Sector {
		off--
	}
	err := each(off, int64(len(p)), func(i int, lo, hi int64) error {
		s, err := d.sectorLocked(ctx, i)
		p = p[copy(s[lo:hi], p):]
		at := d.allocateLocked()
		err = errors.Join(err, d.f.Image.WriteAt(ctx, s[:], at, false))
		d.linkLocked(i, at)
		return err
	})
	return d.fuaLocked(ctx, f, err)
}

func (d *toy) allocateLocked() int64 {
	if n := len(d.free); n > 0 {
		at := d.free[n-1]
		d.free = d.free[:n-1]
		return at
	}
	d.end += Sector
	return d.end - Sector
}

func (d *toy) linkLocked(i int, at int64) {
	if old := d.table[i]; old != 0 && d.bugs.reuseAtOnce {
		d.free = append(d.free, old)
	} else if old != 0 {
		d.late = append(d.late, old)
	}
	d.table[i], d.dirty[i] = at, true
}

func (d *toy) fuaLocked(ctx context.Context, f backing.Flags, err error) error {
	if err != nil || f&backing.FUA == 0 {
		return err
	}
	return d.flushLocked(ctx)
}

func (d *toy) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if f&backing.FastZero != 0 {
		return backing.ErrNotSupported
	}
	return d.WriteAt(ctx, make([]byte, n), off, f)
}

func (d *toy) Trim(ctx context.Context, off, n int64, f backing.Flags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := each(off, n, func(i int, lo, hi int64) error {
		if hi-lo == Sector || d.bugs.trimsEdges {
			d.linkLocked(i, 0)
		}
		return nil
	})
	return d.fuaLocked(ctx, f, err)
}

func (d *toy) Flush(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushLocked(ctx)
}

func (d *toy) flushLocked(ctx context.Context) error {
	if !d.bugs.noBarrierA {
		if err := d.f.Image.Sync(ctx); err != nil {
			return err
		}
	}
	for i := range d.dirty {
		p := binary.BigEndian.AppendUint64(nil, uint64(d.table[i]))
		if err := d.f.Image.WriteAt(ctx, p, int64(i)*8, false); err != nil {
			return err
		}
	}
	if !d.bugs.noBarrierB {
		if err := d.f.Image.Sync(ctx); err != nil {
			return err
		}
	}
	clear(d.dirty)
	d.free, d.late = append(d.free, d.late...), nil
	return nil
}

func (d *toy) Extents(_ context.Context, off, n int64, _ backing.Flags, yield func(backing.Extent) bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	stop := errors.New("stop")
	err := each(off, n, func(i int, lo, hi int64) error {
		hole := d.table[i] == 0
		if !yield(backing.Extent{Len: hi - lo, Hole: hole, Zero: hole || d.bugs.saysZero && i == 77}) {
			return stop
		}
		return nil
	})
	if err == stop {
		err = nil
	}
	return err
}

func (d *toy) Close() error {
	if d.bugs.forgetsAtClose {
		return d.f.Image.Close()
	}
	return errors.Join(d.Flush(context.Background()), d.f.Image.Close())
}

package layer

import (
	"cmp"
	"context"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// OverlayOptions say where writes go and how many of them.
type OverlayOptions struct {
	// Quota bounds the bytes that the overlay takes, its tables included.
	// Beyond it writes are ErrNoSpace.
	Quota int64

	// File is empty and has no name, so that nothing of it is left when it is
	// closed; the overlay owns it. nil keeps everything in memory.
	File *os.File

	// Delta, if not nil, is what the overlay goes on with, which was written above
	// a disk of the same contents. It stays the caller's; File is not heeded.
	Delta *Delta
}

// TemporaryFolder is where OpenTemporary makes files that are to be nowhere
// else.
func TemporaryFolder() string { return cmp.Or(os.Getenv("TMPDIR"), "/var/tmp") }

// OpenTemporary makes a file for OverlayOptions in the folder dir, whose file
// system must know O_TMPFILE. "" is $TMPDIR, or else /var/tmp: /tmp is memory on
// many hosts.
func OpenTemporary(dir string) (*os.File, error) {
	if dir == "" {
		dir = TemporaryFolder()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "make temporary file in", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir+"/(overlay)"), nil
}

// Overlay takes all writes for itself and forgets them when it is closed, unless
// somebody else holds its Delta. The disk below is only read.
//
// Writes, zeroing and trims are exclusive for the clusters that they touch.
type Overlay struct {
	backing.Passthrough
	info backing.Info
	*Delta
}

var errQuota = errors.New("the quota of the overlay is used up")

// NewOverlay stands on dev, whose size it keeps. Errors: ErrInvalid for a quota
// that is not positive or beyond limits.OverlayQuota, and for a disk that is
// larger than limits.OverlayDisk, has larger blocks than the overlay or is smaller
// than that of o.Delta. Then o.File stays the caller's.
func NewOverlay(dev backing.Device, o OverlayOptions) (*Overlay, error) {
	i := dev.Info()
	switch {
	case o.Quota <= 0 || o.Quota > limits.OverlayQuota:
		return nil, invalid("make overlay", "quota %d is not between 1 and %d", o.Quota, int64(limits.OverlayQuota))
	case i.Size > limits.OverlayDisk:
		return nil, invalid("make overlay", "the disk is larger than %d bytes", int64(limits.OverlayDisk))
	case i.MinBlock > clusterSize:
		return nil, invalid("make overlay", "the disk has blocks of more than %d bytes", clusterSize)
	case o.Delta != nil && i.Size < o.Delta.size:
		return nil, invalid("make overlay", "the disk has less than the %d bytes of the one that was written to", o.Delta.size)
	}
	l := &Overlay{Passthrough: backing.Passthrough{Next: dev}, info: i}
	if o.Delta != nil {
		l.Delta = o.Delta.Hold()
	} else {
		l.Delta = newDelta(o.File, i.Size)
	}
	l.setQuota(o.Quota)
	l.info.Size = l.size
	l.info.Preferred = max(i.Preferred, clusterSize)
	l.info.Caps = i.Caps&(backing.CanCache|backing.IsRotational) | writing |
		backing.CanFlush | backing.CanExtents | backing.CanMultiConn
	return l, nil
}

// Info has the size that the disk had in the beginning, and the right to write.
func (l *Overlay) Info() backing.Info { return l.info }

// lookup finds the state of the cluster at off, and how many of n bytes from
// there are in that state, in a row.
func (l *Overlay) lookup(off, n int64) (cluster, int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.table.run(off, n)
}

// lock locks the clusters of a range.
func (l *Overlay) lock(ctx context.Context, off, n int64, exclusive bool) (backing.Lease, error) {
	return l.locks.Lock(ctx, off/clusterSize*clusterSize, (off+n+clusterSize-1)/clusterSize*clusterSize, exclusive)
}

func (l *Overlay) ReadAt(ctx context.Context, p []byte, off int64) error {
	held, err := l.lock(ctx, off, int64(len(p)), false)
	if err != nil {
		return err
	}
	defer held.Release()
	for len(p) > 0 {
		c, n := l.lookup(off, int64(len(p)))
		if err := l.readRun(ctx, c, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readRun reads from clusters of one state.
func (l *Overlay) readRun(ctx context.Context, c cluster, p []byte, off int64) error {
	switch c {
	case absent:
		return l.Next.ReadAt(ctx, p, off)
	case zero:
		clear(p)
		return nil
	}
	return backing.Wrap("read overlay", off, int64(len(p)), l.store.read(c, p, off%clusterSize))
}

func (l *Overlay) WriteAt(ctx context.Context, p []byte, off int64, _ backing.Flags) error {
	held, err := l.lock(ctx, off, int64(len(p)), true)
	if err != nil {
		return err
	}
	defer held.Release()
	for len(p) > 0 {
		n := min(int64(len(p)), clusterSize-off%clusterSize)
		if err := l.writeCluster(ctx, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// writeCluster writes within one cluster, which is locked.
func (l *Overlay) writeCluster(ctx context.Context, p []byte, off int64) error {
	old, _ := l.lookup(off, 1)
	if old > absent {
		return backing.Wrap("write overlay", off, int64(len(p)), l.store.write(old, p, off%clusterSize))
	}
	lo := off / clusterSize * clusterSize
	whole := p
	if n := min(clusterSize, l.info.Size-lo); int64(len(p)) < n {
		buf := copies.Get().(*[clusterSize]byte)
		defer copies.Put(buf)
		whole = buf[:n]
		if err := l.readRun(ctx, old, whole, lo); err != nil {
			return err
		}
		copy(whole[off-lo:], p)
	}
	l.mu.Lock()
	c, err := l.table.take(off / clusterSize)
	l.mu.Unlock()
	if err == nil {
		err = l.store.write(c, whole, 0)
		l.mu.Lock()
		if err == nil {
			l.table.set(off/clusterSize, c)
		} else {
			l.table.giveBack(c)
		}
		l.mu.Unlock()
	}
	return backing.Wrap("write overlay", off, int64(len(p)), err)
}

var copies = sync.Pool{New: func() any { return new([clusterSize]byte) }}

// zeroes is what is written to parts of clusters.
var zeroes [clusterSize]byte

// Zero frees whole clusters; parts of them, and with NoHole all, are written.
func (l *Overlay) Zero(ctx context.Context, off, n int64, f backing.Flags) error {
	if f&(backing.NoHole|backing.FastZero) == backing.NoHole|backing.FastZero {
		return backing.ErrNotSupported
	}
	held, err := l.lock(ctx, off, n, true)
	if err != nil {
		return err
	}
	defer held.Release()
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		lo, hi := l.wholeClusters(off, end)
		if off == lo && lo < hi && f&backing.NoHole == 0 {
			if err := l.zeroClusters(lo, hi); err != nil {
				return err
			}
			off = hi
			continue
		}
		step := min(end-off, clusterSize-off%clusterSize)
		if err := l.zeroPart(ctx, off, step, f); err != nil {
			return err
		}
		off += step
	}
	return nil
}

// wholeClusters are those within [off, end); the last one of the disk may be
// shorter than the others.
func (l *Overlay) wholeClusters(off, end int64) (lo, hi int64) {
	lo = (off + clusterSize - 1) / clusterSize * clusterSize
	if hi = end / clusterSize * clusterSize; end == l.info.Size {
		hi = end
	}
	return lo, max(lo, hi)
}

// zeroClusters forgets what is in [lo, hi), which reads as zeroes from then on.
func (l *Overlay) zeroClusters(lo, hi int64) error {
	l.mu.Lock()
	freed, err := l.table.zero(lo/clusterSize, (hi+clusterSize-1)/clusterSize, true)
	l.mu.Unlock()
	l.drop(freed)
	return backing.Wrap("zero overlay", lo, hi-lo, err)
}

// drop lets the storage of clusters go, and then the clusters be taken again.
func (l *Overlay) drop(freed []cluster) {
	for _, c := range freed {
		l.store.forget(c)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range freed {
		l.table.giveBack(c)
	}
}

// zeroPart zeroes within one cluster.
func (l *Overlay) zeroPart(ctx context.Context, off, n int64, f backing.Flags) error {
	if c, _ := l.lookup(off, 1); c == zero && f&backing.NoHole == 0 {
		return nil
	}
	return l.writeCluster(ctx, zeroes[:n], off)
}

// Trim frees the whole clusters in the range that the overlay has. What it
// never had stays as it is below.
func (l *Overlay) Trim(ctx context.Context, off, n int64, _ backing.Flags) error {
	lo, hi := l.wholeClusters(off, off+n)
	if lo == hi {
		return nil
	}
	held, err := l.lock(ctx, lo, hi-lo, true)
	if err != nil {
		return err
	}
	defer held.Release()
	l.mu.Lock()
	freed, err := l.table.zero(lo/clusterSize, (hi+clusterSize-1)/clusterSize, false)
	l.mu.Unlock()
	l.drop(freed)
	return err
}

// Flush has nothing to do: nothing that is written outlives the overlay.
func (l *Overlay) Flush(context.Context) error { return nil }

func (l *Overlay) Extents(ctx context.Context, off, n int64, f backing.Flags, yield func(backing.Extent) bool) error {
	more, end := true, off+n
	emit := func(x backing.Extent) bool {
		off += x.Len
		more = yield(x) && f&backing.ReqOne == 0
		return more
	}
	for off < end && more {
		c, k := l.stateOf(off, end-off)
		switch c {
		case absent:
			to := off + k
			if err := l.Next.Extents(ctx, off, k, f, emit); err != nil || off < to {
				return err // or no more is wanted, or told
			}
		case zero:
			emit(backing.Extent{Len: k, Hole: true, Zero: true})
		default:
			emit(backing.Extent{Len: k})
		}
	}
	return nil
}

// stateOf is lookup in which all that is written in a row is one state.
func (l *Overlay) stateOf(off, n int64) (cluster, int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	c, k := l.table.run(off, n)
	for c > absent && k < n {
		next, more := l.table.run(off+k, n-k)
		if next <= absent {
			break
		}
		k += more
	}
	return c, k
}

// Descriptions are none: those of the disk below are not true any more.
func (l *Overlay) Descriptions() []string { return nil }

// Describe is ErrInvalid for every name.
func (l *Overlay) Describe(context.Context, string, int64, int64, backing.Flags, func(backing.Status) bool) error {
	return backing.ErrInvalid
}

// Resize is ErrNotSupported.
func (l *Overlay) Resize(context.Context, int64) error {
	return &backing.Error{Op: "resize", Off: -1, Kind: backing.ErrNotSupported}
}

// Map names what lies below, where nothing was written, or zeroes.
func (l *Overlay) Map(op engine.Op, off, n int64, m *backing.Mapping) error {
	if op != engine.OpRead {
		return backing.ErrNotMappable
	}
	switch c, k := l.lookup(off, n); {
	case k == n && c == absent:
		return l.Next.Map(op, off, n, m)
	case k == n && c == zero:
		m.Runs[0], m.N, m.Lease = backing.Run{Len: n}, 1, nil
		return nil
	}
	return backing.ErrNotMappable
}

// Close forgets everything that nobody else holds.
func (l *Overlay) Close() error {
	err := l.Delta.Close()
	if e := l.Next.Close(); err == nil {
		err = e
	}
	return err
}

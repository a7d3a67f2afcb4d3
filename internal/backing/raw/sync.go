package raw

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/engine"
)

// syncer joins flushes: one fdatasync runs at a time, and serves every flush
// that had arrived when it was submitted.
type syncer struct {
	mu      sync.Mutex
	started uint64        // guarded by mu; number of the last round begun
	done    uint64        // guarded by mu; number of the last round that succeeded
	running bool          // guarded by mu
	changed chan struct{} // guarded by mu; closed when the round ends, nil if nobody waits
}

// Flush makes all writes durable that were answered before it. After a
// failure, it fails for ever.
func (d *Device) Flush(ctx context.Context) error {
	if err := d.usable(); err != nil || d.opt.ReadOnly {
		return err
	}
	s := &d.sync
	s.mu.Lock()
	defer s.mu.Unlock()
	for want := s.started + 1; ; {
		if err := d.poisoned(); err != nil {
			return err
		}
		if s.done >= want {
			return nil
		}
		if !s.running {
			return d.roundLocked(ctx)
		}
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		ch := s.changed
		s.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// roundLocked runs one fdatasync, without the lock, and wakes those who wait
// for it or for their turn.
func (d *Device) roundLocked(ctx context.Context) error {
	s := &d.sync
	if err := ctx.Err(); err != nil {
		return err
	}
	s.running = true
	s.started++
	s.mu.Unlock()
	err := d.fdatasync(context.WithoutCancel(ctx), "flush", 0, 0)
	s.mu.Lock()
	s.running = false
	if err == nil {
		s.done = s.started
	}
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
	return d.wrap("flush", -1, 0, err)
}

// fdatasync makes the range durable, all of the file where n is 0. It is given
// a context that does not end: others may wait for its result, and what failed
// is told once.
func (d *Device) fdatasync(ctx context.Context, op string, off, n int64) error {
	id := d.durables.begin()
	err := d.al.Do(ctx, engine.OpSync, off, n)
	if err == nil {
		err = d.whole()
	}
	if errors.Is(err, unix.EROFS) {
		err = errDropped
	}
	if err != nil {
		d.lost(op, err)
	}
	d.durables.settle(id)
	if err != nil {
		return err
	}
	return d.poisoned()
}

// errDropped stands for EROFS, which would tell a guest that it may not write.
var errDropped = errors.New("its file system has become read-only, and drops what was written")

// whole tells of storage that has dropped what was written, of which a sync says
// nothing: a block device that shrank, where the kernel drops what was beyond the new
// end and not written back, and a file system of muteReadOnly that became read-only.
func (d *Device) whole() error {
	if d.geo.block {
		if end, size, shrank := d.shrank(); shrank {
			return d.shorter(end, size)
		}
	}
	if d.geo.mute {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(d.file.FD()), &st); err != nil {
			return os.NewSyscallError("statfs", err)
		}
		if st.Flags&unix.ST_RDONLY != 0 {
			return unix.EROFS
		}
	}
	return nil
}

// shrank tells whether a block device ends before its size.
func (d *Device) shrank() (end, size int64, is bool) {
	size = d.size.Load() // before the question: it may grow
	end, err := currentSize(d.file.FD(), true)
	return end, size, err == nil && end < size
}

// writeDurably returns when p is on stable storage. That is a write and a sync, not
// one of both (RWF_DSYNC), whose error would not say which of them failed: a write
// that finds no room loses nothing, and a sync that fails tells of lost pages,
// which may be those of others. A direct file has some too: the file system may
// leave parts of its blocks in the page cache, where they are zeroed (ext4) or
// shared with another file (XFS).
func (d *Device) writeDurably(ctx context.Context, p []byte, off int64) error {
	if err := d.al.WriteAt(ctx, p, off); err != nil {
		return err
	}
	return d.fdatasync(context.WithoutCancel(ctx), "write", off, int64(len(p)))
}

// cached reports whether a write may go through the page cache: one to the tail
// of a direct file that is not, or was not, a whole number of blocks does.
func (d *Device) cached() bool {
	return !d.geo.direct || d.tail.Load() || d.size.Load()&(d.geo.align-1) != 0
}

// durables orders the verdicts of operations that ask for durability. The
// kernel tells only one of them of lost pages. So one that succeeded waits for
// all that are in flight at that moment, and then looks whether one of them
// was told.
type durables struct {
	mu     sync.Mutex
	cond   sync.Cond
	last   uint64   // guarded by mu; the newest number given
	active []uint64 // guarded by mu; ascending
}

// begin announces an operation.
func (d *durables) begin() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last++
	d.active = append(d.active, d.last)
	return d.last
}

// settle ends the operation, whose failure has poisoned the device by now,
// and waits for those that began before this moment.
func (d *durables) settle(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := 0
	for d.active[at] != id {
		at++
	}
	d.active = append(d.active[:at], d.active[at+1:]...)
	if d.cond.L == nil {
		d.cond.L = &d.mu
	}
	d.cond.Broadcast()
	for mark := d.last; len(d.active) > 0 && d.active[0] <= mark; {
		d.cond.Wait()
	}
}

// SyncName makes the name by which f was opened durable, as far as the file system
// can. A folder that may be written to need not be one that may be read, as fsync(2)
// wants; then all of the file system is synced.
func SyncName(f *os.File) error {
	folder, err := os.Open(folderOf(f.Name()))
	if errors.Is(err, fs.ErrPermission) {
		return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
	}
	if err != nil {
		return err
	}
	err = folder.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) { // fsync(2): of a file that cannot be synced
		err = nil
	}
	return errors.Join(err, folder.Close())
}

// folderOf is where the kernel looks for a name. It is not cleaned: ".." behind a
// symbolic link leads out of another folder.
func folderOf(path string) string {
	dir, _ := filepath.Split(path)
	return cmp.Or(dir, ".")
}

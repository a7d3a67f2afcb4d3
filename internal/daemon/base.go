package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
)

// base are the files that a held overlay stands on. While its export has failed they are
// locked as by one who reads them: whoever writes to them makes another disk of them, of
// which the overlay is none. Where the export locks nothing, or the file system knows no
// locks, nobody is kept out, as while it is open.
type base struct {
	opts  raw.Options // but Path
	files []*os.File  // those of held.files, which closes them

	mu     sync.Mutex
	unlock []func() // guarded by mu; none while they are not locked
	lost   error    // guarded by mu; why they could not be locked: somebody else has written to them, or may have
	closed bool     // guarded by mu; the files are
}

// newBase is that of k, with these files, which are not locked.
func newBase(k *disk, files []*os.File, log *slog.Logger) *base {
	return &base{files: files, opts: raw.Options{
		ReadOnly: true, Container: true, // nobody changes the size either
		Lock: raw.LockMode(k.cfg.Lock), For: fmt.Sprintf("failed export %q", k.cfg.Name), Log: log,
	}}
}

// lock locks the files, if they are not. If it cannot, they are lost for good.
func (b *base) lock() error {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(b.unlock) > 0 || b.lost != nil {
		return nil
	}
	for _, f := range b.files {
		o := b.opts
		o.Path = f.Name()
		unlock, err := raw.Lock(f, o)
		if err != nil {
			b.lost = err
			b.releaseLocked()
			return err
		}
		b.unlock = append(b.unlock, unlock)
	}
	return nil
}

// release unlocks the files for who opens them by the same name. Error: they were not
// kept from others all the time.
func (b *base) release() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.releaseLocked()
	return b.lost
}

func (b *base) releaseLocked() {
	for _, unlock := range b.unlock {
		unlock()
	}
	b.unlock = nil
}

// close comes before the files are closed.
func (b *base) close() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.releaseLocked()
	b.closed = true
}

// guard keeps others from what the export of that name holds an overlay above, if it
// has failed.
func (d *daemon) guard(name string) {
	d.disks.mu.Lock()
	var b *base
	if k := d.disks.byName[name]; k != nil && k.failed != nil && k.stack == nil {
		b = k.held.base
	}
	d.disks.mu.Unlock()
	if err := b.lock(); err != nil {
		d.log.Warn("image of an export that has failed cannot be kept from others", "export", name, "error", err)
	}
}

// unguard lets k, which is about to be opened, have the files that the one which failed
// is kept for, if it opens any of them. It is refused what was written above them if
// others may have written to them.
func (d *daemon) unguard(k *disk) error {
	d.disks.mu.Lock()
	var b *base
	if k.again != nil {
		b = k.again.held.base
	}
	d.disks.mu.Unlock()
	if files, _ := k.files.Contents(); b == nil || len(files) > 0 && len(k.files.Others(b.files)) == len(files) {
		return nil
	}
	if err := b.release(); err != nil && k.delta != nil {
		return fmt.Errorf("%w: %w", errBaseLost, err)
	}
	return nil
}

// errBaseLost is for an export that has failed whose overlay would show a broken disk.
var errBaseLost = errors.New("what was written to its overlay does not go with an image that others may have written to since: remove the export to forget it")

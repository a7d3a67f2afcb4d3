package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// stillClosing is what an export is that is late.
const stillClosing = "it is still being closed, as its storage does not answer"

// errLate is for an export that is late: it keeps its image, with what is not flushed,
// and is not opened anew before it is closed.
var errLate = fmt.Errorf("%w: %s", export.ErrInUse, stillClosing)

// closeInTime has shut close k, which has that name. shut waits for nothing but storage
// once ctx has ended and clients were cut off: if that does not answer by then, k is
// late. errLate is returned, the addresses of k are free, and shut goes on. after is
// called with its error; until that returns, a reload leaves the name alone.
func (d *daemon) closeInTime(ctx context.Context, k *disk, name string, shut func() error, after func(error)) error {
	done, late, over := make(chan error), make(chan struct{}), make(chan struct{})
	d.closing.Go(func() {
		err := shut()
		select {
		case done <- err:
		case <-late:
			after(err)
			d.disks.setLate(name, false)
		}
	})
	defer context.AfterFunc(ctx, func() { time.AfterFunc(limits.Sever+limits.LastClose, func() { close(over) }) })()
	select {
	case err := <-done:
		return err
	case <-over:
	}
	d.disks.setLate(name, true)
	d.closeDoors(d.disks.takeDoors(k))
	close(late)
	return errLate
}

// mayFollow refuses a change of an export that is late: it comes back as it was before
// another reload, or goes.
func (d *daemon) mayFollow(change *config.Change) error {
	names := reopened(change)
	for _, x := range change.Exports {
		names = append(names, x.Name)
	}
	for _, name := range names {
		if d.disks.isLate(name) {
			return fmt.Errorf("export %q: %w", name, errLate)
		}
	}
	return nil
}

// setLate says whether the export of that name is late: only a reload makes it so.
func (s *disks) setLate(name string, late bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !late:
		delete(s.late, name)
	case s.late == nil:
		s.late = map[string]bool{name: true}
	default:
		s.late[name] = true
	}
}

// isLate tells whether the export of that name is late.
func (s *disks) isLate(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.late[name]
}

// takeDoors takes the listeners of k alone, for who closes them.
func (s *disks) takeDoors(k *disk) (list []*door) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list, k.doors = k.doors, nil
	return list
}

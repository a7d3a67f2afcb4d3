package daemon

import (
	"os"

	"github.com/vmdiskd/vmdiskd/internal/backing/layer"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
)

// held is what guests have written to that is in no file of an image: memory, and an
// overlay with the files of the image below it. It is lost when it is closed.
type held struct {
	of    *config.Export // as it was when they wrote; nil: nothing is held
	files *open.Table
	delta *layer.Delta
	base  *base // of delta; nil: it stands on no files
}

// hold has closed, if it still has its name, hold what again is to go on with, until
// that is open or another attempt is: closed stands for what both were.
func (d *daemon) hold(closed, again *disk) {
	h, err := again.volatile()
	if err != nil {
		d.log.Warn("what is in no file is forgotten if the export cannot be opened", "export", again.cfg.Name, "error", err)
	}
	if h.delta != nil && len(h.files.Files()) > 0 {
		h.base = newBase(again, h.files.Files(), d.logs.For("backing"))
	}
	d.disks.mu.Lock()
	if closed.held.of == nil && d.disks.byName[closed.cfg.Name] == closed {
		h, closed.held = closed.held, h
	}
	h.close()
	d.disks.mu.Unlock()
	d.guard(closed.cfg.Name)
}

// volatile is what k, which is not open, is to go on with.
func (k *disk) volatile() (h held, err error) {
	if k.delta == nil && !k.files.InMemory() {
		return h, nil
	}
	if h.files, err = k.files.Again(); err != nil {
		return h, err
	}
	if k.delta != nil {
		h.delta = k.delta.Hold()
	}
	x := k.cfg
	h.of = &x
	return h, nil
}

// heldFor are the files of the image below what k goes on with.
func (s *disks) heldFor(k *disk) []*os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.again == nil {
		return nil
	}
	return k.again.held.files.Files()
}

// takeOver gives k, if it is another attempt at one that failed and is to be opened as
// x says, with the files of g, what that one holds: as with handOver, a disk of other
// bytes has no use for it, and one that a reload opens with another store is hidden. g is
// closed by who has it.
func (s *disks) takeOver(k *disk, x *sought, g *gathered) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.again == nil || g.err != nil || k.again.held.of == nil {
		return
	}
	h := &k.again.held
	if !hasFiles(&x.Export) {
		g.table, g.err = h.files.Again()
	}
	same := sameBelow(h.of, x, g.table)
	if h.delta != nil && same {
		g.delta = h.delta.Hold()
	}
	k.hidden = k.trial && (!same || (h.delta == nil) != (x.Overlay == nil))
}

// close leaves h empty.
func (h *held) close() {
	h.base.close()
	h.files.Close()
	if h.delta != nil {
		_ = h.delta.Close() // it is to be forgotten
	}
	*h = held{}
}

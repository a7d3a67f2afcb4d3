package daemon

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/export"
	"github.com/vmdiskd/vmdiskd/internal/obs"
)

// findSupervisor looks for the service manager.
func (d *daemon) findSupervisor() (err error) {
	d.boss, err = obs.NewSupervisor()
	return err
}

// ready tells the service manager that clients can come, and from then on that
// the engine works, as often as it wants to hear.
func (d *daemon) ready() error {
	if err := d.boss.Ready(d.summary()); err != nil {
		return err
	}
	every := d.boss.Interval()
	if every == 0 {
		return nil
	}
	p, err := newPulse(d.engine)
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	d.accepted.Add(1)
	go func() {
		defer d.accepted.Done()
		d.pulse(p, every)
	}()
	return nil
}

func (d *daemon) summary() string {
	s := fmt.Sprintf("serving %d exports", d.exports.Len())
	if d.staleConf.Load() {
		s += "; the last reload was not done, the log says why"
	}
	return s
}

// pulse tells the service manager that the daemon is alive after each round
// trip through the engine, until serving ends.
func (d *daemon) pulse(p *pulse, every time.Duration) {
	defer p.file.Close()
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-t.C:
		}
		if err := p.beat(every); err != nil {
			d.log.Error("the engine does not answer, the watchdog is not told", "error", err)
			continue
		}
		if err := d.boss.Alive(); err != nil {
			d.log.Warn("the watchdog cannot be told", "error", err)
		}
	}
}

// pulse reads a byte of a file in memory by the engine.
type pulse struct {
	engine engine.Engine
	f      *os.File
	file   *engine.File
	done   chan error // of one beat; has room for one
	flying bool
	io     engine.IO
	buf    []byte
}

func newPulse(e engine.Engine) (*pulse, error) {
	fd, err := unix.MemfdCreate("pulse", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	p := &pulse{engine: e, f: os.NewFile(uintptr(fd), "pulse"), done: make(chan error, 1), buf: make([]byte, 1)}
	if _, err := p.f.Write([]byte{1}); err != nil {
		return nil, errors.Join(err, p.f.Close())
	}
	if p.file, err = e.Open(p.f); err != nil {
		return nil, errors.Join(err, p.f.Close())
	}
	return p, nil
}

var errNoAnswer = errors.New("no answer in time")

// beat is one round trip. One that is late is waited for by the next.
func (p *pulse) beat(limit time.Duration) error {
	if !p.flying {
		p.flying = true
		p.io = engine.IO{Op: engine.OpRead, Owner: engine.Pulse, File: p.file, Buf: p.buf, Done: func(x *engine.IO) { p.done <- x.Err }}
		p.engine.Submit([]*engine.IO{&p.io})
	}
	select {
	case err := <-p.done:
		p.flying = false
		return err
	case <-time.After(limit):
		return errNoAnswer
	}
}

// toldStates are those of exports as the last event of each tells them.
type toldStates struct {
	mu   sync.Mutex        // before disks.mu and the lock of the registry
	last map[string]string // guarded by mu; of exports that are not closed
}

// tellStates makes changes of the states of exports events.
func (d *daemon) tellStates() {
	d.exports.Changed = func(name string, _ export.State) { d.tellState(name) }
}

// tellState makes the state that an export has now an event, unless the last one
// was of that. It is called after each change, so that the last event tells what
// the list of exports does.
func (d *daemon) tellState(name string) {
	d.told.mu.Lock()
	defer d.told.mu.Unlock()
	s, known := d.stateOf(name)
	last, told := d.told.last[name]
	switch {
	case !known || s == last || s == string(export.Closed) && !told:
		return
	case s == string(export.Closed):
		delete(d.told.last, name)
	case d.told.last == nil:
		d.told.last = map[string]string{name: s}
	default:
		d.told.last[name] = s
	}
	d.bus.Publish(obs.Event{Kind: obs.ExportState, Export: name, Reason: s})
}

// stateOf is the state of an export as the list shows it. It is not known while
// somebody makes one of that name, or takes it away.
func (d *daemon) stateOf(name string) (s string, known bool) {
	k := d.disks.get(name)
	if s, there := d.exports.StateOf(name); there {
		return d.shown(k, s), true
	}
	if k == nil {
		return string(export.Closed), true
	}
	_, now, failed := d.disks.look(k)
	return string(export.Failed), failed != nil && now == nil
}

// shown is the state of k, which may be nil, as the API has it, with s that of the
// registry: what is ready there may be hidden, paused, or take no more writes.
func (d *daemon) shown(k *disk, s export.State) string {
	if k == nil || s != export.Ready {
		return string(s)
	}
	_, now, _ := d.disks.look(k)
	switch {
	case d.disks.hides(k):
		return string(export.Opening)
	case now != nil && now.pause != nil && now.pause.Paused():
		return api.StatePaused
	case d.disks.healthOf(k).poisoned != nil:
		return api.StatePoisoned
	}
	return string(s)
}

// release frees the name of k, or gives it to instead, as disks.forget does.
func (d *daemon) release(k *disk, name string, instead *disk) {
	d.disks.forget(k, instead)
	d.guard(name)
	d.tellState(name)
}

// watch is what is to be told when the image that the export of that name opens takes
// no more writes; p is the record of the image.
func (d *daemon) watch(name string, p *poison) func(why error) {
	return func(why error) {
		if p.why.CompareAndSwap(nil, &why) {
			d.log.Error("export takes no more writes until its image is opened anew: check the image, and remove the export and add it again, or restart",
				"export", name, "error", why)
		}
		d.tellPoisoned(name, why)
	}
}

// tellPoisoned makes a lost write of an image an event.
func (d *daemon) tellPoisoned(name string, err error) {
	d.bus.Publish(obs.Event{Kind: obs.ExportPoisoned, Export: name, Reason: err.Error()})
}

package daemon

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

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
	return fmt.Sprintf("serving %d exports", d.exports.Len())
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
		p.io = engine.IO{Op: engine.OpRead, File: p.file, Buf: p.buf, Done: func(x *engine.IO) { p.done <- x.Err }}
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

// tellStates makes changes of the states of exports events.
func (d *daemon) tellStates() {
	d.exports.Changed = func(name string, s export.State) {
		d.bus.Publish(obs.Event{Kind: obs.ExportState, Export: name, Reason: string(s)})
	}
}

// tellPoisoned makes a lost write of an image an event.
func (d *daemon) tellPoisoned(name string, err error) {
	d.bus.Publish(obs.Event{Kind: obs.ExportPoisoned, Export: name, Reason: err.Error()})
}

package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Handed is what the worker got from stage 0. Its methods give each thing once,
// and nothing for a nil Handed.
type Handed struct {
	in       handover
	mode     confine.Mode
	controls []confine.Control
}

// TakeOver reads what stage 0 hands over; nil for nil.
func TakeOver(h *confine.Handover) (*Handed, error) {
	if h == nil {
		return nil, nil
	}
	t := &Handed{mode: h.Mode, controls: h.Controls}
	if err := h.Take(&t.in); err != nil {
		return nil, fmt.Errorf("what stage 0 hands over: %w", err)
	}
	return t, nil
}

// ConfigText is the text of the configuration file as stage 0 has read it.
func (t *Handed) ConfigText() []byte { return t.in.Config }

// file takes up a descriptor, which the next program must not have.
func file(fd int, name string) (*os.File, error) {
	if fd < 3 {
		return nil, fmt.Errorf("%s: descriptor %d is none that is handed over", name, fd)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("%s: descriptor %d: %w", name, fd, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// closed are the listeners that stage 0 has closed.
func (t *Handed) closed() []closedListener {
	if t == nil {
		return nil
	}
	return t.in.Closed
}

func (t *Handed) logFile() *os.File {
	if t == nil || t.in.Log == 0 {
		return nil
	}
	f, _ := file(t.in.Log, "log") // without it the path is tried
	return f
}

func (t *Handed) pidFile() (*os.File, error) {
	if t == nil {
		return nil, nil
	}
	return file(t.in.PIDFile, "PID file")
}

// noSecrets is why stage 0 has neither certificates nor keys, if it wanted some.
func (t *Handed) noSecrets() error {
	if t == nil || t.in.NoSecrets == "" {
		return nil
	}
	return errors.New(t.in.NoSecrets)
}

func (t *Handed) certificates() (map[string]*os.File, error) {
	if t == nil || t.in.TLS == nil {
		return nil, nil
	}
	all := map[string]*os.File{}
	for name, fd := range t.in.TLS {
		f, err := file(fd, name)
		if err != nil {
			return nil, err
		}
		all[name] = f
	}
	return all, nil
}

// listeners are those of a key; nil if stage 0 has not opened them.
func (t *Handed) listeners(key string) ([]transport.Listener, error) {
	if t == nil {
		return nil, nil
	}
	var ls []transport.Listener
	for _, h := range t.in.Listeners[key] {
		l, err := transport.Adopt(h)
		if err != nil {
			return nil, err
		}
		ls = append(ls, l)
	}
	delete(t.in.Listeners, key)
	return ls, nil
}

// explainSocket says so where a Unix socket was refused because the configuration
// had none in that folder at the start. path is "" for what is no Unix socket.
func (t *Handed) explainSocket(path string, err error) error {
	if t == nil || !t.in.Caged || path == "" || !errors.Is(err, fs.ErrPermission) || !isConfined(t.controls, confine.ControlLandlock) {
		return err
	}
	if slices.ContainsFunc(t.in.Sockets, func(dir string) bool { return open.Within(dir, path) }) {
		return err
	}
	return fmt.Errorf("%w: a confined daemon makes sockets only in folders where its configuration had one at the start: add a [[listener]] in %q and start it again",
		err, filepath.Dir(path))
}

func (t *Handed) control() (net.Listener, error) {
	if t == nil || t.in.Control == nil {
		return nil, nil
	}
	h := *t.in.Control
	t.in.Control = nil
	return transport.AdoptUnix(h)
}

func (t *Handed) metrics() (net.Listener, error) {
	if t == nil || t.in.Metrics == 0 {
		return nil, nil
	}
	f, err := file(t.in.Metrics, "metrics")
	if err != nil {
		return nil, err
	}
	defer f.Close() // FileListener has its own
	return net.FileListener(f)
}

// images gives s the files of the image of an export, for the first time that it
// is opened. The caller closes them. Stage 0 opens no overlay that the worker
// remembers: it trusts the configuration only. Above an image of that the files
// are known to be a part of it.
func (t *Handed) images(x *config.Export, s *open.Spec) error {
	if t == nil {
		return nil
	}
	h, ok := t.in.Images[x.Name]
	if !ok {
		return nil
	}
	delete(t.in.Images, x.Name)
	files, err := h.open()
	if err != nil {
		closeFiles(slices.Collect(maps.Values(files)))
		return err
	}
	if h.Image != x.Image {
		s.Known = slices.Collect(maps.Values(files))
		return nil
	}
	s.Table = open.NewTable(files, h.Dirs)
	return nil
}

// open takes up the files, each once: who asks again gets the same ones.
func (h *handedImage) open() (files map[open.Request]*os.File, err error) {
	files = map[open.Request]*os.File{}
	for i := range h.Files {
		x := &h.Files[i]
		if x.file == nil {
			f, bad := file(x.FD, x.Path)
			if bad != nil {
				err = errors.Join(err, bad)
				continue
			}
			x.file = f
		}
		files[open.Request{Path: x.Path, ReadOnly: x.ReadOnly, Direct: x.Direct}] = x.file
	}
	return files, err
}

// closeRest closes listeners and images that nobody has asked for: those of an
// export that could not be opened, or whose image is another by now, and all that
// were to come when the start failed.
func (t *Handed) closeRest() {
	if t == nil {
		return
	}
	if l, _ := t.control(); l != nil {
		_ = l.Close() // as below
	}
	for key, list := range t.in.Listeners {
		for _, h := range list {
			if l, err := transport.Adopt(h); err == nil {
				_ = l.Close() // it removes the socket's file
			}
		}
		delete(t.in.Listeners, key)
	}
	for name, h := range t.in.Images {
		files, _ := h.open()
		closeFiles(slices.Collect(maps.Values(files)))
		delete(t.in.Images, name)
	}
}

// releaseCommand lets the command of --run go on, and waits for it.
func (d *daemon) releaseCommand() error {
	gate, err := file(d.cfg.Handed.in.Gate, "gate")
	if err != nil {
		return err
	}
	p, err := os.FindProcess(d.cfg.Handed.in.Command)
	if err != nil {
		return errors.Join(err, gate.Close())
	}
	if _, err := gate.WriteString("go\n"); err != nil {
		return errors.Join(err, gate.Close())
	}
	go d.awaitCommand(p)
	return gate.Close()
}

// confine closes the cage: from here on the process can do what serving needs,
// and nothing else.
func (d *daemon) confine() error {
	defer func() { d.cage = append(d.cage, d.selinuxControl()) }()
	t := d.cfg.Handed
	if t == nil {
		d.cage = append(d.swapCage, confine.Control{Name: confine.ControlStages, State: confine.Off, Reason: d.unstaged})
		if d.unstaged != byOption {
			d.log.Warn("not confined", "reason", d.unstaged)
		}
		return nil
	}
	t.closeRest()
	d.cage = append(t.controls, d.swapCage...)
	ring := confine.Control{Name: confine.ControlRing, State: confine.Enforced}
	if d.engine.Name() != "uring" {
		ring.Reason = "no ring is in use"
	}
	c := confine.Control{Name: confine.ControlSeccomp, State: confine.Enforced}
	f := confine.Filter{Service: d.served(), Command: t.in.Command != 0}
	if f.Service {
		var err error
		if d.probe, err = transport.NewProbe(); err != nil {
			return err
		}
		f.Probe = d.probe.FD()
	}
	if err := f.Load(); err != nil {
		c.State, c.Reason = confine.Off, err.Error()
	}
	d.cage = append(d.cage, ring, c)
	for _, c := range d.cage {
		if c.State == confine.Enforced {
			continue
		}
		if t.mode == confine.Strict {
			return fmt.Errorf("confine: %s is %s: %s; --confine=strict refuses that", c.Name, c.State, c.Reason)
		}
		d.log.Warn("not confined as it could be", "control", c.Name, "state", c.State, "reason", c.Reason)
	}
	if d.confined(confine.ControlLandlock) {
		d.watchRoots()
	}
	if c.State != confine.Enforced {
		return nil
	}
	var forbidden []string
	if d.confined(confine.ControlLandlock) {
		forbidden = t.in.Forbidden
	}
	return confine.SelfTest(forbidden)
}

// byOption is why there is no worker if nobody wants one.
const byOption = "--confine=off"

// confined tells whether a control is in force.
func (d *daemon) confined(name string) bool { return isConfined(d.cage, name) }

func isConfined(by []confine.Control, name string) bool {
	return slices.ContainsFunc(by, func(c confine.Control) bool { return c.Name == name && c.State != confine.Off })
}

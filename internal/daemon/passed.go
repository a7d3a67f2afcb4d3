package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// takePassed takes the sockets that the service manager hands over: those that
// it opened, and those that it kept for us.
func (d *daemon) takePassed() (err error) {
	closed := d.cfg.Handed.closed()
	if d.cfg.Handed == nil {
		if closed, err = d.makeWay(); err != nil {
			return err
		}
	}
	for _, l := range closed {
		d.tellClosed(l)
	}
	d.passed, err = transport.TakePassed()
	d.kept.Store(int64(d.passed.Count(config.KeptPrefix)))
	return err
}

// closedListener is one that waited and is not of the configuration.
type closedListener struct {
	Address string
	Error   string
}

func (d *daemon) tellClosed(l closedListener) {
	d.log.Info("closed a listener that the configuration has no more", "listener", l.Address, "error", l.Error)
}

// makeWay closes the listeners that wait where another is to be opened: one whose
// mode has changed, say, has the address of its successor.
func (d *daemon) makeWay() (closed []closedListener, err error) {
	wanted := d.keptNames()
	files, err := transport.Withdraw(func(f *os.File) bool {
		listener, _, _ := splitKept(f.Name())
		if _, taken := wanted[listener]; taken || !strings.HasPrefix(f.Name(), config.KeptPrefix) {
			return false
		}
		for _, e := range wanted {
			if transport.ListensAt(f, e) {
				return true
			}
		}
		return false
	})
	for _, f := range files {
		closed = append(closed, d.endKept(f.Name(), f))
	}
	return closed, err
}

// keptNames are the names of the listeners of the configuration, and of kept
// exports that can be read, with their endpoints.
func (d *daemon) keptNames() map[string]transport.Endpoint {
	exports, _ := d.allExports() // addKept complains
	list := slices.Clone(d.conf.Load().Listeners)
	for _, x := range exports {
		list = append(list, x.Listeners...)
	}
	names := map[string]transport.Endpoint{}
	for _, l := range list {
		if e, err := endpointOf(l); err == nil && !strings.HasPrefix(l.URI, config.SystemdScheme) {
			names[keptName(l, e)] = e
		}
	}
	return names
}

// endKept ends a socket that waited under name, with its path, and closes f.
func (d *daemon) endKept(name string, f *os.File) closedListener {
	_, file, _ := splitKept(name)
	addr, err := transport.Abolish(f, file)
	l := closedListener{Address: addr}
	if err = errors.Join(err, f.Close(), d.boss.Forget(name)); err != nil {
		l.Error = err.Error()
	}
	return l
}

// keptName begins the name of the sockets of a listener while they wait: who
// changes the listener gets another. A port that the kernel chooses has no name, and ""
// means that it does not wait.
func keptName(l config.Listener, e transport.Endpoint) string {
	if e.Kind != transport.Unix && e.Port == 0 {
		return ""
	}
	l.Exports, l.TLS, l.InsecurePlaintext = nil, "", false
	b, err := json.Marshal(l)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(b)
	return config.KeptPrefix + hex.EncodeToString(sum[:16])
}

// wholeKept is the name of the sockets of a listener while they wait: what keptName
// says of it, transport.FileID, and how many they are.
func wholeKept(listener, file string, n int) string {
	return fmt.Sprintf("%s.%s.%d", listener, file, n)
}

// splitKept takes wholeKept apart. n is 0 for a name without a number, which version
// 0.1 gave, and -1 if the number makes no sense.
func splitKept(name string) (listener, file string, n int) {
	listener, rest, _ := strings.Cut(name, ".")
	file, number, counted := strings.Cut(rest, ".")
	if !counted {
		return listener, file, 0
	}
	n, err := strconv.Atoi(number)
	if err != nil || n <= 0 {
		n = -1
	}
	return listener, file, n
}

// bind opens the sockets of a listener, or takes up those that are there. kept
// is the name under which they wait for the next start, or "".
func (d *daemon) bind(ctx context.Context, l config.Listener) (ls []transport.Listener, kept string, err error) {
	if name, ok := strings.CutPrefix(l.URI, config.SystemdScheme); ok {
		ls, err := d.passed.Listen(name, transport.Endpoint{Name: l.URI})
		return ls, "", err
	}
	e, err := endpointOf(l)
	if err != nil {
		return nil, "", err
	}
	name := keptName(l, e)
	if ls, kept := d.resume(name, e); len(ls) > 0 {
		return ls, kept, nil
	}
	ls, err = d.listenForgotten(ctx, listenerKey(l), e)
	if err != nil || name == "" || !d.reserve(len(ls)) {
		return ls, "", err
	}
	if kept, err = d.keep(name, ls); err != nil {
		d.log.Warn("the service manager does not keep the listener: clients are refused while the daemon starts again", "listener", l.URI, "error", err)
		return ls, "", nil
	}
	return ls, kept, nil
}

// forgetPoll is the pause between two attempts to have an address that the
// service manager is to give up.
const forgetPoll = 20 * time.Millisecond

// listenForgotten is listenAt where a service manager that keeps sockets may not
// have closed the one before it yet: of a vsock, which nothing but the last close
// ends, the address is in use until then.
func (d *daemon) listenForgotten(ctx context.Context, key string, e transport.Endpoint) ([]transport.Listener, error) {
	ls, err := d.listenAt(ctx, key, e)
	if e.Kind != transport.VSock || d.boss.Room() == 0 {
		return ls, err
	}
	ctx, cancel := context.WithTimeout(ctx, limits.Forgets)
	defer cancel()
	for errors.Is(err, unix.EADDRINUSE) {
		select {
		case <-time.After(forgetPoll):
			ls, err = d.listenAt(ctx, key, e)
		case <-ctx.Done():
			return nil, err
		}
	}
	return ls, err
}

// resume takes up the sockets of a listener that waited, which keptName says
// listener of. kept is their whole name.
func (d *daemon) resume(listener string, e transport.Endpoint) (ls []transport.Listener, kept string) {
	if listener == "" {
		return nil, ""
	}
	for _, name := range d.passed.Names() {
		if of, file, n := splitKept(name); of == listener {
			if ls := d.resumeAs(name, file, n, e); len(ls) > 0 {
				return ls, name
			}
		}
	}
	return nil, ""
}

// resumeAs takes up the sockets that waited under name. If one of them is not
// what it was, or they are not n, none is.
func (d *daemon) resumeAs(name, file string, n int, e transport.Endpoint) (ls []transport.Listener) {
	files, err := d.passed.Files(name)
	defer closeFiles(files)
	if n != 0 && n != len(files) {
		err = errors.Join(err, fmt.Errorf("the service manager has kept %d of its sockets, not all", len(files)))
	}
	for _, f := range files {
		l, bad := transport.Resume(e, f, file)
		if bad != nil {
			err = errors.Join(err, bad)
			continue
		}
		ls = append(ls, l)
	}
	d.passed.Drop(name)
	if err == nil {
		return ls
	}
	d.kept.Add(-int64(len(files)))
	for _, l := range ls {
		_ = l.Close() // another is opened in its place
	}
	for _, f := range files {
		_, _ = transport.Abolish(f, file) // what is no listener has no address either
	}
	err = errors.Join(err, d.boss.Forget(name))
	d.log.Warn("a listener that was kept cannot be taken up", "listener", e.Name, "error", err)
	return nil
}

// reserve takes room for n sockets in the service manager, if it has that: what is
// too much it drops without a word.
func (d *daemon) reserve(n int) bool {
	if d.kept.Add(int64(n)) <= int64(d.boss.Room()) {
		return true
	}
	d.kept.Add(-int64(n))
	return false
}

// keep lets the service manager have duplicates of the sockets of a listener, for
// which there is room, or gives that up. kept is their whole name.
func (d *daemon) keep(listener string, ls []transport.Listener) (kept string, err error) {
	defer func() {
		if err != nil {
			d.kept.Add(-int64(len(ls)))
		}
	}()
	file, err := transport.FileID(ls[0]) // a Unix socket is alone
	if err != nil {
		return "", err
	}
	kept = wholeKept(listener, file, len(ls))
	for _, l := range ls {
		f, err := transport.FileOf(l)
		if err == nil {
			err = errors.Join(d.boss.Keep(kept, f), f.Close())
		}
		if err != nil {
			return "", errors.Join(err, d.boss.Forget(kept))
		}
	}
	return kept, nil
}

// forget makes the service manager close what waits for doors that go.
func (d *daemon) forget(list []*door) {
	for _, o := range list {
		if o.kept == "" {
			continue
		}
		d.kept.Add(-1)
		if err := d.boss.Forget(o.kept); err != nil {
			d.log.Warn("the service manager goes on keeping a listener", "listener", o.name, "error", err)
		}
	}
}

// settlePassed ends the start: listeners that waited and that nobody took up
// are closed, with their paths. Sockets that systemd opened for nobody are a
// mistake; where exports are kept they wait for one that is added: the one that
// took them may be removed by now, or its file be damaged.
func (d *daemon) settlePassed() error {
	if d.passed == nil {
		return nil
	}
	var errs []error
	taken, keeps := d.listenerURIs(), d.conf.Load().Control.State != ""
	for _, name := range d.passed.Names() {
		switch {
		case strings.HasPrefix(name, config.KeptPrefix):
			errs = append(errs, d.dropKept(name))
		case taken[config.SystemdScheme+name]:
		case keeps:
			d.log.Warn("systemd passed a socket that no listener names: clients wait there until one of an export that is added does",
				"listener", config.SystemdScheme+name)
		default:
			errs = append(errs, fmt.Errorf("systemd passed a socket that is called %q, and no listener of the configuration has the uri %q",
				name, config.SystemdScheme+name))
		}
	}
	return errors.Join(errs...)
}

// listenerURIs are those of all listeners, also of exports that failed.
func (d *daemon) listenerURIs() map[string]bool {
	m := map[string]bool{}
	for _, o := range d.doors.all() {
		m[o.name] = true
	}
	for _, k := range d.disks.failed() {
		for _, l := range k.cfg.Listeners {
			m[l.URI] = true
		}
	}
	return m
}

// dropKept closes listeners that waited, with their paths.
func (d *daemon) dropKept(name string) error {
	files, err := d.passed.Files(name)
	d.passed.Drop(name)
	for _, f := range files {
		d.kept.Add(-1)
		d.tellClosed(d.endKept(name, f))
	}
	return err
}

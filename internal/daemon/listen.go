package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// door is a listener with what is agreed for those who come in by it.
type door struct {
	transport.Listener
	name string // what transport.Peer calls it
	tls  nbd.TLSMode
	own  bool   // of a single export
	kept string // the name under which it waits for the next start, or ""

	// place is that of a listener of the configuration that exports share; with
	// daemon.reloading, but for the start.
	place config.Place

	scope transport.Scope

	once   sync.Once
	closed error
}

// show has the door show some exports, or all if none is named.
func (o *door) show(exports []string) {
	if len(exports) == 0 {
		o.scope.ShowAll()
	} else {
		o.scope.Show(exports...)
	}
}

// Close stops accepting; it may be called again. What waits for the next start
// waits no more: the service manager has it until it has forgotten it, and would
// go on listening.
func (o *door) Close() error {
	end := o.Listener.Close
	if o.kept != "" {
		end = func() error { return transport.End(o.Listener) }
	}
	o.once.Do(func() { o.closed = end() })
	return o.closed
}

// leave stops accepting as Close does, but what waits for the next start stays
// for it.
func (o *door) leave() error {
	if o.kept == "" {
		return o.Close()
	}
	o.once.Do(func() { o.closed = transport.Leave(o.Listener) })
	return o.closed
}

// doors are the listeners of the daemon, accepting or not yet.
type doors struct {
	mu   sync.Mutex
	list []*door // guarded by mu
}

func (s *doors) add(list ...*door) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(s.list, list...)
}

// all is a copy of the list.
func (s *doors) all() []*door {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*door(nil), s.list...)
}

// named are the doors of a name.
func (s *doors) named(name string) (list []*door) {
	for _, o := range s.all() {
		if o.name == name {
			list = append(list, o)
		}
	}
	return list
}

// sharedAt are the doors at a place.
func (s *doors) sharedAt(p config.Place) []*door {
	return slices.DeleteFunc(s.all(), func(o *door) bool { return o.place != p })
}

// lost gives the doors the places that they have without a listener.
func (s *doors) lost(p config.Place) {
	for _, o := range s.all() {
		o.place = o.place.Without(p)
	}
}

// shared are the doors at which an export without its own can be found.
func (s *doors) shared(name string) (list []*door) {
	for _, o := range s.all() {
		names, all := o.scope.Names()
		if !o.own && (all || slices.Contains(names, name)) {
			list = append(list, o)
		}
	}
	return list
}

// leave ends accepting at all doors. A socket path that is not ours any more
// stays and is no error.
func (s *doors) leave() (err error) {
	for _, x := range s.all() {
		err = errors.Join(err, x.leave())
	}
	return err
}

// remove closes those doors and forgets them.
func (s *doors) remove(list []*door) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range list {
		_ = x.Close() // a socket path that is not ours any more stays
		for i := range s.list {
			if s.list[i] == x {
				s.list = append(s.list[:i:i], s.list[i+1:]...)
				break
			}
		}
	}
}

// tlsModes are the words of the configuration.
var tlsModes = map[string]nbd.TLSMode{"": nbd.TLSOff, "off": nbd.TLSOff, "on": nbd.TLSOn, "require": nbd.TLSRequire}

// openDoor listens where l says. Nothing is accepted yet. encrypted tells that
// what is found there demands TLS.
func (d *daemon) openDoor(ctx context.Context, l config.Listener, encrypted bool) ([]*door, error) {
	mode, ok := tlsModes[l.TLS]
	if !ok {
		return nil, fmt.Errorf("listener %q: tls %q is none of off, on, require", l.URI, l.TLS)
	}
	if mode != nbd.TLSOff && !d.canEncrypt() {
		return nil, fmt.Errorf("listener %q: this daemon has no certificates: %s", l.URI, d.toEncrypt())
	}
	if strings.HasPrefix(l.URI, config.SystemdScheme) && len(d.doors.named(l.URI)) > 0 {
		return nil, fmt.Errorf("listener %q: another one has its sockets", l.URI)
	}
	ls, kept, err := d.bind(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("listener %q: %w", l.URI, err)
	}
	var list []*door
	for _, x := range ls {
		o := &door{Listener: x, name: l.URI, tls: mode, kept: kept}
		o.show(l.Exports)
		list = append(list, o)
	}
	if err := d.checkPlain(ls, encrypted || mode == nbd.TLSRequire, l.InsecurePlaintext); err != nil {
		d.closeDoors(list)
		return nil, fmt.Errorf("listener %q: %w: %s", l.URI, err, config.NeedTLS)
	}
	return list, nil
}

func (d *daemon) canEncrypt() bool { return d.creds != nil || d.keys != nil }

// toEncrypt is what helps a daemon that has nothing to encrypt with.
func (d *daemon) toEncrypt() string {
	if d.noSecrets != nil {
		return fmt.Sprintf("%v: a restart reads them again", d.noSecrets)
	}
	return "name them in [tls] and restart"
}

// checkPlain refuses listeners that networks reach, unless what passes there is
// encrypted. insecure allows them, but not to a service that is to be confined
// strictly.
func (d *daemon) checkPlain(ls []transport.Listener, encrypted, insecure bool) error {
	i := slices.IndexFunc(ls, transport.BeyondLoopback)
	if i < 0 || encrypted {
		return nil
	}
	return d.allowPlain(ls[i].Addr(), insecure)
}

// allowPlain refuses plaintext at an address that networks reach, as checkPlain says.
func (d *daemon) allowPlain(addr string, insecure bool) error {
	switch {
	case !insecure:
		return fmt.Errorf("%s is open to networks in plaintext", addr)
	case d.cfg.Confine == confine.Strict:
		return fmt.Errorf("%s is open to networks in plaintext, which --confine=strict excludes", addr)
	}
	return nil
}

// endpointOf is where a listener of the configuration is.
func endpointOf(l config.Listener) (transport.Endpoint, error) {
	u, err := transport.ParseURI(l.URI)
	if err != nil {
		return transport.Endpoint{}, err
	}
	if u.Export != "" || u.User != "" || len(u.Params) > 0 {
		return transport.Endpoint{}, errors.New("the URI of a listener has no export, user or parameters")
	}
	e := transport.Endpoint{Kind: u.Kind, Name: l.URI, Path: u.Path, Address: u.Address, Port: u.Port, CID: u.CID,
		Label: l.SELinuxLabel, PathLabel: l.SELinuxPathLabel}
	err = setAccess(&e, l.Mode, l.Owner)
	return e, err
}

// setAccess gives the socket of e a mode and an owner, where they are said.
func setAccess(e *transport.Endpoint, mode, owner string) (err error) {
	if mode != "" {
		if e.Mode, err = transport.ParseMode(mode); err != nil {
			return err
		}
	}
	if owner != "" {
		e.Owner, err = transport.ParseOwner(owner)
	}
	return err
}

// acceptPause is how long accepting rests when the system is out of
// descriptors or memory.
const acceptPause = 50 * time.Millisecond

// accept begins to accept at a door.
func (d *daemon) accept(x *door) {
	d.accepted.Add(1)
	go func() {
		defer d.accepted.Done()
		d.acceptLoop(x)
	}()
}

func (d *daemon) acceptLoop(x *door) {
	var told time.Time // of failures, which last as long as their cause
	cut := 0
	for {
		c, err := x.Accept(d.ctx)
		switch {
		case err == nil:
			c.Peer().Via, c.Peer().Scope = x.name, &x.scope
			d.accepted.Add(1)
			go func() {
				defer d.accepted.Done()
				_ = d.converse(c, x.tls) // logged there
			}()
		case errors.Is(err, net.ErrClosed) || d.ctx.Err() != nil:
			return
		default:
			if cut++; time.Since(told) >= limits.AcceptFailures {
				d.log.Warn("accept failed", "at", x.Addr(), "error", err, "times", cut)
				told, cut = time.Now(), 0
			}
			select {
			case <-time.After(acceptPause):
			case <-d.ctx.Done():
				return
			}
		}
	}
}

// converse serves one client. What it did wrong is a debug line.
func (d *daemon) converse(c transport.Conn, mode nbd.TLSMode) error {
	if !d.exports.Admits(c.Peer()) {
		d.refused.Add(1)
		d.log.Debug("refused: no export is for this peer", "peer", c.Peer())
		return c.Close()
	}
	d.log.Debug("connected", "peer", c.Peer())
	err := d.server.ServeTLS(d.ctx, c, mode)
	d.log.Debug("disconnected", "peer", c.Peer(), "error", err)
	return err
}

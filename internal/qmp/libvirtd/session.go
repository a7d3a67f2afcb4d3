// Package libvirtd is a session with a libvirt daemon: domains, their
// descriptions, disks that come and go, and QEMU's monitor by way of libvirt.
//
// libvirt is part of the host and trusted as such. What it says of a domain,
// though, may be what a guest's QEMU or a user has put there: names are data,
// texts of errors are made printable, sizes are bounded. Every call has a
// deadline.
package libvirtd

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// Sockets of daemons on a host, in the order in which they are tried: of the
// daemon for QEMU alone, then of the one for everything.
var Sockets = []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}

// URIs of the drivers that a daemon offers.
const (
	System  = "qemu:///system"
	Private = "qemu:///session" // of the user that runs the daemon
)

// Error is libvirt's refusal of a call.
type Error struct {
	Call string
	Code libvirt.ErrorNumber
	Text string // printable, at most limits.QMPErrorText bytes
}

// Error names the call.
func (e *Error) Error() string { return e.Call + ": " + e.Text }

// HasCode reports whether err is libvirt's refusal with the code, such as
// libvirt.ErrNoDomain.
func HasCode(err error, code libvirt.ErrorNumber) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// IsUnknown reports whether err is libvirt's refusal of a domain that it does not
// know, or no more: a transient one ends with its machine.
func IsUnknown(err error) bool { return HasCode(err, libvirt.ErrNoDomain) }

// Session is a connection to a libvirt daemon. Safe for concurrent use. After
// a call that ended by its context the session is closed: the reply would
// come at some time.
type Session struct {
	path, uri string // as Dial got them

	l       *libvirt.Libvirt
	conn    *framed
	feeders sync.WaitGroup // of events, until the connection ends

	subscribing chan struct{}      // holds a token while these are used:
	subscribed  int                // how many of deviceEvents
	streams     map[string]*stream // of Monitor.Events, by UUID

	mu      sync.Mutex
	watches map[*Watch]struct{} // guarded by mu
	closed  bool                // guarded by mu; feeders is being waited for
}

// Dial connects to the daemon's socket and opens the driver, System or
// Private, within limits.LibvirtDial and ctx. The caller calls Close.
func Dial(ctx context.Context, path, uri string) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.LibvirtDial)
	defer cancel()
	c, err := qmp.DialSocket(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("libvirt: %w", err)
	}
	conn := newFramed(c)
	s := &Session{path: path, uri: uri, l: libvirt.NewWithDialer(conn), conn: conn, subscribing: make(chan struct{}, 1), watches: map[*Watch]struct{}{}, streams: map[string]*stream{}}
	_, err = call(ctx, s, "connect to "+uri, func() (struct{}, error) {
		return struct{}{}, s.l.ConnectToURI(libvirt.ConnectURI(uri))
	})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("libvirt at %q: %w", path, err)
	}
	return s, nil
}

// Close ends the session; calls that wait fail. It waits for the session's
// goroutines, limits.Linger at most: go-libvirt may be stuck in its own locks.
func (s *Session) Close() error {
	err := s.conn.Close()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		s.feeders.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(limits.Linger):
	}
	return err
}

// own runs f, which ends with the connection, for Close to wait for.
func (s *Session) own(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		go f() // it ends at once
		return
	}
	s.feeders.Go(f)
}

// Done is closed when the session is of no use any more.
func (s *Session) Done() <-chan struct{} { return s.conn.done }

// call runs f, a call of go-libvirt, which takes no context: when ctx is done
// the session is closed and f left to itself.
func call[T any](ctx context.Context, s *Session, name string, f func() (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.LibvirtCall)
	defer cancel()
	type result struct {
		v   T
		err error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", name, err)
	}
	select {
	case <-s.conn.done:
		return none, fmt.Errorf("%s: %w", name, qmp.ErrClosed)
	default:
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, s.explain(name, r.err)
	case <-ctx.Done():
		s.conn.Close()
		return none, fmt.Errorf("%s: %w: %w", name, qmp.ErrUnanswered, ctx.Err())
	}
}

// explain makes a call's error printable, and one of a lost connection plain.
func (s *Session) explain(name string, err error) error {
	var e libvirt.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e):
		return &Error{Call: name, Code: libvirt.ErrorNumber(e.Code), Text: qmp.Printable(e.Message, limits.QMPErrorText)}
	case errors.Is(err, libvirt.ErrInterrupted):
		return fmt.Errorf("%s: %w: %w", name, qmp.ErrUnanswered, qmp.ErrLost)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// Version is libvirt's own.
func (s *Session) Version(ctx context.Context) (qmp.Version, error) {
	v, err := call(ctx, s, "version", s.l.ConnectGetLibVersion)
	return qmp.Version{Major: int(v / 1e6), Minor: int(v / 1e3 % 1e3), Micro: int(v % 1e3)}, err
}

// Domain is a virtual machine, as libvirt names it.
type Domain struct {
	Name   string // as it is: may hold anything
	UUID   string // in the usual form
	Active bool
	handle libvirt.Domain
}

func domain(d libvirt.Domain) (Domain, error) {
	if d.Name == "" || len(d.Name) > limits.QMPName {
		return Domain{}, fmt.Errorf("%w: a domain's name of %d bytes", qmp.ErrProtocol, len(d.Name))
	}
	u := hex.EncodeToString(d.UUID[:])
	return Domain{
		Name:   d.Name,
		UUID:   strings.Join([]string{u[:8], u[8:12], u[12:16], u[16:20], u[20:]}, "-"),
		Active: d.ID >= 0,
		handle: d,
	}, nil
}

// Domains lists all domains, running or not, at most limits.LibvirtDomains.
func (s *Session) Domains(ctx context.Context) ([]Domain, error) {
	const name = "list domains"
	list, err := call(ctx, s, name, func() ([]libvirt.Domain, error) {
		d, _, err := s.l.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive|libvirt.ConnectListDomainsInactive)
		return d, err
	})
	if err != nil {
		return nil, err
	}
	if len(list) > limits.LibvirtDomains {
		return nil, fmt.Errorf("%s: %w: %d of them", name, qmp.ErrProtocol, len(list))
	}
	out := make([]Domain, 0, len(list))
	for _, l := range list {
		d, err := domain(l)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, d)
	}
	return out, nil
}

// stateNames are what people call the states of domains, as QEMU does.
var stateNames = map[libvirt.DomainState]string{
	libvirt.DomainRunning: "running", libvirt.DomainBlocked: "running", libvirt.DomainPaused: "paused",
	libvirt.DomainShutdown: "shutdown", libvirt.DomainShutoff: "off", libvirt.DomainCrashed: "crashed",
	libvirt.DomainPmsuspended: "suspended",
}

// State is what the domain does: "running", "paused", "shutdown", "off",
// "crashed", "suspended" or "unknown".
func (s *Session) State(ctx context.Context, d Domain) (string, error) {
	state, err := call(ctx, s, "state of domain", func() (int32, error) {
		state, _, err := s.l.DomainGetState(d.handle, 0)
		return state, err
	})
	if name, ok := stateNames[libvirt.DomainState(state)]; ok || err != nil {
		return name, err
	}
	return "unknown", nil
}

// Lookup finds a domain by its UUID or its name. None is *Error with code
// libvirt.ErrNoDomain.
func (s *Session) Lookup(ctx context.Context, nameOrUUID string) (Domain, error) {
	if nameOrUUID == "" || len(nameOrUUID) > limits.QMPName || strings.ContainsRune(nameOrUUID, 0) {
		return Domain{}, fmt.Errorf("%w domain name %.40q", qmp.ErrInvalid, nameOrUUID)
	}
	if id, ok := parseUUID(nameOrUUID); ok {
		d, err := call(ctx, s, "look up domain", func() (libvirt.Domain, error) { return s.l.DomainLookupByUUID(id) })
		if err == nil {
			return domain(d)
		}
		if !HasCode(err, libvirt.ErrNoDomain) {
			return Domain{}, err
		}
	}
	d, err := call(ctx, s, "look up domain", func() (libvirt.Domain, error) { return s.l.DomainLookupByName(nameOrUUID) })
	if err != nil {
		return Domain{}, err
	}
	return domain(d)
}

// parseUUID reads 32 hexadecimal digits with or without the usual dashes.
func parseUUID(s string) (id libvirt.UUID, ok bool) {
	if len(s) == 36 {
		for _, i := range []int{8, 13, 18, 23} {
			if s[i] != '-' {
				return id, false
			}
		}
		s = strings.ReplaceAll(s, "-", "")
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, false
	}
	copy(id[:], b)
	return id, true
}

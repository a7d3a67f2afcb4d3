// Package controltest has a service without disks for tests of the control
// API and of its clients.
package controltest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/server"
)

// Service is a server.Service whose exports are only said to exist. Its zero
// value has none.
type Service struct {
	// Fail is returned by everything that can fail, before it does anything.
	// Set before use.
	Fail error

	// Started gets the name of an export whose removal without force waits for
	// its clients, which never leave. Set before use.
	Started chan string

	mu      sync.Mutex
	exports []api.Export // guarded by mu
	clients []api.Client // guarded by mu
	leases  []api.Lease  // guarded by mu
	calls   []string     // guarded by mu; what has changed something, in words
	files   []*os.File   // guarded by mu; that have come

	listeners map[chan api.Event]struct{} // guarded by mu
	closed    bool                        // guarded by mu
}

// Put adds an export as it is.
func (s *Service) Put(e api.Export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exports = append(s.exports, e)
}

// PutClient adds a client.
func (s *Service) PutClient(c api.Client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, c)
}

// Calls are the changes so far, one text each.
func (s *Service) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Files hands over the descriptors that have come since the last call.
func (s *Service) Files() []*os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files
	s.files = nil
	return f
}

// Publish tells every listener that has room.
func (s *Service) Publish(e api.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.Time = time.Now()
	for l := range s.listeners {
		select {
		case l <- e:
		default:
		}
	}
}

// Close ends all listeners, and those to come.
func (s *Service) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for l := range s.listeners {
		close(l)
	}
	s.listeners = nil
}

// Subscribe is as in server.Service, but that nobody is told of lost events.
func (s *Service) Subscribe(n int) (<-chan api.Event, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Fail != nil {
		return nil, nil, s.Fail
	}
	l := make(chan api.Event, n)
	if s.closed {
		close(l)
		return l, func() {}, nil
	}
	if s.listeners == nil {
		s.listeners = map[chan api.Event]struct{}{}
	}
	s.listeners[l] = struct{}{}
	return l, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if _, ok := s.listeners[l]; ok {
			delete(s.listeners, l)
			close(l)
		}
	}, nil
}

func (s *Service) note(format string, a ...any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, fmt.Sprintf(format, a...))
	return s.Fail
}

func notFound(what string) error {
	return &api.Error{Code: api.CodeNotFound, Text: fmt.Sprintf("no %s", what)}
}

// change finds an export and lets f change it.
func (s *Service) change(name string, f func(*api.Export)) (api.Export, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.exports {
		if s.exports[i].Name == name {
			f(&s.exports[i])
			return s.exports[i], nil
		}
	}
	return api.Export{}, notFound(fmt.Sprintf("export %q", name))
}

func (s *Service) Status() api.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return api.Status{Version: "test", PID: os.Getpid(), Engine: "none", Exports: len(s.exports), Clients: len(s.clients)}
}

func (s *Service) Exports() []api.Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.exports)
}

func (s *Service) Export(name string) (api.Export, error) {
	if s.Fail != nil {
		return api.Export{}, s.Fail
	}
	return s.change(name, func(*api.Export) {})
}

func (s *Service) Add(_ context.Context, a api.AddExport, files []*os.File) (api.Export, error) {
	if err := s.note("add %q image %q files %d persist %t", a.Name, a.Image, len(files), a.Persist); err != nil {
		return api.Export{}, err
	}
	if _, err := s.change(a.Name, func(*api.Export) {}); err == nil {
		return api.Export{}, &api.Error{Code: api.CodeExists, Text: fmt.Sprintf("export %q exists", a.Name)}
	}
	e := api.Export{Export: a.Export, State: api.StateReady, Writable: !a.ReadOnly, Origin: "api"}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exports = append(s.exports, e)
	s.files = append(s.files, files...)
	return e, nil
}

func (s *Service) Patch(_ context.Context, name string, p api.Patch) (api.Export, error) {
	if err := s.note("patch %q", name); err != nil {
		return api.Export{}, err
	}
	var wrong error
	e, err := s.change(name, func(e *api.Export) {
		if p.Description != nil {
			e.Description = *p.Description
		}
		if p.ReadOnly != nil {
			e.ReadOnly = *p.ReadOnly
		}
		if p.Rate != nil {
			e.Rate = p.Rate
		}
		if p.WriteThreshold != nil {
			e.WriteThreshold = p.WriteThreshold
		}
		if e.Rate, wrong = e.Rate.With(p.RateKeys); wrong != nil {
			wrong = &api.Error{Code: api.CodeInvalid, Text: wrong.Error()}
		}
	})
	return e, errors.Join(err, wrong)
}

func (s *Service) Remove(ctx context.Context, name string, force bool) error {
	if err := s.note("remove %q force %t", name, force); err != nil {
		return err
	}
	if s.Started != nil && !force {
		s.Started <- name
		<-ctx.Done()
		return ctx.Err()
	}
	if _, err := s.change(name, func(*api.Export) {}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exports = slices.DeleteFunc(s.exports, func(e api.Export) bool { return e.Name == name })
	return nil
}

func (s *Service) Pause(_ context.Context, name string, limit time.Duration) error {
	if err := s.note("pause %q for %s", name, limit); err != nil {
		return err
	}
	_, err := s.change(name, func(e *api.Export) { e.State = api.StatePaused })
	return err
}

func (s *Service) Resume(name string) error {
	if err := s.note("resume %q", name); err != nil {
		return err
	}
	_, err := s.change(name, func(e *api.Export) { e.State = api.StateReady })
	return err
}

func (s *Service) Resize(_ context.Context, name string, r api.Resize) (api.Export, error) {
	if err := s.note("resize %q to %d by %d", name, r.Size, r.By); err != nil {
		return api.Export{}, err
	}
	return s.change(name, func(e *api.Export) {
		if r.Size == 0 {
			r.Size = e.Size + r.By
		}
		e.Size = r.Size
	})
}

func (s *Service) Snapshot(_ context.Context, name string, o api.Snapshot, files []*os.File) (api.Export, error) {
	if err := s.note("snapshot %q overlay %q files %d", name, o.Overlay, len(files)); err != nil {
		return api.Export{}, err
	}
	e, err := s.change(name, func(e *api.Export) { e.Image = o.Overlay })
	if err != nil {
		return e, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = append(s.files, files...)
	return e, nil
}

func (s *Service) Forget(_ context.Context, name string, force, dryRun bool) (api.Forgotten, error) {
	if err := s.note("forget %q force %t dry %t", name, force, dryRun); err != nil {
		return api.Forgotten{}, err
	}
	e, err := s.change(name, func(*api.Export) {})
	if err == nil && !force {
		err = &api.Error{Code: api.CodeForbidden, Text: "a guest may have written to it"}
	}
	return api.Forgotten{DryRun: dryRun, Overlay: e.Image + ".qcow2", Image: e.Image}, err
}

func (s *Service) Clients(export *string) []api.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.clients), func(c api.Client) bool { return export != nil && c.Export != *export })
}

func (s *Service) Disconnect(id uint64) error {
	if err := s.note("disconnect %d", id); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.clients {
		if c.ID == id {
			s.clients = slices.Delete(s.clients, i, i+1)
			return nil
		}
	}
	return notFound(fmt.Sprintf("client %d", id))
}

func (s *Service) Leases() []api.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.leases)
}

func (s *Service) OpenLease(l api.OpenLease) (api.Lease, error) {
	x := api.Lease{CID: l.CID, VM: l.VM, Start: l.Start, Expires: time.Now().Add(time.Duration(l.TTL))}
	if err := s.note("open lease %d of %q %q by %q", l.CID, l.VM, l.Start, l.Holder); err != nil {
		return x, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases = append(slices.DeleteFunc(s.leases, func(o api.Lease) bool { return o.CID == l.CID }), x)
	return x, nil
}

// CloseLease is as in server.Service, but that each holder is the last.
func (s *Service) CloseLease(cid uint32, start, holder string) error {
	if err := s.note("close lease %d %q by %q", cid, start, holder); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases = slices.DeleteFunc(s.leases, func(o api.Lease) bool { return o.CID == cid && o.Start == start })
	return nil
}

func (s *Service) Stats() []api.Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []api.Stats
	for _, e := range s.exports {
		all = append(all, api.Stats{Export: e.Name, Commands: map[string]api.Command{"read": {Requests: 1}}})
	}
	return all
}

func (s *Service) Reload(_ context.Context, dryRun bool) (api.Reload, error) {
	err := s.note("reload dry %t", dryRun)
	return api.Reload{DryRun: dryRun}, err
}

func (s *Service) Metrics(w io.Writer) error {
	if s.Fail != nil {
		return s.Fail
	}
	_, err := fmt.Fprintf(w, "vmdiskd_exports %d\n", len(s.Exports()))
	return err
}

var _ server.Service = (*Service)(nil)

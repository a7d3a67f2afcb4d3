package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/control/controltest"
	ctlserver "github.com/vmdiskd/vmdiskd/internal/control/server"
)

// full stands for an export that is ready and has all the clients that it takes.
const full = "full"

// busyService has exports that others change and use.
type busyService struct {
	controltest.Service
	inUse bool

	mu    sync.Mutex
	looks []string // guarded by mu: states of the export at each look, or full; "": there is none yet
}

func (s *busyService) Export(name string) (api.Export, error) {
	state, ok := s.next()
	if !ok {
		return s.Service.Export(name)
	}
	if state == "" {
		return api.Export{}, &api.Error{Code: api.CodeNotFound, Text: "no export"}
	}
	x, err := s.Service.Export(name)
	switch x.State = state; state {
	case api.StateOpening:
		x.Size = 0
	case full:
		x.State, x.Clients = api.StateReady, x.Connections
	}
	return x, err
}

// next takes the first of the looks, if any is left.
func (s *busyService) next() (state string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.looks) == 0 {
		return "", false
	}
	state, s.looks = s.looks[0], s.looks[1:]
	return state, true
}

func (s *busyService) Remove(ctx context.Context, name string, force bool) error {
	if s.inUse && !force {
		return &api.Error{Code: api.CodeInUse, Text: "in use"}
	}
	return s.Service.Remove(ctx, name, force)
}

// answer has the service answer until the test ends.
func (s *busyService) answer(t *testing.T) *client.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := ctlserver.New(ctlserver.Config{
		Service: s, Log: slog.New(slog.DiscardHandler),
		Authorize: func(ctlserver.Peer) ctlserver.Access { return ctlserver.Change },
	})
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close(context.Background()), <-done); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return client.Dial(path)
}

// wanted is an export that the service can be asked for.
func wanted() api.AddExport {
	return api.AddExport{Export: config.Export{Name: "d", Image: "/d.img", Listeners: []config.Listener{{URI: "nbd+unix:///?socket=/d.sock"}}}}
}

// TestExportThatAnotherAddsIsWaitedFor: two attaches of one disk at a time look
// for its export, and only one adds it.
func TestExportThatAnotherAddsIsWaitedFor(t *testing.T) {
	s := &busyService{looks: []string{"", api.StateDraining, "", api.StateOpening, "ready"}}
	s.Put(api.Export{Export: wanted().Export, State: "ready", Size: 4096})
	var size int64
	step := exportStep(s.answer(t), wanted(), nil, &size)
	if changed, err := step.Do(t.Context()); changed || err != nil || size != 4096 {
		t.Errorf("changed %v, size %d, %v", changed, size, err)
	}
	if left, ok := s.next(); ok {
		t.Errorf("not looked at in the state %q", left)
	}
}

// TestExportThatIsNotWellIsRefused, by its name as for its image; one that takes no
// more writes is served to who only reads, and one that is paused to nobody.
func TestExportThatIsNotWellIsRefused(t *testing.T) {
	for _, tt := range []struct {
		state, why         string
		readOnly, accepted bool
	}{
		{"ready", "", false, true},
		{"poisoned", "a write was lost", false, false},
		{"poisoned", "a write was lost", true, true},
		{"failed", "no such file", false, false},
		{"failed", "no such file", true, false},
		{"paused", "", false, false},
		{"paused", "", true, false},
	} {
		t.Run(fmt.Sprint(tt.state, ",", tt.readOnly), func(t *testing.T) {
			a := wanted()
			a.ReadOnly = tt.readOnly
			s := &busyService{}
			s.Put(api.Export{Export: a.Export, State: tt.state, Error: tt.why, URIs: []string{"nbd+unix:///d?socket=/d.sock"}})
			c := s.answer(t)
			_, step := exportStep(c, a, nil, new(int64)).Do(t.Context())
			_, named := (&Source{Export: "d", ReadOnly: tt.readOnly}).serveExport(t.Context(), c)
			for _, err := range []error{step, named} {
				if (err == nil) != tt.accepted || err != nil && !strings.Contains(err.Error(), cmp.Or(tt.why, tt.state)) {
					t.Errorf("got %v, want it accepted %t", err, tt.accepted)
				}
			}
		})
	}
}

// TestClientThatLeavesIsWaitedFor: the server may notice some time after a machine.
func TestClientThatLeavesIsWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		looks []string
		want  error
	}{
		{[]string{full, full, api.StateReady}, nil},
		{[]string{full, api.StatePaused}, ErrPaused},
	} {
		s := &busyService{looks: append([]string{full}, tt.looks...)} // the plan takes the first
		x := wanted().Export
		x.Connections = 1
		s.Put(api.Export{Export: x, URIs: []string{"nbd+unix:///d?socket=/d.sock"}})
		v, err := (&Source{Export: "d"}).serveExport(t.Context(), s.answer(t))
		if err != nil {
			t.Fatal(err)
		}
		err = v.ready(t.Context())
		if left, ok := s.next(); ok || !errors.Is(err, tt.want) {
			t.Errorf("%q: got %v, want %v, not looked at when %q", tt.looks, err, tt.want, left)
		}
	}
}

// TestWaitForAnExportEndsByAnInterrupt and adds nothing.
func TestWaitForAnExportEndsByAnInterrupt(t *testing.T) {
	s := &busyService{}
	s.Put(api.Export{Export: wanted().Export, State: api.StateDraining})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if changed, err := exportStep(s.answer(t), wanted(), nil, new(int64)).Do(ctx); changed || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("changed %v, %v", changed, err)
	}
}

// TestUndoLeavesAnExportThatIsInUse: whoever has found it since has a disk in
// it.
func TestUndoLeavesAnExportThatIsInUse(t *testing.T) {
	for _, inUse := range []bool{true, false} {
		s := &busyService{inUse: inUse}
		step := exportStep(s.answer(t), wanted(), nil, new(int64))
		if changed, err := step.Do(t.Context()); !changed || err != nil {
			t.Fatalf("changed %v, %v", changed, err)
		}
		ctx := t.Context()
		if inUse {
			var cancel func()
			ctx, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
			defer cancel()
		}
		if err := step.Undo(ctx); (err != nil) != inUse {
			t.Errorf("in use: %v, undo: %v", inUse, err)
		}
		if left := len(s.Exports()) == 1; left != inUse {
			t.Errorf("in use: %v, left: %v", inUse, left)
		}
	}
}

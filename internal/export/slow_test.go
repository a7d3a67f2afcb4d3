package export

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestSlowOpenHoldsUpNobodyElse is LM-10: while the image of one export takes
// as long as it likes to open, the others are served, and its own name is
// taken and seen by nobody.
func TestSlowOpenHoldsUpNobodyElse(t *testing.T) {
	r := NewRegistry()
	p := &transport.Peer{Kind: transport.Unix}
	opening, proceed, done := make(chan bool), make(chan bool), make(chan error, 1)
	go func() {
		done <- r.AddOpening(Spec{Name: "slow"}, func() (backing.Device, error) {
			close(opening)
			<-proceed
			return mem.New(4096, nil), nil
		})
	}()
	<-opening
	if err := r.Add(Spec{Name: "a", Device: mem.New(4096, nil)}); err != nil {
		t.Fatal(err)
	}
	x, err := r.Open(t.Context(), "a", p)
	if err != nil {
		t.Fatal(err)
	}
	x.Close()
	if list := r.List(p); len(list) != 1 || list[0].Name != "a" {
		t.Errorf("list: %+v, want a alone", list)
	}
	if _, err := r.Open(t.Context(), "slow", p); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open what is not open yet: %v", err)
	}
	if err := r.Add(Spec{Name: "slow", Device: mem.New(4096, nil)}); !errors.Is(err, ErrExists) {
		t.Errorf("take its name: %v", err)
	}
	if err := r.Remove(t.Context(), "a", nil, false); err != nil {
		t.Errorf("remove another: %v", err)
	}
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := r.Find("slow", p); err != nil {
		t.Errorf("when it is open: %v", err)
	}
}

// TestOpeningThatHangsHoldsUpNoEnd: the others are flushed and closed all the same,
// and what is opened after that is closed.
func TestOpeningThatHangsHoldsUpNoEnd(t *testing.T) {
	r := NewRegistry()
	opening, proceed, done := make(chan bool), make(chan bool), make(chan error, 1)
	late := &closeSpy{Device: mem.New(4096, nil)}
	go func() {
		done <- r.AddOpening(Spec{Name: "hangs"}, func() (backing.Device, error) {
			close(opening)
			<-proceed
			return late, nil
		})
	}()
	<-opening
	other := &closeSpy{Device: mem.New(4096, nil)}
	if err := r.Add(Spec{Name: "a", Device: other}); err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Close(over); !errors.Is(err, ErrInUse) {
		t.Errorf("close: got %v, want %v", err, ErrInUse)
	}
	if !other.closed {
		t.Error("the other export was not closed")
	}
	close(proceed)
	if err := <-done; err == nil || !late.closed {
		t.Errorf("what was opened late: got %v, closed is %t", err, late.closed)
	}
}

type closeSpy struct {
	backing.Device
	closed bool
}

func (s *closeSpy) Close() error {
	s.closed = true
	return s.Device.Close()
}

// silent is a disk whose storage does not say how large it is until it is told to.
type silent struct {
	backing.Device
	asked  chan bool // gets one for each question
	answer chan bool // closed when there are answers
}

func newSilent() *silent {
	return &silent{mem.New(4096, nil), make(chan bool, 64), make(chan bool)}
}

func (s *silent) Info() backing.Info {
	s.asked <- true
	<-s.answer
	return s.Device.Info()
}

// TestStorageThatHangsHoldsUpNoOtherExport: while one disk does not answer, who
// asks for it waits and nobody else.
func TestStorageThatHangsHoldsUpNoOtherExport(t *testing.T) {
	for _, tt := range []struct {
		name string
		ask  func(*Registry, *transport.Peer)
	}{
		{"open", func(r *Registry, p *transport.Peer) {
			if x, err := r.Open(context.Background(), "silent", p); err != nil {
				t.Errorf("open of a disk that answers late: %v", err)
			} else {
				x.Close()
			}
		}},
		{"status", func(r *Registry, _ *transport.Peer) { r.Status() }},
		{"status of it", func(r *Registry, _ *transport.Peer) { r.StatusOf("silent") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, p, disk := NewRegistry(), &transport.Peer{Kind: transport.Unix}, newSilent()
			for _, s := range []Spec{{Name: "silent", Device: disk}, {Name: "a", Device: mem.New(4096, nil)}} {
				if err := r.Add(s); err != nil {
					t.Fatal(err)
				}
			}
			answered := make(chan bool)
			go func() {
				defer close(answered)
				tt.ask(r, p)
			}()
			<-disk.asked
			x, err := r.Open(t.Context(), "a", p)
			if err != nil {
				t.Fatalf("open of the other: %v", err)
			}
			x.Close()
			if list := r.List(p); len(list) != 2 {
				t.Errorf("list: got %+v, want both", list)
			}
			if _, err := r.Find("silent", p); err != nil {
				t.Errorf("find: %v", err)
			}
			if s, _ := r.StatusOf("a"); s.Info.Size != 4096 {
				t.Errorf("status of the other: got %+v", s)
			}
			if err := r.Remove(t.Context(), "a", nil, false); err != nil {
				t.Errorf("remove the other: %v", err)
			}
			close(disk.answer)
			<-answered
			if err := r.Close(t.Context()); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
}

// TestStorageThatHangsIsRemovedByForceInTime: its client is told to leave, and the
// export stays until the storage answers.
func TestStorageThatHangsIsRemovedByForceInTime(t *testing.T) {
	r, p, disk := NewRegistry(), &transport.Peer{Kind: transport.Unix}, newSilent()
	other := &closeSpy{Device: mem.New(4096, nil)}
	for _, s := range []Spec{{Name: "silent", Device: disk}, {Name: "a", Device: other}} {
		if err := r.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	opened := make(chan *nbd.Export)
	go func() {
		x, err := r.Open(context.Background(), "silent", p)
		if err != nil {
			t.Errorf("open: %v", err)
		}
		opened <- x
	}()
	<-disk.asked
	over, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	if err := r.Remove(over, "silent", nil, true); !errors.Is(err, ErrInUse) {
		t.Errorf("remove: got %v, want %v", err, ErrInUse)
	}
	if err := r.Close(over); !errors.Is(err, ErrInUse) || !other.closed {
		t.Errorf("close: got %v, want %v; the other is closed: %t", err, ErrInUse, other.closed)
	}
	close(disk.answer)
	x := <-opened
	if x.Gone.Err() == nil || x.Cut.Err() == nil {
		t.Error("who came in meanwhile is not told to leave")
	}
	x.Close()
	if err := r.Remove(t.Context(), "silent", nil, true); err != nil {
		t.Errorf("remove when the storage answers: %v", err)
	}
}

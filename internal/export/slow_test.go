package export

import (
	"context"
	"errors"
	"testing"

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
	if err := r.Remove(t.Context(), "a", false); err != nil {
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

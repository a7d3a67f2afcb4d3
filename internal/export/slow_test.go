package export

import (
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

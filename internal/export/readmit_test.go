package export

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/nbd"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// TestReadmittedExportServesAgain: also while those who were told to leave are
// still there, and it can be removed as before.
func TestReadmittedExportServesAgain(t *testing.T) {
	r := NewRegistry()
	var states []string
	r.Changed = func(_ string, s State) { states = append(states, string(s)) }
	dev := &recorder{Device: mem.New(1, nil)}
	add(t, r, Spec{Name: "a", Device: dev})
	if r.Readmit("a", nil) || r.Readmit("b", nil) {
		t.Error("an export was readmitted that did not go")
	}
	slow, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	hasty, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Remove(hasty, "a", nil, true); !errors.Is(err, ErrInUse) {
		t.Fatalf("remove that may not wait: got %v, want %v", err, ErrInUse)
	}
	if !r.Readmit("a", nil) {
		t.Fatal("the export was not readmitted")
	}
	next, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	if slow.Gone.Err() == nil || next.Gone.Err() != nil {
		t.Errorf("told to leave: got %v and %v, want only the first", slow.Gone.Err(), next.Gone.Err())
	}
	slow.Close()
	next.Close()
	if len(dev.calls) > 0 {
		t.Errorf("device when all have left: got %q, want nothing", dev.calls)
	}
	if err := r.Remove(t.Context(), "a", nil, true); err != nil {
		t.Error(err)
	}
	if got := strings.Join(states, " "); got != "opening ready draining ready draining closed" {
		t.Errorf("states: got %q", got)
	}
}

// TestWhatIsBeingRemovedIsNotReadmitted: who waits for the end gets it.
func TestWhatIsBeingRemovedIsNotReadmitted(t *testing.T) {
	r := NewRegistry()
	draining := make(chan struct{}, 1)
	r.Changed = func(_ string, s State) {
		if s == Draining {
			draining <- struct{}{}
		}
	}
	add(t, r, Spec{Name: "a", Device: mem.New(1, nil)})
	x, err := r.Open(t.Context(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	removed := make(chan error, 1)
	go func() { removed <- r.Remove(t.Context(), "a", nil, true) }()
	<-draining
	if r.Readmit("a", nil) {
		t.Error("an export was readmitted while another removes it")
	}
	x.Close()
	select {
	case err := <-removed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the removal does not end")
	}
	if _, err := r.Open(t.Context(), "a", nil); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("open: got %v, want %v", err, nbd.ErrUnknownExport)
	}
}

// TestHiddenExportIsFoundWhenItIsRevealed: until its owner is, the empty name stands for
// no other in its stead, and it can be removed.
func TestHiddenExportIsFoundWhenItIsRevealed(t *testing.T) {
	r := NewRegistry()
	add(t, r, Spec{Name: "a", Device: mem.New(1, nil), Owner: 1, Hidden: true})
	add(t, r, Spec{Name: "b", Device: mem.New(1, nil)})
	wants := func(when string, shown bool) {
		t.Helper()
		p := &transport.Peer{Kind: transport.Unix}
		for _, name := range []string{"a", ""} {
			x, err := r.Open(t.Context(), name, p)
			switch {
			case !shown && !errors.Is(err, nbd.ErrUnknownExport):
				t.Errorf("%s: open %q: got %v, want %v", when, name, err, nbd.ErrUnknownExport)
			case shown && (err != nil || x.Name != "a"):
				t.Errorf("%s: open %q: got %v, want a", when, name, err)
			}
			if err == nil {
				x.Close()
			}
		}
		want := []string{"b"}
		if shown {
			want = []string{"a", "b"}
		}
		var got []string
		for _, x := range r.List(p) {
			got = append(got, x.Name)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: the list has %q, want %q", when, got, want)
		}
	}
	wants("at first", false)
	r.Reveal("a", 2)
	r.Reveal("c", 1)
	wants("when others are revealed", false)
	r.Reveal("a", 1)
	wants("when it is revealed", true)
	add(t, r, Spec{Name: "c", Device: mem.New(1, nil), Hidden: true})
	if err := r.Remove(t.Context(), "c", nil, false); err != nil {
		t.Errorf("remove one that is hidden: %v", err)
	}
}

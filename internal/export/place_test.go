package export

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/mem"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// standsFor compares what the empty name opens for p; "" is nothing.
func standsFor(t *testing.T, r *Registry, p *transport.Peer, when, want string) {
	t.Helper()
	if x, err := r.Find("", p); x.Name != want || (err == nil) != (want != "") {
		t.Errorf("%s: the empty name opens %q, %v; want %q", when, x.Name, err, want)
	}
}

// TestEmptyNameWaitsForItsExport: it opens no other disk while the one it stands
// for is away, however that is chosen, and the same one as before afterwards.
func TestEmptyNameWaitsForItsExport(t *testing.T) {
	listed := &transport.Peer{Scope: new(transport.Scope)}
	listed.Scope.Show("a", "b")
	for _, tt := range []struct {
		name string
		a    Settings
		peer *transport.Peer
	}{
		{"the first", Settings{}, nil},
		{"the default", Settings{Default: true}, nil},
		{"the first of a listener", Settings{}, listed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, a := NewRegistry(), Spec{Name: "a", Settings: tt.a}
			if tt.a.Default {
				add(t, r, Spec{Name: "b"})
				add(t, r, a)
			} else {
				add(t, r, a)
				add(t, r, Spec{Name: "b"})
			}
			standsFor(t, r, tt.peer, "at first", "a")
			r.Keep(a)
			standsFor(t, r, tt.peer, "kept", "a")
			if err := r.Remove(t.Context(), "a", nil, false); err != nil {
				t.Fatal(err)
			}
			standsFor(t, r, tt.peer, "away", "")
			err := r.AddOpening(a, func() (backing.Device, error) {
				standsFor(t, r, tt.peer, "opening", "")
				return nil, errors.New("lost")
			})
			if err == nil {
				t.Fatal("an export was added that does not open")
			}
			standsFor(t, r, tt.peer, "lost", "")
			add(t, r, a)
			standsFor(t, r, tt.peer, "back", "a")
			r.Fail("a")
			standsFor(t, r, tt.peer, "failed", "")
			if err := r.Remove(t.Context(), "a", nil, false); err != nil {
				t.Fatal(err)
			}
			r.Release("a")
			standsFor(t, r, tt.peer, "gone for good", "b")
		})
	}
}

// TestEmptyNameWaitsForWhatNeverOpened: a place can be had without a disk.
func TestEmptyNameWaitsForWhatNeverOpened(t *testing.T) {
	r := NewRegistry()
	r.Keep(Spec{Name: "a"})
	add(t, r, Spec{Name: "b"})
	standsFor(t, r, nil, "a not there", "")
	r.Keep(Spec{Name: "a"}) // it failed again
	add(t, r, Spec{Name: "a"})
	standsFor(t, r, nil, "a there", "a")
	r.Keep(Spec{Name: "c", Settings: Settings{Default: true}})
	standsFor(t, r, nil, "the default not there", "")
	r.Keep(Spec{Name: "c"})
	standsFor(t, r, nil, "the default none any more", "a")
}

// TestEmptyNameWaitsOnlyForWhatAPeerMaySee: an export that is away holds up none
// of the guests that it is not for.
func TestEmptyNameWaitsOnlyForWhatAPeerMaySee(t *testing.T) {
	r, scope := NewRegistry(), new(transport.Scope)
	scope.Show("a", "b")
	grants := []Grant{{Access: ReadWrite, UIDs: []uint32{7}}}
	r.Keep(Spec{Name: "a", Settings: Settings{Grants: grants}})
	add(t, r, Spec{Name: "b", Device: mem.New(1, nil)})
	standsFor(t, r, &transport.Peer{Kind: transport.Unix, UID: 7, Scope: scope}, "its owner", "")
	standsFor(t, r, &transport.Peer{Kind: transport.Unix, UID: 8, Scope: scope}, "another", "b")
}

// TestEmptyNamePassesOverWhatIsShownElsewhere: an export that has listeners of its
// own is not what the empty name stands for at those that exports share, whether it
// is there or not.
func TestEmptyNamePassesOverWhatIsShownElsewhere(t *testing.T) {
	shared := &transport.Peer{Kind: transport.Unix, Scope: new(transport.Scope)}
	own := &transport.Peer{Kind: transport.Unix, Scope: new(transport.Scope)}
	own.Scope.Show("a")
	for _, chosen := range []bool{false, true} {
		r, a := NewRegistry(), Spec{Name: "a", At: []*transport.Scope{own.Scope}, Settings: Settings{Default: chosen}}
		when := func(what, atOwn string) {
			t.Helper()
			what = fmt.Sprintf("default %t, %s", chosen, what)
			standsFor(t, r, shared, what+", shared listener", "z")
			standsFor(t, r, own, what+", own listener", atOwn)
		}
		r.Keep(a)
		add(t, r, Spec{Name: "z"})
		when("not there yet", "")
		add(t, r, a)
		when("there", "a")
		r.Keep(a)
		if err := r.Remove(t.Context(), "a", nil, false); err != nil {
			t.Fatal(err)
		}
		when("away", "")
	}
}

// TestEmptyNameTakesTheFirstOfAnArrangement, and what is none of it as it came.
func TestEmptyNameTakesTheFirstOfAnArrangement(t *testing.T) {
	r := NewRegistry()
	for _, name := range []string{"other", "c", "later", "b"} {
		add(t, r, Spec{Name: name})
	}
	standsFor(t, r, nil, "as they came", "other")
	r.Arrange("a", "b", "c")
	for _, name := range []string{"b", "c", "other", "later"} {
		standsFor(t, r, nil, "arranged", name)
		if err := r.Remove(t.Context(), name, nil, false); err != nil {
			t.Fatal(err)
		}
	}
	r.Keep(Spec{Name: "a"})
	add(t, r, Spec{Name: "b"})
	standsFor(t, r, nil, "the first not there", "")
	r.Arrange("b", "a")
	standsFor(t, r, nil, "arranged anew", "b")
}

// TestExportBeingOpenedHasItsPlace from when it is asked for, not from when it is open.
func TestExportBeingOpenedHasItsPlace(t *testing.T) {
	r := NewRegistry()
	var slow int
	err := r.AddOpening(Spec{Name: "slow"}, func() (backing.Device, error) {
		slow = r.Made("slow")
		add(t, r, Spec{Name: "fast"})
		standsFor(t, r, nil, "while the first is being opened", "fast")
		return mem.New(1, nil), nil
	})
	if err != nil || slow == 0 || r.Made("slow") != slow || r.Made("fast") <= slow {
		t.Errorf("got %v, %d when it was asked for and %d later, %d for the other", err, slow, r.Made("slow"), r.Made("fast"))
	}
	standsFor(t, r, nil, "when both are open", "slow")
}

// TestLastDefaultIsChosenAgain and yields, there and away.
func TestLastDefaultIsChosenAgain(t *testing.T) {
	r := NewRegistry()
	is := func(when, want string) {
		t.Helper()
		if got, ok := r.Default(); got != want || ok != (want != "") {
			t.Errorf("%s: the default is %q, %t, want %q", when, got, ok, want)
		}
	}
	for _, name := range []string{"none", "a", "b"} {
		add(t, r, Spec{Name: name, Settings: Settings{Default: name != "none"}})
	}
	if none, a, b := r.Made("none"), r.Made("a"), r.Made("b"); none <= 0 || a <= none || b <= a || r.Made("c") != 0 {
		t.Errorf("made in the order %d, %d, %d, and %d where there is none", none, a, b, r.Made("c"))
	}
	is("at first", "b")
	r.Choose("a")
	is("chosen again", "a")
	r.Choose("none")
	is("one that is none is chosen", "a")
	r.Yield("a")
	is("it has yielded", "b")
	r.Keep(Spec{Name: "b"})
	if err := r.Remove(t.Context(), "b", nil, false); err != nil {
		t.Fatal(err)
	}
	is("away", "b")
	r.Yield("b")
	is("all have yielded", "")
	standsFor(t, r, nil, "all have yielded", "none")
}

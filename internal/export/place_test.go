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

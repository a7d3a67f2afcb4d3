package attach_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/attach"
)

var errBroken = errors.New("broken")

// world is what the steps of a test change.
type world struct {
	there  map[string]bool
	calls  []string
	broken map[string]error // by "do x", "undo x" and "release x"
	late   bool             // a Do that fails has made its change all the same
}

func newWorld(there ...string) *world {
	w := &world{there: map[string]bool{}, broken: map[string]error{}}
	for _, x := range there {
		w.there[x] = true
	}
	return w
}

func (w *world) call(what string) error {
	w.calls = append(w.calls, what)
	return w.broken[what]
}

// step makes the thing x.
func (w *world) step(x string) attach.Step {
	return attach.Step{
		Name: "make " + x,
		Do: func(context.Context) (bool, error) {
			if w.there[x] {
				return false, w.call("find " + x)
			}
			err := w.call("do " + x)
			if err != nil && !w.late {
				return false, err
			}
			w.there[x] = true
			return true, err
		},
		Undo: func(ctx context.Context) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := w.call("undo " + x); err != nil {
				return err
			}
			delete(w.there, x)
			return nil
		},
	}
}

func (w *world) plan(n int) *attach.Plan {
	p := &attach.Plan{Aim: "a world"}
	for i := range n {
		p.Steps = append(p.Steps, w.step(fmt.Sprint(i)))
	}
	return p
}

func TestPlanDoesItsStepsInOrderAndOnce(t *testing.T) {
	w := newWorld()
	if changed, err := w.plan(3).Run(t.Context()); err != nil || !changed {
		t.Fatalf("first run: changed %v, %v", changed, err)
	}
	if want := []string{"do 0", "do 1", "do 2"}; !slices.Equal(w.calls, want) {
		t.Errorf("calls %v, want %v", w.calls, want)
	}
	w.calls = nil
	if changed, err := w.plan(3).Run(t.Context()); err != nil || changed {
		t.Fatalf("second run: changed %v, %v", changed, err)
	}
	if want := []string{"find 0", "find 1", "find 2"}; !slices.Equal(w.calls, want) {
		t.Errorf("calls of the second run %v, want %v", w.calls, want)
	}
}

// TestFailureOfAnyStepLeavesWhatWasThereBefore fails each step in turn, with
// its change made or not, in worlds where some things are there already.
func TestFailureOfAnyStepLeavesWhatWasThereBefore(t *testing.T) {
	const n, seed = 6, 4
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 100 {
		for failing := range n {
			var before []string
			for i := range n {
				if i != failing && r.IntN(3) == 0 {
					before = append(before, fmt.Sprint(i))
				}
			}
			w := newWorld(before...)
			w.late = r.IntN(2) == 0
			w.broken[fmt.Sprint("do ", failing)] = errBroken
			_, err := w.plan(n).Run(t.Context())
			if !errors.Is(err, errBroken) || errors.Is(err, attach.ErrIncomplete) {
				t.Fatalf("step %d: %v", failing, err)
			}
			if len(w.there) != len(before) {
				t.Fatalf("step %d of a world with %v: left %v", failing, before, w.there)
			}
			for _, x := range before {
				if !w.there[x] {
					t.Fatalf("step %d: %s was taken away, it had been there before", failing, x)
				}
			}
		}
	}
}

func TestUndoGoesBackwards(t *testing.T) {
	w := newWorld("1")
	w.broken["do 3"] = errBroken
	if _, err := w.plan(5).Run(t.Context()); !errors.Is(err, errBroken) {
		t.Fatal(err)
	}
	if want := []string{"do 0", "find 1", "do 2", "do 3", "undo 2", "undo 0"}; !slices.Equal(w.calls, want) {
		t.Errorf("calls %v, want %v", w.calls, want)
	}
}

// TestFailedUndoKeepsWhatItsStepStandsOn: a device that the guest does not
// release must not lose its export. What must not last ends all the same.
func TestFailedUndoKeepsWhatItsStepStandsOn(t *testing.T) {
	w := newWorld()
	errStuck := errors.New("stuck")
	w.broken["do 4"], w.broken["undo 2"] = errBroken, errStuck
	p := w.plan(5)
	p.Steps[1].Release, p.Steps[1].Undo = p.Steps[1].Undo, nil
	changed, err := p.Run(t.Context())
	if !changed || !errors.Is(err, errBroken) || !errors.Is(err, errStuck) || !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("changed %v, %v", changed, err)
	}
	if want := []string{"do 0", "do 1", "do 2", "do 3", "do 4", "undo 3", "undo 2", "undo 1"}; !slices.Equal(w.calls, want) {
		t.Errorf("calls %v, want %v", w.calls, want)
	}
	if len(w.there) != 2 || !w.there["0"] || !w.there["2"] {
		t.Errorf("left %v, want 0 and 2", w.there)
	}
	for _, want := range []string{"undo make 2", "stays: make 0"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not say %q: %v", want, err)
		}
	}
}

// TestInterruptionRollsBack ends the context within each step and between them.
func TestInterruptionRollsBack(t *testing.T) {
	for at := range 4 {
		for _, within := range []bool{false, true} {
			w := newWorld()
			ctx, cancel := context.WithCancel(t.Context())
			p := w.plan(5)
			do := p.Steps[at].Do
			p.Steps[at].Do = func(ctx context.Context) (bool, error) {
				changed, err := do(ctx)
				cancel()
				if within {
					err = ctx.Err()
				}
				return changed, err
			}
			if _, err := p.Run(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, attach.ErrIncomplete) {
				t.Errorf("interrupted at %d: %v", at, err)
			}
			if len(w.there) != 0 {
				t.Errorf("interrupted at %d: left %v", at, w.there)
			}
		}
	}
}

func TestInterruptionBeforeTheFirstStepDoesNothing(t *testing.T) {
	w := newWorld()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if changed, err := w.plan(2).Run(ctx); changed || !errors.Is(err, context.Canceled) || len(w.calls) != 0 {
		t.Errorf("changed %v, %v, calls %v", changed, err, w.calls)
	}
}

func TestWhatIsFinalStaysWithAllBeforeIt(t *testing.T) {
	w := newWorld()
	p := w.plan(5)
	p.Steps[2].Final = true
	w.broken["do 4"] = errBroken
	_, err := p.Run(t.Context())
	if !errors.Is(err, errBroken) || !errors.Is(err, attach.ErrIncomplete) || !strings.Contains(err.Error(), "make 2") {
		t.Errorf("error %v", err)
	}
	if want := []string{"do 0", "do 1", "do 2", "do 3", "do 4", "undo 3"}; !slices.Equal(w.calls, want) {
		t.Errorf("calls %v, want %v", w.calls, want)
	}
}

func TestFinalStepThatFailsCleanlyIsRolledBack(t *testing.T) {
	w := newWorld()
	p := w.plan(3)
	p.Steps[2].Final = true
	w.broken["do 2"] = errBroken
	if _, err := p.Run(t.Context()); !errors.Is(err, errBroken) || errors.Is(err, attach.ErrIncomplete) || len(w.there) != 0 {
		t.Errorf("error %v, left %v", err, w.there)
	}
}

// TestReleaseIsCalledWhateverHappens has a state that must end, with the step
// after it succeeding, failing, final and interrupted.
func TestReleaseIsCalledWhateverHappens(t *testing.T) {
	for _, fails := range []bool{false, true} {
		for _, final := range []bool{false, true} {
			for _, interrupted := range []bool{false, true} {
				ctx, cancel := context.WithCancel(t.Context())
				w := newWorld()
				p := w.plan(3)
				undo := p.Steps[0].Undo
				p.Steps[0].Undo, p.Steps[0].Release = nil, undo
				p.Steps[1].Final = final
				if do := p.Steps[1].Do; interrupted {
					p.Steps[1].Do = func(ctx context.Context) (bool, error) {
						cancel()
						return do(ctx)
					}
				}
				if fails {
					w.broken["do 1"] = errBroken
				}
				_, err := p.Run(ctx)
				cancel()
				if (err != nil) != (fails || interrupted) || w.there["0"] {
					t.Errorf("fails %v, final %v, interrupted %v: %v, left %v", fails, final, interrupted, err, w.there)
				}
			}
		}
	}
}

func TestFailedReleaseAfterSuccessIsAnError(t *testing.T) {
	w := newWorld()
	p := w.plan(2)
	p.Steps[0].Release = p.Steps[0].Undo
	w.broken["undo 0"] = errBroken
	if _, err := p.Run(t.Context()); !errors.Is(err, errBroken) || !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("error %v", err)
	}
	if !w.there["1"] {
		t.Error("the plan had succeeded and was taken back")
	}
}

func TestPlanIsPrinted(t *testing.T) {
	var b strings.Builder
	if err := newWorld().plan(2).Print(&b); err != nil {
		t.Fatal(err)
	}
	if want := "a world\n  1. make 0\n  2. make 1\n"; b.String() != want {
		t.Errorf("printed %q, want %q", b.String(), want)
	}
}

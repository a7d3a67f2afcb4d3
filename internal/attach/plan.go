package attach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// ErrIncomplete is for a plan that failed and could not be taken back whole.
// The text names what is left.
var ErrIncomplete = errors.New("rolled back incompletely")

// Step is one change. Its functions are called by one goroutine.
type Step struct {
	// Name says in one line what Do does.
	Name string

	// Do makes the change, or finds it made. changed says that there is, or
	// with an error may be, something to take back that was not there before.
	Do func(ctx context.Context) (changed bool, err error)

	// Undo takes the change back. What is not there any more is no error. Nil
	// for steps that only look.
	Undo func(ctx context.Context) error

	// Release ends a state that must not outlast the plan. It is called in
	// place of Undo, also when the plan has succeeded, and has
	// limits.AttachRelease.
	Release func(ctx context.Context) error

	// Final is for a change that cannot be taken back. When it is made, the
	// steps before it stay as they are too.
	Final bool
}

// mortal are changes of a machine that may end meanwhile, and take them along: then
// nothing is left to be taken back.
func mortal(ended func(ctx context.Context) bool, steps ...Step) []Step {
	for i := range steps {
		undo := steps[i].Undo
		if undo == nil {
			continue
		}
		steps[i].Undo = func(ctx context.Context) error {
			err := undo(ctx)
			if err != nil && ended(ctx) {
				return nil
			}
			return err
		}
	}
	return steps
}

// outlived are steps that take something out of a machine that may end meanwhile,
// and takes it along: then they are done.
func outlived(ended func(ctx context.Context) bool, steps ...Step) []Step {
	for i := range steps {
		do := steps[i].Do
		steps[i].Do = func(ctx context.Context) (bool, error) {
			changed, err := do(ctx)
			if err != nil && ended(ctx) {
				err = nil
			}
			return changed, err
		}
	}
	return steps
}

// Plan is a list of steps with one aim.
type Plan struct {
	// Aim says in one line what the plan is for.
	Aim string
	// Disk is the name by which the disk is found again. A step may change it.
	Disk  string
	Steps []Step

	// Repeat, if not nil, says behind an error what is to be asked for in place
	// of the same once more, or nothing.
	Repeat func() string
}

// Print writes the plan for people, a line for each step.
func (p *Plan) Print(w io.Writer) error {
	if _, err := fmt.Fprintln(w, p.Aim); err != nil {
		return err
	}
	for i := range p.Steps {
		if _, err := fmt.Fprintf(w, "%3d. %s\n", i+1, p.Steps[i].Name); err != nil {
			return err
		}
	}
	return nil
}

// Run does the steps in their order and reports whether anything was changed.
// When one fails, or ctx ends before the last is done, what the steps have
// changed is taken back in reverse order, each within limits.AttachUndo
// whatever ctx says, up to a step that cannot be: it may still use what those
// before it have made. The error has all that went wrong; it is ErrIncomplete
// too if something was left.
func (p *Plan) Run(ctx context.Context) (changed bool, err error) {
	r := run{ctx: ctx}
	for i := range p.Steps {
		if err = r.do(&p.Steps[i]); err != nil {
			break
		}
	}
	if err = r.end(err); err != nil && p.Repeat != nil {
		if text := p.Repeat(); text != "" {
			err = errors.Join(err, errors.New(text))
		}
	}
	return r.changed, err
}

// run is a plan on its way.
type run struct {
	ctx     context.Context
	made    []*Step // in the order of their making
	changed bool
	final   *Step // the last that was made
}

func (r *run) do(s *Step) error {
	if err := r.ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	changed, err := s.Do(r.ctx)
	if changed {
		r.changed = true
		r.made = append(r.made, s)
		if s.Final {
			r.final = s
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}

// end takes back what has to be, after a success, err being nil, what has a
// Release.
func (r *run) end(err error) error {
	var left []error
	undo, stuck := err != nil, false
	for _, s := range slices.Backward(r.made) {
		undo = undo && s != r.final
		e := r.takeBack(s, undo && !stuck)
		switch {
		case e != nil:
			left = append(left, fmt.Errorf("undo %s: %w", s.Name, e))
			stuck = stuck || s.Release == nil
		case undo && stuck && s.Undo != nil:
			left = append(left, fmt.Errorf("so it stays: %s", s.Name))
		}
	}
	if err != nil && r.final != nil {
		left = append(left, fmt.Errorf("cannot be undone: %s", r.final.Name))
	}
	if len(left) == 0 {
		return err
	}
	return errors.Join(append([]error{err, ErrIncomplete}, left...)...)
}

// takeBack calls what the step has for it.
func (r *run) takeBack(s *Step, undo bool) error {
	f, allowed := s.Release, limits.AttachRelease
	if f == nil && undo {
		f, allowed = s.Undo, limits.AttachUndo
	}
	if f == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), allowed)
	defer cancel()
	return f(ctx)
}

package attach

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// ErrNotFrozen is for a guest whose agent has frozen no file system.
var ErrNotFrozen = errors.New("the guest has frozen no file system")

// Snapshot plans to put an overlay at the path above the image of a disk. The
// guest's file systems are frozen meanwhile if an agent answers; must makes it
// an error that none are. Those that somebody else has frozen stay so. export names the export of a disk that Attach has
// not made.
func (m *Machine) Snapshot(ctx context.Context, id, export, overlay string, must bool) (*Plan, error) {
	x, err := m.exportOf(ctx, id, export)
	if err != nil {
		return nil, err
	}
	return m.snapshot(x, id, overlay, must)
}

// snapshot is that of a disk which is from the export.
func (m *Machine) snapshot(x api.Export, id, overlay string, must bool) (*Plan, error) {
	if must && m.Agent == nil {
		return nil, fmt.Errorf("%w: none is known", qmp.ErrNoAgent)
	}
	plan := &Plan{Aim: fmt.Sprintf("keep %q as it is and have %s write to %q", x.Image, id, overlay), Disk: id}
	if m.Agent != nil {
		plan.Steps = append(plan.Steps, m.freezeStep(must))
	} else {
		m.note("no guest agent is known: the image is what a crash would leave")
	}
	plan.Steps = append(plan.Steps, Step{
		Name:  fmt.Sprintf("put overlay %q above the image of export %q", overlay, x.Name),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			ctx, cancel := steady(ctx)
			defer cancel()
			_, err := m.Server.Snapshot(ctx, x.Name, api.Snapshot{Overlay: overlay})
			return err == nil, err
		},
	})
	return plan, nil
}

// freezeStep lasts until the plan ends.
func (m *Machine) freezeStep(must bool) Step {
	return Step{
		Name: "freeze the guest's file systems until the overlay is there",
		Do: func(ctx context.Context) (bool, error) {
			changed, err := m.freeze(ctx)
			if err != nil && !must && !errors.Is(err, qmp.ErrUnanswered) && ctx.Err() == nil {
				m.note("the image is what a crash would leave: %v", err)
				err = nil
			}
			return changed, err
		},
		Release: m.thaw,
	}
}

// freeze has the guest freeze its file systems, unless somebody else has: they
// would not be thawed by us. changed says that they are, or with an error may be,
// frozen by us. What an agent does not offer it has not done, and one of a
// frozen guest offers no freezing.
func (m *Machine) freeze(ctx context.Context) (changed bool, err error) {
	frozen, err := qmp.GuestFrozen(ctx, m.Agent)
	switch {
	case err != nil && !qmp.HasClass(err, qmp.ClassCommandNotFound):
		return false, err
	case frozen:
		m.note("the guest's file systems are frozen already, by somebody else: they stay so")
		return false, nil
	}
	n, err := qmp.FreezeGuest(ctx, m.Agent)
	switch {
	case err != nil: // a guest that refuses may have frozen a part
		return !errors.Is(err, qmp.ErrNoAgent) && !qmp.HasClass(err, qmp.ClassCommandNotFound), err
	case n == 0:
		return true, ErrNotFrozen
	}
	m.note("%d file systems were frozen", n)
	return true, nil
}

// thaw lets the guest write again. An agent that is still freezing answers
// nothing: it is asked until it does.
func (m *Machine) thaw(ctx context.Context) error {
	for {
		_, err := qmp.ThawGuest(ctx, m.Agent)
		switch {
		case qmp.HasClass(err, qmp.ClassCommandNotFound):
			return nil // nor can it have frozen anything
		case !errors.Is(err, qmp.ErrNoAgent) && !errors.Is(err, qmp.ErrUnanswered), errors.Is(err, qmp.ErrLost), ctx.Err() != nil:
			return err
		}
		pause(ctx, limits.AttachPoll)
	}
}

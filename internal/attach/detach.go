package attach

import (
	"context"
	"fmt"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// Detach plans to unplug a disk by the name that Resolve found, and to remove
// its export if Attach has made it. A guest that has the disk mounted is
// ErrMounted, unless force is set, and an export that is paused ErrPaused. From
// the moment that the guest releases the disk nothing is taken back: what fails
// then is done by a second Detach. A machine that ends meanwhile, which there is no
// second for, has released it.
func (m *Machine) Detach(ctx context.Context, id string, force bool) (*Plan, error) {
	list, err := nodes(ctx, m.Monitor, id)
	if err != nil {
		return nil, err
	}
	own := slices.ContainsFunc(list, func(n qmp.Node) bool { return isOwn(n.Name) }) || len(list) == 0 && m.serves(ctx, id)
	if own && m.Server == nil {
		return nil, fmt.Errorf("%w: the control socket is needed to remove the export", ErrNoServer)
	}
	plan := &Plan{Aim: fmt.Sprintf("detach %s from %q", id, m.Name), Disk: id}
	if !force {
		plan.Steps = append(plan.Steps, Step{
			Name: "see that the guest does not use the disk, if an agent answers",
			Do:   func(ctx context.Context) (bool, error) { return false, m.unused(ctx, id) },
		})
	}
	plan.Steps = append(plan.Steps, m.unplugStep(id), m.nodesStep(id))
	if object, _, err := m.heldCreds(ctx, id); err != nil {
		return nil, err
	} else if object != "" {
		plan.Steps = append(plan.Steps, m.forgetStep(id))
	}
	outlived(m.Monitor.Ended, plan.Steps...)
	if own {
		plan.Steps = append(plan.Steps, m.removeStep(ExportName(m.Name, id), force))
	}
	return plan, nil
}

func (m *Machine) unplugStep(id string) Step {
	return Step{
		Name:  fmt.Sprintf("have the guest release device %s", id),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			d, err := find(ctx, m.Monitor, id)
			if err != nil || d == nil {
				return false, err
			}
			if d.Inserted == nil || !isNodeOf(d.Inserted.Name, id) {
				return false, fmt.Errorf("%w: device %q has a disk that was not attached by this program", ErrDiffers, id)
			}
			if err := m.noPause(ctx, id); err != nil {
				return false, err
			}
			err = unplug(ctx, m.Monitor, id)
			return err == nil, err
		},
	}
}

// nodesStep deletes what a disk has in a machine beside its device.
func (m *Machine) nodesStep(id string) Step {
	return Step{
		Name:  fmt.Sprintf("delete the nodes of %s", id),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			if err := m.noPause(ctx, id); err != nil {
				return false, err
			}
			return deleteNodes(ctx, m.Monitor, func(node string) bool { return isNodeOf(node, id) })
		},
	}
}

// deleteNodes deletes the nodes of which is says so, for a disk that no device uses.
func deleteNodes(ctx context.Context, x qmp.Executor, is func(node string) bool) (changed bool, err error) {
	ctx, cancel := steady(ctx)
	defer cancel()
	list, err := qmp.QueryNamedBlockNodes(ctx, x)
	if err != nil {
		return false, err
	}
	list = slices.DeleteFunc(list, func(n qmp.Node) bool { return !is(n.Name) })
	// A raw node holds the client whose name begins with its own.
	slices.SortFunc(list, func(a, b qmp.Node) int { return len(a.Name) - len(b.Name) })
	for _, n := range list {
		if err := deleteNode(ctx, x, n.Name); err != nil {
			return changed, err
		}
		changed = true
	}
	return changed, nil
}

func (m *Machine) removeStep(name string, force bool) Step {
	return Step{
		Name:  fmt.Sprintf("remove export %q", name),
		Final: true,
		Do: func(ctx context.Context) (bool, error) {
			x, err := m.Server.Export(ctx, name)
			if hasCode(err, api.CodeNotFound) {
				m.note("there is no export %q to remove: the daemon was started again, or the machine had another name when the disk was attached", name)
				return false, nil
			}
			if err == nil {
				err = removeExport(ctx, m.Server, name, force)
			}
			if overlay := above(x); overlay != "" && err == nil {
				m.note("the disk was in %q, which a snapshot put above its image: attach that the next time, for writing to the image below spoils it", overlay)
			}
			return err == nil, err
		},
	}
}

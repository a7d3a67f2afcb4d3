package daemon

import (
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// errNoState is for a snapshot that would be forgotten.
var errNoState = errors.New("the configuration file names the image of this export, and there is no folder (control.state) to remember the overlay in: after a restart the image would be served without it")

// placed is an export of the configuration with the overlay that a snapshot has
// put above its image.
func (d *daemon) placed(x config.Export) (config.Export, error) {
	state := d.conf.Load().Control.State
	if state == "" {
		return x, nil
	}
	i, err := config.ReadInstead(state, x.Name)
	if err != nil || i == nil {
		return x, err
	}
	return i.Apply(x)
}

// mayRemember tells whether an overlay of the export can be remembered.
func (d *daemon) mayRemember(k *disk) error {
	if k.origin == fromConfig && d.conf.Load().Control.State == "" {
		return errNoState
	}
	return nil
}

// remember makes it durable that the export serves another image from now on,
// and returns what takes that back. It comes before the first write to the
// image: were it not known after a restart, the guest would lose what it wrote.
func (d *daemon) remember(k *disk, cfg config.Export) (undo func() error, err error) {
	state := d.conf.Load().Control.State
	switch k.origin {
	case fromState:
		before := k.cfg
		return func() error { return config.WriteExport(state, before) }, config.WriteExport(state, cfg)
	case fromConfig:
		before, err := config.ReadInstead(state, cfg.Name)
		if err != nil {
			return nil, err
		}
		undo = func() error {
			if before != nil {
				return config.WriteInstead(state, *before)
			}
			return config.RemoveInstead(state, cfg.Name)
		}
		of := config.ImageOf(exportOf(d.conf.Load(), cfg.Name))
		return undo, config.WriteInstead(state, config.Instead{Of: of, Serve: config.ImageOf(cfg)})
	}
	return func() error { return nil }, nil
}

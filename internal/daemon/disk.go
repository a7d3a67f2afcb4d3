package daemon

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/raw"
	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/export"
)

// specOf is what the registry has to know of an export.
func (d *daemon) specOf(x *config.Export) export.Spec {
	return export.Spec{
		Name:    x.Name,
		NeedTLS: x.RequireTLS,
		Settings: export.Settings{
			Description: x.Description,
			ReadOnly:    x.ReadOnly,
			Default:     x.Default,
			Connections: x.Connections,
		},
	}
}

// openDisk opens the image of an export.
func (d *daemon) openDisk(ctx context.Context, x *config.Export) (backing.Device, error) {
	policy, err := open.ParsePolicy(x.Backing, x.BackingFiles, x.DataFiles)
	if err != nil {
		return nil, err
	}
	return open.Open(ctx, open.Spec{
		Path:     x.Image,
		Format:   x.Format,
		ReadOnly: x.ReadOnly,
		Cache:    x.Cache,
		Lock:     raw.LockMode(x.Lock),
		Backing:  policy,
		Snapshot: x.Snapshot,
		Lenient:  x.Lenient,
		Discard:  x.Discard,
		Engine:   d.engine,
		Buffers:  d.buffers,
		Log:      d.logs.For("backing"),
	})
}

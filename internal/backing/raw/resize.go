package raw

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

var _ backing.Resizer = (*Device)(nil)

// Resize makes the disk larger: a file is extended where it is not large enough
// already, of a block device as much is shown as it has by now.
func (d *Device) Resize(ctx context.Context, size int64) error {
	if err := d.writable(); err != nil {
		return err
	}
	end, err := d.End()
	if err != nil {
		return err
	}
	old := d.size.Load()
	var why error
	switch {
	case size < old:
		why = errors.New("a disk cannot shrink")
	case size > end && d.geo.block:
		why = fmt.Errorf("the block device has %d bytes, it must be made larger first", end)
	}
	if why != nil {
		return &backing.Error{Op: "resize", Path: d.opt.Path, Off: -1, Kind: backing.ErrNotSupported, Err: why}
	}
	if size > end {
		if err := d.Truncate(size); err != nil {
			return err
		}
		if err := d.Flush(ctx); err != nil {
			return err
		}
	}
	d.grown(size)
	return nil
}

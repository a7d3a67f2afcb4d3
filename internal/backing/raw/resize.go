package raw

import (
	"context"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

var _ backing.Resizer = (*Device)(nil)

// Resize extends the file. A file or block device that somebody else made
// larger has its size already: it is waited for until the file tells it, or what
// the other made would be cut off.
func (d *Device) Resize(ctx context.Context, size int64) error {
	if err := d.writable(); err != nil {
		return err
	}
	if err := d.adopt(); err != nil {
		return d.failed("resize", -1, 0, err)
	}
	end := d.size.Load()
	var why error
	switch {
	case size < end:
		why = fmt.Errorf("the disk has %d bytes and cannot shrink", end)
	case size > end && d.geo.block:
		why = fmt.Errorf("the block device has %d bytes, it must be made larger first", end)
	}
	if why != nil {
		return &backing.Error{Op: "resize", Path: d.opt.Path, Off: -1, Kind: backing.ErrNotSupported, Err: why}
	}
	if size == end {
		return nil
	}
	if err := d.Truncate(size); err != nil {
		return err
	}
	return d.Flush(ctx)
}

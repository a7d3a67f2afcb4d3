package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
)

// stopWrites has the disk take no more writes, for why, until it is opened anew.
// It tells whether it was the first to do so.
func (d *disk) stopWrites(why *backing.Error) bool {
	if !d.commits.lost.CompareAndSwap(nil, why) {
		return false
	}
	if d.poisoned != nil {
		d.poisoned(why)
	}
	return true
}

// writable is why the disk takes no more writes, or nil.
func (d *disk) writable() error {
	if why := d.commits.lost.Load(); why != nil {
		return why
	}
	return nil
}

// condemn is for a mapping in the file that cannot be: it was sound when the disk
// was opened, so something else has written to the image. Whatever the refcounts
// say now, a write could destroy more. The only one that follows marks the image as
// corrupt (section "Header", incompatible_features, bit 1).
func (d *disk) condemn(why error) {
	e := &backing.Error{Op: "map", Path: d.path, Off: -1, Kind: backing.ErrIO, Err: fmt.Errorf("the image was damaged after it was opened, and takes no more writes: %w", why)}
	if !d.stopWrites(e) {
		return
	}
	d.log.Error("image was damaged after it was opened, it takes no more writes until it is repaired", "path", d.path, "error", why)
	d.marking.Go(func() {
		d.commits.one.Lock()
		defer d.commits.one.Unlock()
		if err := d.markCorrupt(context.Background()); err != nil {
			d.log.Error("image could not be marked as corrupt", "path", d.path, "error", err)
		}
	})
}

// markCorrupt sets the mark in the header, if the file still has one of ours:
// version 2 has no place for it. With commits.one.
func (d *disk) markCorrupt(ctx context.Context) error {
	if d.header.Version < 3 {
		return nil
	}
	var p [format.OffIncompat + 8]byte
	if _, err := d.st.ReadAt(ctx, p[:], 0); err != nil {
		return err
	}
	want := binary.BigEndian.AppendUint32(nil, format.Magic)
	want = binary.BigEndian.AppendUint32(want, d.header.Version)
	if !bytes.HasPrefix(p[:], want) {
		return format.Corrupt("the file does not begin with its header any more")
	}
	mark := binary.BigEndian.Uint64(p[format.OffIncompat:]) | format.IncompatCorrupt
	if err := d.st.WriteAt(ctx, binary.BigEndian.AppendUint64(nil, mark), format.OffIncompat, false); err != nil {
		return err
	}
	return d.st.Sync(ctx)
}

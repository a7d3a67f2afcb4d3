package copier

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// NBD is an export over one or more connections.
type NBD struct {
	conns    []*client.Client
	requests int
	next     atomic.Uint32 // whose turn it is
}

// Use is how an export is to be used.
type Use struct {
	Connections int  // at most, and 1 where several cannot share the export
	All         bool // fail where the server takes fewer
	Requests    int  // meant to be in flight on each
}

// OpenNBD connects as often as u says. CanMultiConn does not tell how many
// clients a server has room for: this is found out by asking.
func OpenNBD(ctx context.Context, connect func(context.Context) (*client.Client, error), u Use) (*NBD, error) {
	first, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	d := &NBD{conns: []*client.Client{first}, requests: u.Requests}
	e := first.Export()
	if !e.Has(wire.CanMultiConn) {
		return d, nil
	}
	for len(d.conns) < u.Connections {
		c, err := connect(ctx)
		if err != nil && !u.All && ctx.Err() == nil {
			break
		}
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("connection %d of %d: %w", len(d.conns)+1, u.Connections, err)
		}
		d.conns = append(d.conns, c)
		if o := c.Export(); o.Size != e.Size || o.Flags != e.Flags {
			d.Close()
			return nil, errors.New("the export changed between two connections")
		}
	}
	return d, nil
}

func (d *NBD) pick() *client.Client {
	return d.conns[d.next.Add(1)%uint32(len(d.conns))]
}

func (d *NBD) export() client.Export { return d.conns[0].Export() }

// ReadOnly reports whether the export cannot be written to.
func (d *NBD) ReadOnly() bool {
	e := d.export()
	return e.Has(wire.ReadOnly)
}

// Connections is how many there are.
func (d *NBD) Connections() int { return len(d.conns) }

// Size implements Disk.
func (d *NBD) Size() int64 { return d.export().Size }

// Shape implements Disk.
func (d *NBD) Shape() Shape {
	e := d.export()
	align := max(int64(e.Blocks.Min), 1)
	return Shape{Align: align, MaxIO: int64(e.MaxPayload()) &^ (align - 1), Requests: d.requests * len(d.conns)}
}

// ReadAt implements Disk.
func (d *NBD) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.pick().ReadAt(ctx, p, off)
}

// WriteAt implements Disk.
func (d *NBD) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.pick().WriteAt(ctx, p, off, 0)
}

// Zero implements Disk.
func (d *NBD) Zero(ctx context.Context, off, n int64, allocate bool) error {
	var f wire.CmdFlags
	if allocate {
		f = wire.FlagNoHole
	}
	err := d.pick().Zero(ctx, off, n, f)
	if errors.Is(err, wire.ENOTSUP) {
		return writeZeroes(ctx, d, off, n)
	}
	return err
}

// Flush implements Disk: CanMultiConn makes one flush count for all
// connections. A server that offers none has nothing to flush.
func (d *NBD) Flush(ctx context.Context) error {
	if e := d.export(); !e.Has(wire.SendFlush) {
		return nil
	}
	return d.conns[0].Flush(ctx)
}

// Extents implements Disk. Without the context, or when the server fails to
// answer, all is data.
func (d *NBD) Extents(ctx context.Context, yield func(Extent) bool) error {
	size := d.Size()
	if size == 0 {
		return nil
	}
	if !slices.Contains(d.export().Contexts, wire.ContextAllocation) {
		yield(Extent{Len: size})
		return nil
	}
	next, more := int64(0), true
	err := d.conns[0].Map(ctx, wire.ContextAllocation, 0, size, func(e client.Extent) bool {
		next = e.Off + e.Len
		more = yield(Extent{Off: e.Off, Len: e.Len, Zero: e.Flags&wire.StateZero != 0})
		return more
	})
	var refused *client.Error
	if errors.As(err, &refused) && more {
		// Knowing less costs time, not bytes.
		yield(Extent{Off: next, Len: size - next})
		return nil
	}
	return err
}

// Close implements Disk. It does not wait: who needs the bytes stable has
// flushed.
func (d *NBD) Close() error {
	for _, c := range d.conns {
		c.Close()
	}
	return nil
}

// Leave says goodbye on all connections and closes them.
func (d *NBD) Leave(ctx context.Context) error {
	var errs []error
	for _, c := range d.conns {
		errs = append(errs, c.Disconnect(ctx))
	}
	return errors.Join(errs...)
}

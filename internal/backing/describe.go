package backing

import "context"

// Status is a run of bytes with what one description says of it.
type Status struct {
	Len   int64 // bytes
	Value uint32
}

// Describer is a Device that says more of its bytes than Extents does: which
// layer of a chain they come from, which of them a bitmap has marked. Each
// description has a name, which is that of its NBD metadata context.
type Describer interface {
	// Descriptions names them; the list does not change while the device is
	// open.
	Descriptions() []string

	// Describe yields the statuses of [off, off+n) in order, the first at
	// off, none of length 0, the last clipped to the range, until yield
	// returns false. It honours ReqOne and Partial. A name that Descriptions
	// does not have is ErrInvalid.
	Describe(ctx context.Context, name string, off, n int64, f Flags, yield func(Status) bool) error
}

// Descriptions are those of the next device, if it has any.
func (p Passthrough) Descriptions() []string {
	if d, ok := p.Next.(Describer); ok {
		return d.Descriptions()
	}
	return nil
}

// Describe forwards to the next device.
func (p Passthrough) Describe(ctx context.Context, name string, off, n int64, f Flags, yield func(Status) bool) error {
	if d, ok := p.Next.(Describer); ok {
		return d.Describe(ctx, name, off, n, f, yield)
	}
	return ErrInvalid
}

// Descriptions are those of the device.
func (c *Checked) Descriptions() []string { return Passthrough{Next: c.dev}.Descriptions() }

// Describe checks the range as Extents does.
func (c *Checked) Describe(ctx context.Context, name string, off, n int64, f Flags, yield func(Status) bool) error {
	if err := c.check(off, n, 0, ""); err != nil {
		return err
	}
	if err := c.checkFlags(f, ReqOne|Partial); err != nil {
		return err
	}
	return Passthrough{Next: c.dev}.Describe(ctx, name, off, n, f, yield)
}

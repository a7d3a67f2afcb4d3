package backing

import (
	"context"
	"errors"
)

// Resizer is a Device whose disk can grow while it is in use. What is new reads
// as zeroes. The new size is durable, and in Info, when Resize returns; a
// failure changes nothing that a guest sees. What the disk cannot do, such as
// to shrink, is ErrNotSupported.
type Resizer interface {
	Resize(ctx context.Context, size int64) error
}

// Resize forwards to the next device, if that can be resized.
func (p Passthrough) Resize(ctx context.Context, size int64) error {
	if r, ok := p.Next.(Resizer); ok {
		return r.Resize(ctx, size)
	}
	return &Error{Op: "resize", Off: -1, Kind: ErrNotSupported, Err: errors.New("a disk of this format has a fixed size")}
}

package client

import (
	"context"
	"fmt"
	"math"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Extent is a range of the export with one state in one metadata context.
type Extent struct {
	Off, Len int64
	// Flags are the state, whose meaning is the context's.
	Flags uint64
}

// ReadAt reads len(p) bytes, at most MaxPayload. p must not be touched until
// it returns, and holds nothing of use when it returns an error.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.payload(ctx, wire.CmdRead, p, off, 0)
}

// WriteAt writes p, at most MaxPayload bytes. p is not kept. Of the flags,
// FlagFUA makes it return only after the bytes are stable.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, f wire.CmdFlags) error {
	return c.payload(ctx, wire.CmdWrite, p, off, f)
}

// Zero makes n bytes read as zeroes. FlagNoHole keeps them allocated;
// FlagFastZero fails with ENOTSUP where zeroing is no faster than writing.
// Ranges above limits.MaxEffect are zeroed in several requests.
func (c *Client) Zero(ctx context.Context, off, n int64, f wire.CmdFlags) error {
	return c.effect(ctx, wire.CmdZero, off, n, f)
}

// Trim says that n bytes are not needed any more; what they read as
// afterwards is undefined.
func (c *Client) Trim(ctx context.Context, off, n int64, f wire.CmdFlags) error {
	return c.effect(ctx, wire.CmdTrim, off, n, f)
}

// Cache asks the server to have n bytes at hand.
func (c *Client) Cache(ctx context.Context, off, n int64) error {
	return c.effect(ctx, wire.CmdCache, off, n, 0)
}

// Flush makes every write stable that has returned before it: on this
// connection, and on all connections to the export when it has CanMultiConn.
func (c *Client) Flush(ctx context.Context) error {
	if err := c.allowed(wire.CmdFlush, 0, 0, 0); err != nil {
		return err
	}
	return c.do(ctx, &call{req: wire.Request{Cmd: wire.CmdFlush}}, nil)
}

// Extents asks for the states from off on and returns one list per selected
// context, in the order of Export.Contexts. A list is never empty and lies
// within the range without gaps; it may end before the range does. With
// FlagReqOne it has one element. A range above limits.MaxEffect is cut short
// unless the headers are extended.
func (c *Client) Extents(ctx context.Context, off, n int64, f wire.CmdFlags) ([][]Extent, error) {
	if err := c.allowed(wire.CmdExtents, off, n, f); err != nil || n == 0 {
		return make([][]Extent, len(c.ids)), err
	}
	if c.replies != Extended {
		n = min(n, limits.MaxEffect)
	}
	k := &call{req: wire.Request{Flags: f, Cmd: wire.CmdExtents, Off: uint64(off), Len: uint64(n)}}
	k.lists = make([][]Extent, len(c.ids))
	if err := c.do(ctx, k, nil); err != nil {
		return nil, err
	}
	return k.lists, nil
}

// Map walks the states of one selected context over the whole range,
// neighbours of equal state joined, until yield returns false.
func (c *Client) Map(ctx context.Context, context string, off, n int64, yield func(Extent) bool) error {
	index := -1
	for i, name := range c.export.Contexts {
		if name == context {
			index = i
		}
	}
	if index < 0 {
		return fmt.Errorf("context %q is not selected", context)
	}
	last := Extent{Off: off}
	for end := off + n; off < end; {
		lists, err := c.Extents(ctx, off, end-off, 0)
		if err != nil {
			return err
		}
		for _, e := range lists[index] {
			off = e.Off + e.Len
			if last.Len != 0 && last.Flags != e.Flags {
				if !yield(last) {
					return nil
				}
				last = Extent{Off: e.Off}
			}
			last.Len, last.Flags = last.Len+e.Len, e.Flags
		}
	}
	if last.Len != 0 {
		yield(last)
	}
	return nil
}

// payload is a read or a write.
func (c *Client) payload(ctx context.Context, cmd wire.Cmd, p []byte, off int64, f wire.CmdFlags) error {
	if err := c.allowed(cmd, off, int64(len(p)), f); err != nil || len(p) == 0 {
		return err
	}
	if len(p) > c.export.MaxPayload() {
		return &Error{Cmd: cmd, Off: off, Len: int64(len(p)), Errno: wire.EOVERFLOW,
			Text: fmt.Sprintf("the server takes %d bytes at once", c.export.MaxPayload())}
	}
	k := &call{req: wire.Request{Flags: f, Cmd: cmd, Off: uint64(off), Len: uint64(len(p))}}
	if cmd == wire.CmdRead {
		k.buf = p
		return c.do(ctx, k, nil)
	}
	if c.replies == Extended {
		k.req.Flags |= wire.FlagPayloadLen
	}
	return c.do(ctx, k, p)
}

// effect is a request without payload in pieces that every server takes.
func (c *Client) effect(ctx context.Context, cmd wire.Cmd, off, n int64, f wire.CmdFlags) error {
	if err := c.allowed(cmd, off, n, f); err != nil {
		return err
	}
	for n > 0 {
		step := min(n, limits.MaxEffect)
		k := &call{req: wire.Request{Flags: f, Cmd: cmd, Off: uint64(off), Len: uint64(step)}}
		if err := c.do(ctx, k, nil); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// needs are the flags that an export must have for a command.
var needs = map[wire.Cmd]wire.ExportFlags{
	wire.CmdFlush: wire.SendFlush,
	wire.CmdTrim:  wire.SendTrim,
	wire.CmdZero:  wire.SendZero,
	wire.CmdCache: wire.SendCache,
}

// allowed refuses what the export cannot do or what lies outside of it: a
// server may hang up on such a request.
func (c *Client) allowed(cmd wire.Cmd, off, n int64, f wire.CmdFlags) error {
	refuse := func(e wire.Errno, why string) error {
		return &Error{Cmd: cmd, Off: off, Len: n, Errno: e, Text: why}
	}
	size := c.export.Size
	switch {
	case off < 0 || n < 0 || off > size || n > size-off:
		return refuse(wire.EINVAL, "beyond the end of the export")
	case !c.export.Has(needs[cmd]),
		f&wire.FlagFUA != 0 && !c.export.Has(wire.SendFUA),
		f&wire.FlagFastZero != 0 && !c.export.Has(wire.SendFastZero):
		return refuse(wire.ENOTSUP, "the export does not offer it")
	case cmd == wire.CmdExtents && len(c.ids) == 0:
		return refuse(wire.ENOTSUP, "no metadata context is selected")
	}
	if b := int64(c.export.Blocks.Min); b > 1 && (off%b != 0 || n%b != 0) {
		return refuse(wire.EINVAL, fmt.Sprintf("not aligned to %d bytes", b))
	}
	switch cmd {
	case wire.CmdWrite, wire.CmdZero, wire.CmdTrim:
		if c.export.Has(wire.ReadOnly) {
			return refuse(wire.EPERM, "the export is read-only")
		}
	}
	return nil
}

var _ [math.MaxUint32 - limits.MaxEffect]struct{} // fits a compact request

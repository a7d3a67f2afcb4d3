package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2"
)

func newImageMap() *cobra.Command {
	f := &imageFlags{}
	chain := &chainFlags{}
	c := &cobra.Command{
		Use:   "map FILE",
		Short: "Show where the bytes of a disk are",
		Long: `Show which file has the bytes of a disk, and where in it, for an image and those
that it stands on. Files that images name are opened only as --backing allows.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := errors.Join(f.check(), chain.check(c, f.format)); err != nil {
				return err
			}
			i, done, err := chain.openChain(c.Context(), args[0], f.format)
			if err != nil {
				return err
			}
			w := bufio.NewWriter(c.OutOrStdout())
			m := &imageMap{image: i, w: w, json: f.json, list: jsonArray{w: w}}
			return errors.Join(m.run(c.Context()), i.Close(), done())
		},
	}
	f.add(c)
	chain.add(c)
	return c
}

// imageRange is one line of a map. It has the names of qemu-img map; Filename
// and Compressed are what later versions than 7.2 say too.
type imageRange struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`   // of the image that says so, 0 the top
	Present    bool   `json:"present"` // an image has it
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"` // in Filename
	Filename   string `json:"filename,omitempty"`
}

// continues reports whether b goes on where a ends.
func (b *imageRange) continues(a *imageRange) bool {
	c := *a
	c.Start, c.Length, c.Offset = b.Start, b.Length, b.Offset
	if c != *b || (a.Offset == nil) != (b.Offset == nil) {
		return false
	}
	return a.Offset == nil || *a.Offset+a.Length == *b.Offset
}

// imageMap writes the map of an image while it walks its layers, so that no
// image makes it large.
type imageMap struct {
	image *open.Image
	w     *bufio.Writer
	json  bool

	list    jsonArray  // with json
	pending imageRange // no Length: none
}

func (m *imageMap) run(ctx context.Context) error {
	top := m.image.Top
	if err := m.begin(); err != nil {
		return err
	}
	if err := m.layer(ctx, top, 0, 0, top.Size()); err != nil {
		return errors.Join(m.flush(), m.w.Flush(), err)
	}
	return errors.Join(m.end(), m.w.Flush())
}

// layer maps a range that lies in a layer.
func (m *imageMap) layer(ctx context.Context, l qcow2.Layer, depth int, off, n int64) error {
	var inner error
	err := l.Spans(ctx, off, n, func(s qcow2.Span) bool {
		if inner = ctx.Err(); inner == nil {
			inner = m.span(ctx, l, depth, off, s)
		}
		off += s.Len
		return inner == nil
	})
	return errors.Join(err, inner)
}

func (m *imageMap) span(ctx context.Context, l qcow2.Layer, depth int, off int64, s qcow2.Span) error {
	e := imageRange{Start: off, Length: s.Len, Depth: depth, Present: true}
	switch s.Kind {
	case qcow2.Absent:
		return m.below(ctx, l, depth, off, s.Len)
	case qcow2.Zero:
		e.Zero = true
		if _, image := l.(qcow2.Clustered); !image {
			e.Offset = &off // a hole of a raw file has a place in it
		} else if s.Store != nil {
			e.Offset = &s.Off
		}
	case qcow2.Data:
		return m.data(ctx, l, e, s)
	case qcow2.Compressed:
		e.Data, e.Compressed = true, true
	default:
		return errors.Join(fmt.Errorf("offset %d cannot be mapped", off), s.Err)
	}
	if e.Offset != nil {
		e.Filename = m.image.Files[depth].Data
	}
	return m.add(e)
}

// data maps what has a place in a file, apart where the file has a hole there:
// clusters that were only preallocated.
func (m *imageMap) data(ctx context.Context, l qcow2.Layer, e imageRange, s qcow2.Span) error {
	e.Data, e.Filename = true, m.image.Files[e.Depth].Data
	within := int64(0)
	if _, image := l.(qcow2.Clustered); image {
		end, err := s.Store.Size()
		if err != nil {
			return err
		}
		within = max(0, min(s.Len, end-s.Off))
	}
	done := int64(0)
	part := func(n int64, zero bool) error {
		at, x := s.Off+done, e
		x.Start, x.Length, x.Offset, x.Zero = e.Start+done, n, &at, zero
		done += n
		return m.add(x)
	}
	if within > 0 {
		var inner error
		err := s.Store.Extents(ctx, s.Off, within, func(x backing.Extent) bool {
			inner = part(x.Len, x.Hole && x.Zero)
			return inner == nil
		})
		if err = errors.Join(inner, err); err != nil {
			return err
		}
	}
	if done == s.Len {
		return nil
	}
	return part(s.Len-done, false)
}

// below maps what a layer does not have. What lies behind the end of the next
// one is zeroes.
func (m *imageMap) below(ctx context.Context, l qcow2.Layer, depth int, off, n int64) error {
	if next := l.Below(); next != nil {
		if have := min(n, next.Size()-off); have > 0 {
			if err := m.layer(ctx, next, depth+1, off, have); err != nil {
				return err
			}
			off, n = off+have, n-have
		}
	}
	if n == 0 {
		return nil
	}
	return m.add(imageRange{Start: off, Length: n, Depth: depth, Zero: true})
}

func (m *imageMap) add(e imageRange) error {
	if m.pending.Length > 0 && e.continues(&m.pending) {
		m.pending.Length += e.Length
		return nil
	}
	err := m.flush()
	m.pending = e
	return err
}

// flush writes what is pending.
func (m *imageMap) flush() error {
	e := &m.pending
	switch {
	case e.Length == 0:
		return nil
	case m.json:
		return m.list.add(e)
	case !e.Data || e.Zero:
		return nil
	}
	at, file := "compressed", m.image.Files[e.Depth].Path
	if e.Offset != nil {
		at, file = hex(*e.Offset), e.Filename
	}
	return m.row(hex(e.Start), hex(e.Length), at, printable(file))
}

func (m *imageMap) begin() error {
	if m.json {
		return nil
	}
	return m.row("Offset", "Length", "Mapped to", "File")
}

func (m *imageMap) end() error {
	err := m.flush()
	if err == nil && m.json {
		err = m.list.end()
	}
	return err
}

func (m *imageMap) row(off, n, at, file string) error {
	_, err := fmt.Fprintf(m.w, "%-16s%-16s%-16s%s\n", off, n, at, file)
	return err
}

// hex is a number as qemu-img map writes it.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}

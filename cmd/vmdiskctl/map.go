package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// mapEntry is one line of a map, or of its totals.
type mapEntry struct {
	Off         int64  `json:"offset"`
	Len         int64  `json:"length"`
	Type        uint64 `json:"type"`
	Description string `json:"description,omitempty"`
}

// mapTotal is one line of the totals of a map.
type mapTotal struct {
	Size        int64   `json:"size"`
	Percent     float64 `json:"percent"`
	Type        uint64  `json:"type"`
	Description string  `json:"description,omitempty"`
}

func (f *infoFlags) printMap(ctx context.Context, s *server, w io.Writer) error {
	c, err := s.open(ctx, f.context)
	if err != nil {
		return err
	}
	defer c.Close()
	if !slices.Contains(c.Export().Contexts, f.context) {
		return notOffered(ctx, s, f.context)
	}
	b := bufio.NewWriter(w)
	out := f.mapOut(b)
	if size := c.Export().Size; size > 0 {
		var bad error
		err = c.Map(ctx, f.context, 0, size, func(e client.Extent) bool {
			bad = out.add(mapEntry{e.Off, e.Len, e.Flags, state(f.context, e.Flags)})
			return bad == nil
		})
		err = cmp.Or(err, bad)
	}
	if err == nil {
		err = out.end()
	}
	if err = errors.Join(err, b.Flush()); err != nil {
		return err
	}
	return c.Disconnect(ctx)
}

// notOffered says which contexts there are in place of one that is not.
func notOffered(ctx context.Context, s *server, name string) error {
	session, err := s.negotiate(ctx)
	if err != nil {
		return err
	}
	defer session.Close()
	list, err := session.ListContexts(ctx, s.Export)
	if err != nil || len(list) == 0 {
		return fmt.Errorf("the server does not offer the context %q, and names no other", name)
	}
	return fmt.Errorf("the server does not offer the context %q; it offers %s", name, printable(strings.Join(list, ", ")))
}

// mapOut takes a map, in order, and prints it. A map may be too large for memory.
type mapOut interface {
	add(e mapEntry) error
	end() error
}

func (f *infoFlags) mapOut(w io.Writer) mapOut {
	switch {
	case f.totals:
		return &mapTotals{w: w, json: f.json}
	case f.json:
		return mapList{&jsonArray{w: w}}
	}
	return mapLines{w}
}

type mapLines struct{ w io.Writer }

func (m mapLines) add(e mapEntry) error {
	_, err := fmt.Fprintln(m.w, strings.TrimRight(fmt.Sprintf("%10d  %10d  %3d  %s", e.Off, e.Len, e.Type, e.Description), " "))
	return err
}

func (m mapLines) end() error { return nil }

type mapList struct{ *jsonArray }

func (m mapList) add(e mapEntry) error { return m.jsonArray.add(e) }

// mapTotals sums up by type.
type mapTotals struct {
	w    io.Writer
	json bool
	list []mapTotal
	size int64
}

// maxStates is how many types of one context are told apart: those that are known
// have four, but for depths.
const maxStates = 1024

func (m *mapTotals) add(e mapEntry) error {
	i := slices.IndexFunc(m.list, func(t mapTotal) bool { return t.Type == e.Type })
	if i < 0 {
		if i = len(m.list); i == maxStates {
			return fmt.Errorf("the disk has more than %d states", maxStates)
		}
		m.list = append(m.list, mapTotal{Type: e.Type, Description: e.Description})
	}
	m.list[i].Size += e.Len
	m.size += e.Len
	return nil
}

// end prints them in the order of the types.
func (m *mapTotals) end() error {
	for i := range m.list {
		m.list[i].Percent = 100 * float64(m.list[i].Size) / float64(m.size)
	}
	slices.SortFunc(m.list, func(a, b mapTotal) int { return cmp.Compare(a.Type, b.Type) })
	if m.json {
		return writeJSON(m.w, append([]mapTotal{}, m.list...)) // none is [], not null
	}
	p := &printer{w: m.w}
	for _, t := range m.list {
		p.print("%s\n", strings.TrimRight(fmt.Sprintf("%10d %5.1f%% %3d %s", t.Size, t.Percent, t.Type, t.Description), " "))
	}
	return p.err
}

// state is the meaning of the flags in the contexts that are known, as
// nbdinfo words it.
func state(context string, flags uint64) string {
	name := func(names ...string) string {
		if flags < uint64(len(names)) {
			return names[flags]
		}
		return ""
	}
	switch {
	case context == wire.ContextAllocation:
		return name("data", "hole", "zero", "hole,zero")
	case strings.HasPrefix(context, "qemu:dirty-bitmap:"):
		return name("clean", "dirty")
	case context == "qemu:allocation-depth":
		if flags > 2 {
			return "backing depth " + strconv.FormatUint(flags, 10)
		}
		return name("unallocated", "local", "backing")
	}
	return ""
}

// printable is s without the characters that a terminal might obey.
func printable(s string) string {
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

package main

import (
	"cmp"
	"context"
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
	entries := []mapEntry{}
	if size := c.Export().Size; size > 0 {
		err = c.Map(ctx, f.context, 0, size, func(e client.Extent) bool {
			entries = append(entries, mapEntry{e.Off, e.Len, e.Flags, state(f.context, e.Flags)})
			return true
		})
	}
	if err != nil {
		return err
	}
	if f.totals {
		err = f.printTotals(w, total(entries))
	} else {
		err = f.printEntries(w, entries)
	}
	if err != nil {
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

func (f *infoFlags) printEntries(w io.Writer, entries []mapEntry) error {
	if f.json {
		return writeJSON(w, entries)
	}
	p := &printer{w: w}
	for _, e := range entries {
		p.print("%s\n", strings.TrimRight(fmt.Sprintf("%10d  %10d  %3d  %s", e.Off, e.Len, e.Type, e.Description), " "))
	}
	return p.err
}

func (f *infoFlags) printTotals(w io.Writer, totals []mapTotal) error {
	if f.json {
		return writeJSON(w, totals)
	}
	p := &printer{w: w}
	for _, t := range totals {
		p.print("%s\n", strings.TrimRight(fmt.Sprintf("%10d %5.1f%% %3d %s", t.Size, t.Percent, t.Type, t.Description), " "))
	}
	return p.err
}

// total sums up by type, in the order of the types.
func total(entries []mapEntry) []mapTotal {
	totals := []mapTotal{}
	size := int64(0)
	for _, e := range entries {
		size += e.Len
		i := slices.IndexFunc(totals, func(t mapTotal) bool { return t.Type == e.Type })
		if i < 0 {
			i = len(totals)
			totals = append(totals, mapTotal{Type: e.Type, Description: e.Description})
		}
		totals[i].Size += e.Len
	}
	for i := range totals {
		totals[i].Percent = 100 * float64(totals[i].Size) / float64(size)
	}
	slices.SortFunc(totals, func(a, b mapTotal) int { return cmp.Compare(a.Type, b.Type) })
	return totals
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

package nbd

import (
	"context"
	"encoding/binary"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// contextID names a metadata context on the wire: its position among those of
// the export. IDs in LIST replies are 0.
type contextID uint32

// contextsOf names all contexts of an export: how its bytes are allocated,
// and what else its device says of them.
func contextsOf(x ExportInfo) []string {
	return append([]string{wire.ContextAllocation}, x.Contexts...)
}

// metaContext is a context that was selected.
type metaContext struct {
	id   contextID
	name string
}

// metaChoice is what the last SET_META_CONTEXT selected, and for which
// export. Its zero value selects nothing.
type metaChoice struct {
	export   string // canonical name
	selected []metaContext
}

// forExport gives the contexts that count for the export that was finally opened
// (proto.md, "Metadata querying").
func (m metaChoice) forExport(name string) []metaContext {
	if m.export != name {
		return nil
	}
	return m.selected
}

func (n *negotiation) optListMeta(_ context.Context, o wire.Opt, p []byte) (verdict, error) {
	x, queries, v, ok := n.metaRequest(o, p)
	if !ok {
		return v, nil
	}
	for _, c := range contextsOf(x) {
		if len(queries) == 0 || matchesAny(c, queries, true) {
			n.replyContext(o, 0, c)
		}
	}
	return n.ack(o), nil
}

// optSetMeta replaces the former choice even when it fails.
func (n *negotiation) optSetMeta(_ context.Context, o wire.Opt, p []byte) (verdict, error) {
	n.agreed.meta = metaChoice{}
	x, queries, v, ok := n.metaRequest(o, p)
	if !ok {
		return v, nil
	}
	m := metaChoice{export: x.Name}
	for id, c := range contextsOf(x) {
		if matchesAny(c, queries, false) && len(m.selected) < limits.MaxContexts {
			m.selected = append(m.selected, metaContext{contextID(id), c})
			n.replyContext(o, contextID(id), c)
		}
	}
	n.agreed.meta = m
	return n.ack(o), nil
}

// metaRequest decodes and checks the payload of either option. Without ok an
// error has been appended.
func (n *negotiation) metaRequest(o wire.Opt, p []byte) (ExportInfo, []string, verdict, bool) {
	refuse := func(r wire.Rep, text string) (ExportInfo, []string, verdict, bool) {
		return ExportInfo{}, nil, n.fail(o, r, text), false
	}
	if n.opt.NoMeta || n.opt.NoStructured {
		return refuse(wire.RepErrUnsup, "metadata contexts are turned off")
	}
	if !n.agreed.structured && !n.agreed.extended {
		return refuse(wire.RepErrInvalid, "structured replies must be negotiated first")
	}
	req, err := wire.DecodeMetaRequest(p, limits.MaxMetaQueries)
	if err != nil {
		return refuse(wire.RepErrInvalid, "malformed request")
	}
	if len(req.Name) > limits.MaxString {
		return refuse(wire.RepErrTooBig, "export name is too long")
	}
	for _, q := range req.Queries {
		if len(q) > limits.MaxString || !strings.Contains(q, ":") {
			return refuse(wire.RepErrInvalid, "malformed query")
		}
	}
	x, rep, err := n.find(req.Name)
	if err != nil {
		return refuse(rep, err.Error())
	}
	return x, req.Queries, again, true
}

// matchesAny tells whether a query names context c. An empty leaf is a
// wildcard in LIST and selects nothing in SET (proto.md, "base: namespace").
func matchesAny(c string, queries []string, wildcard bool) bool {
	for _, q := range queries {
		if q == c {
			return true
		}
		if wildcard && strings.HasSuffix(q, ":") && strings.HasPrefix(c, q) {
			return true
		}
	}
	return false
}

func (n *negotiation) replyContext(o wire.Opt, id contextID, name string) {
	p := binary.BigEndian.AppendUint32(nil, uint32(id))
	n.reply(o, wire.RepMetaContext, append(p, name...))
}

package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// option is one row of the table of options.
type option struct {
	opt    wire.Opt
	plain  bool // allowed before TLS when TLS is required
	noData bool // payload is an error
	run    func(*negotiation, context.Context, wire.Opt, []byte) (verdict, error)
}

var options = [...]option{
	{opt: wire.OptExportName, run: (*negotiation).optExportName},
	{opt: wire.OptAbort, plain: true, run: (*negotiation).optAbort},
	{opt: wire.OptList, noData: true, run: (*negotiation).optList},
	{opt: wire.OptStartTLS, plain: true, noData: true, run: (*negotiation).optStartTLS},
	{opt: wire.OptInfo, run: (*negotiation).optInfo},
	{opt: wire.OptGo, run: (*negotiation).optGo},
	{opt: wire.OptStructuredReply, noData: true, run: (*negotiation).optStructuredReply},
	{opt: wire.OptListMeta, run: (*negotiation).optListMeta},
	{opt: wire.OptSetMeta, run: (*negotiation).optSetMeta},
	{opt: wire.OptExtendedHeaders, noData: true, run: (*negotiation).optExtendedHeaders},
}

func findOption(o wire.Opt) *option {
	for i := range options {
		if options[i].opt == o {
			return &options[i]
		}
	}
	return nil
}

// optExportName has no error reply: what cannot be answered ends the
// connection (proto.md, "NBD_OPT_EXPORT_NAME"). It is not allowed behind
// EXTENDED_HEADERS.
func (n *negotiation) optExportName(ctx context.Context, _ wire.Opt, p []byte) (verdict, error) {
	if n.agreed.extended || len(p) > limits.MaxString {
		return hangUp, errExportName
	}
	x, _, err := n.open(ctx, string(p), n.opt.Exports.Open)
	if err != nil {
		return hangUp, err
	}
	n.out = binary.BigEndian.AppendUint64(n.out, uint64(x.Device.Info().Size))
	n.out = binary.BigEndian.AppendUint16(n.out, uint16(n.exportFlags(x)))
	if !n.noZeroes {
		n.out = append(n.out, make([]byte, wire.ExportNameZeroes)...)
	}
	n.export = x
	return transmit, nil
}

// optAbort is acknowledged whatever data it carries; the client may be gone
// before it reads that.
func (n *negotiation) optAbort(_ context.Context, o wire.Opt, _ []byte) (verdict, error) {
	n.ack(o)
	return hangUp, nil
}

// optList sends one reply per export that the peer may see.
func (n *negotiation) optList(_ context.Context, o wire.Opt, _ []byte) (verdict, error) {
	n.asked++
	listed := 0
	for _, x := range n.opt.Exports.List(n.conn.Peer()) {
		if n.hides(x) {
			continue
		}
		if listed++; listed > limits.MaxListed {
			break
		}
		p := wire.AppendString(nil, x.Name)
		n.reply(o, wire.RepServer, append(p, x.Description...))
	}
	return n.ack(o), nil
}

func (n *negotiation) optStartTLS(_ context.Context, o wire.Opt, _ []byte) (verdict, error) {
	if n.tls == TLSOff {
		return n.fail(o, wire.RepErrUnsup, "TLS is not enabled"), nil
	}
	if n.secure {
		return n.fail(o, wire.RepErrInvalid, "TLS is already in use"), nil
	}
	n.ack(o)
	return upgradeTLS, nil
}

// optInfo and optGo give the same answers; GO starts transmission after them
// and never sends the 124 zeroes (proto.md, "NBD_OPT_INFO and NBD_OPT_GO").
func (n *negotiation) optInfo(ctx context.Context, o wire.Opt, p []byte) (verdict, error) {
	x, v := n.describe(ctx, o, p, n.opt.Exports.Inspect)
	if x != nil {
		x.Close()
	}
	return v, nil
}

func (n *negotiation) optGo(ctx context.Context, o wire.Opt, p []byte) (verdict, error) {
	x, v := n.describe(ctx, o, p, n.opt.Exports.Open)
	if x == nil {
		return v, nil
	}
	n.export = x
	return transmit, nil
}

// describe opens the export, answers with its information and hands it over.
// Without an export the error has been appended.
func (n *negotiation) describe(ctx context.Context, o wire.Opt, p []byte, open opener) (*Export, verdict) {
	req, err := wire.DecodeInfoRequest(p)
	if err != nil {
		return nil, n.fail(o, wire.RepErrInvalid, "malformed request")
	}
	if len(req.Name) > limits.MaxString {
		return nil, n.fail(o, wire.RepErrTooBig, "export name is too long")
	}
	x, rep, err := n.open(ctx, req.Name, open)
	if err != nil {
		return nil, n.fail(o, rep, err.Error())
	}
	info := x.Device.Info()
	n.reply(o, wire.RepInfo, wire.AppendInfoExport(nil, uint64(info.Size), n.exportFlags(x)))
	for _, i := range distinct(req.Infos) {
		switch i {
		case wire.InfoName:
			n.reply(o, wire.RepInfo, wire.AppendInfoText(nil, i, x.Name))
		case wire.InfoDescription:
			if x.Description != "" {
				n.reply(o, wire.RepInfo, wire.AppendInfoText(nil, i, x.Description))
			}
		}
	}
	// The constraints are sent to everybody: a client that did not ask for
	// them is not bound by them, but may like to know.
	n.reply(o, wire.RepInfo, wire.AppendInfoBlockSize(nil, blockSizes(info)))
	return x, n.ack(o)
}

// distinct answers each information once, however often it was asked for.
func distinct(infos []wire.Info) []wire.Info {
	var seen [wire.InfoBlockSize + 1]bool
	var out []wire.Info
	for _, i := range infos {
		if int(i) < len(seen) && !seen[i] {
			seen[i] = true
			out = append(out, i)
		}
	}
	return out
}

var errTLSReqd = errors.New("TLS is required for this export")

// opener is a method of Exports that opens one.
type opener func(context.Context, string, *transport.Peer) (*Export, error)

// open is the only way to an export. The reply fits the error.
func (n *negotiation) open(ctx context.Context, name string, open opener) (*Export, wire.Rep, error) {
	found, rep, err := n.find(name)
	if err != nil {
		return nil, rep, err
	}
	x, err := open(ctx, name, n.conn.Peer())
	switch {
	case errors.Is(err, ErrUnknownExport):
		return nil, wire.RepErrUnknown, ErrUnknownExport
	case err != nil:
		n.opt.Log.Warn("export cannot be opened", "peer", n.conn.Peer(), "export", found.Name, "error", err)
		return nil, wire.RepErrPlatform, errors.New("export cannot be opened")
	}
	// The name may stand for another export by now than the one that was found.
	if rep, err := n.withholds(x.ExportInfo); err != nil {
		x.Close()
		return nil, rep, err
	}
	return x, 0, nil
}

// find resolves a name as far as this connection may see it.
func (n *negotiation) find(name string) (ExportInfo, wire.Rep, error) {
	if !utf8.ValidString(name) || len(name) > limits.MaxString {
		return ExportInfo{}, wire.RepErrUnknown, ErrUnknownExport
	}
	x, err := n.opt.Exports.Find(name, n.conn.Peer())
	if err != nil {
		return ExportInfo{}, wire.RepErrUnknown, ErrUnknownExport
	}
	if rep, err := n.withholds(x); err != nil {
		return ExportInfo{}, rep, err
	}
	return x, 0, nil
}

// withholds is the error for who names x, and the reply to it, if the connection
// may not see x as it is now. Who knows the name learns how to get it (proto.md,
// "SELECTIVETLS mode").
func (n *negotiation) withholds(x ExportInfo) (wire.Rep, error) {
	switch {
	case !n.hides(x):
		return 0, nil
	case n.tls == TLSOff:
		return wire.RepErrUnknown, ErrUnknownExport
	}
	return wire.RepErrTLSReqd, errTLSReqd
}

// hides tells whether the connection may not see x as it is now.
func (n *negotiation) hides(x ExportInfo) bool { return x.NeedTLS && !n.secure }

// optStructuredReply and optExtendedHeaders: asking twice is an error, and
// the smaller one behind the larger one has a reply of its own.
func (n *negotiation) optStructuredReply(_ context.Context, o wire.Opt, _ []byte) (verdict, error) {
	switch {
	case n.opt.NoStructured:
		return n.fail(o, wire.RepErrUnsup, "structured replies are turned off"), nil
	case n.agreed.extended:
		return n.fail(o, wire.RepErrExtHeaderReqd, "extended headers are in use"), nil
	case n.agreed.structured:
		return n.fail(o, wire.RepErrInvalid, "structured replies are already in use"), nil
	}
	n.agreed.structured = true
	return n.ack(o), nil
}

func (n *negotiation) optExtendedHeaders(_ context.Context, o wire.Opt, _ []byte) (verdict, error) {
	switch {
	case n.opt.NoStructured:
		return n.fail(o, wire.RepErrUnsup, "extended headers are turned off"), nil
	case n.agreed.extended:
		return n.fail(o, wire.RepErrInvalid, "extended headers are already in use"), nil
	}
	n.agreed.extended = true
	return n.ack(o), nil
}

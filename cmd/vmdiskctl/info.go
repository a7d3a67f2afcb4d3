package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/nbd/client"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// infoFlags are the flags of info.
type infoFlags struct {
	connectFlags
	list, size, totals, json bool
	context                  string // of the map; "" for no map
}

func newInfo() *cobra.Command {
	f := &infoFlags{}
	c := &cobra.Command{
		Use:   "info URI",
		Short: "Show what a server says about its exports",
		Args:  cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c.Context(), args[0], c.OutOrStdout())
		},
	}
	f.add(c)
	n := c.Flags()
	n.BoolVarP(&f.list, "list", "L", false, "show all exports of the server")
	n.BoolVar(&f.size, "size", false, "show the size in bytes only")
	n.StringVar(&f.context, "map", "", "show the states of a metadata context")
	n.Lookup("map").NoOptDefVal = wire.ContextAllocation
	n.BoolVar(&f.totals, "totals", false, "with --map: sum up by state")
	n.BoolVar(&f.json, "json", false, "write JSON")
	flagWords(c, "map", wire.ContextAllocation, "qemu:allocation-depth", "qemu:dirty-bitmap:")
	return c
}

func (f *infoFlags) run(ctx context.Context, uri string, w io.Writer) error {
	switch {
	case f.totals && f.context == "":
		return usage("--totals belongs to --map")
	case f.list && f.size, f.list && f.context != "", f.size && f.context != "":
		return usage("only one of --list, --size and --map can be given")
	case f.size && f.json:
		return usage("--size has no JSON form: it is one number")
	}
	s, err := f.server(uri)
	switch {
	case err != nil && !isURI(uri):
		return usage("%w; for an image: vmdiskctl image info", err)
	case err != nil:
		return err
	}
	switch {
	case f.size:
		return f.printSize(ctx, s, w)
	case f.context != "":
		return f.printMap(ctx, s, w)
	}
	r, err := describe(ctx, s, f.list)
	if err != nil {
		return err
	}
	if f.json {
		return writeJSON(w, r)
	}
	return r.text(w)
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// jsonArray writes a list of which no more than one element is in memory, each on a
// line of its own.
type jsonArray struct {
	w io.Writer
	n int
}

func (a *jsonArray) add(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	before := ",\n"
	if a.n == 0 {
		before = "["
	}
	a.n++
	_, err = fmt.Fprintf(a.w, "%s%s", before, b)
	return err
}

func (a *jsonArray) end() error {
	text := "]\n"
	if a.n == 0 {
		text = "[]\n"
	}
	_, err := io.WriteString(a.w, text)
	return err
}

func (f *infoFlags) printSize(ctx context.Context, s *server, w io.Writer) error {
	c, err := s.open(ctx)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, c.Export().Size)
	return errors.Join(err, c.Disconnect(ctx))
}

// report is the answer of info. Names of fields are those of nbdinfo.
type report struct {
	Protocol   client.Protocol `json:"protocol"`
	TLS        bool            `json:"TLS"`
	Structured bool            `json:"structured"`
	Extended   bool            `json:"extended"`
	Exports    []exportReport  `json:"exports"`
}

// exportReport is one export. Block sizes are left out when the server names
// none.
type exportReport struct {
	Name        string   `json:"export-name"`
	Canonical   string   `json:"canonical-name,omitempty"`
	Description string   `json:"description,omitempty"`
	URI         string   `json:"uri"`
	Contexts    []string `json:"contexts,omitempty"`

	IsRotational          bool `json:"is_rotational"`
	IsReadOnly            bool `json:"is_read_only"`
	CanBlockStatusPayload bool `json:"can_block_status_payload"`
	CanCache              bool `json:"can_cache"`
	CanDF                 bool `json:"can_df"`
	CanFastZero           bool `json:"can_fast_zero"`
	CanFlush              bool `json:"can_flush"`
	CanFUA                bool `json:"can_fua"`
	CanMultiConn          bool `json:"can_multi_conn"`
	CanTrim               bool `json:"can_trim"`
	CanZero               bool `json:"can_zero"`

	BlockMinimum   uint32 `json:"block_size_minimum,omitempty"`
	BlockPreferred uint32 `json:"block_size_preferred,omitempty"`
	BlockMaximum   uint32 `json:"block_size_maximum,omitempty"`

	Size     int64  `json:"export-size"`
	SizeText string `json:"export-size-str"`
}

// describe asks for the export of the URI, or for all.
func describe(ctx context.Context, s *server, all bool) (*report, error) {
	session, err := s.negotiate(ctx)
	if err != nil {
		return nil, err
	}
	defer session.Close()
	r := &report{
		Protocol:   session.Protocol(),
		TLS:        session.TLS(),
		Structured: session.Replies() >= client.Structured,
		Extended:   session.Replies() == client.Extended,
	}
	names := []client.Listed{{Name: s.Export}}
	if all {
		if names, err = session.List(ctx); err != nil {
			return nil, err
		}
	}
	for _, l := range names {
		e, err := s.describeExport(ctx, session, l)
		if err != nil {
			return nil, err
		}
		r.Exports = append(r.Exports, e)
	}
	return r, session.Abort(ctx)
}

// describeExport asks by INFO. Where the server does not know it, it opens
// the export on a connection of its own.
func (s *server) describeExport(ctx context.Context, session *client.Session, l client.Listed) (exportReport, error) {
	e, err := session.Info(ctx, l.Name)
	var refused *client.OptionError
	if errors.As(err, &refused) && refused.Rep == wire.RepErrUnsup {
		var c *client.Client
		if c, err = s.openExport(ctx, l.Name); err == nil {
			e = c.Export()
			err = c.Disconnect(ctx)
		}
	}
	if err != nil {
		return exportReport{}, err
	}
	// A server may have none, or not say: that is no reason to say nothing.
	e.Contexts, err = session.ListContexts(ctx, l.Name)
	if err != nil && !errors.As(err, &refused) {
		return exportReport{}, err
	}
	if e.Description == "" {
		e.Description = l.Description
	}
	u := s.URI
	u.Export = l.Name
	return newExportReport(e, u.String()), nil
}

func newExportReport(e client.Export, uri string) exportReport {
	return exportReport{
		Name: e.Name, Canonical: e.Canonical, Description: e.Description, URI: uri, Contexts: e.Contexts,
		IsRotational:          e.Has(wire.Rotational),
		IsReadOnly:            e.Has(wire.ReadOnly),
		CanBlockStatusPayload: e.Has(wire.SendBlockStatusPayload),
		CanCache:              e.Has(wire.SendCache),
		CanDF:                 e.Has(wire.SendDF),
		CanFastZero:           e.Has(wire.SendFastZero),
		CanFlush:              e.Has(wire.SendFlush),
		CanFUA:                e.Has(wire.SendFUA),
		CanMultiConn:          e.Has(wire.CanMultiConn),
		CanTrim:               e.Has(wire.SendTrim),
		CanZero:               e.Has(wire.SendZero),
		BlockMinimum:          e.Blocks.Min,
		BlockPreferred:        e.Blocks.Preferred,
		BlockMaximum:          e.Blocks.Max,
		Size:                  e.Size,
		SizeText:              byteSize(e.Size).String(),
	}
}

// text writes the report for people. Strings of the server are quoted: a
// terminal obeys control characters.
func (r *report) text(w io.Writer) error {
	p := &printer{w: w}
	tls := "without"
	if r.TLS {
		tls = "with"
	}
	packets := "simple"
	switch {
	case r.Extended:
		packets = "extended"
	case r.Structured:
		packets = "structured"
	}
	p.print("protocol: %s %s TLS, using %s packets\n", r.Protocol, tls, packets)
	for i := range r.Exports {
		r.Exports[i].text(p)
	}
	return p.err
}

func (e *exportReport) text(p *printer) {
	p.print("export=%q:\n", e.Name)
	if e.Description != "" {
		p.print("\tdescription: %q\n", e.Description)
	}
	if e.Canonical != "" && e.Canonical != e.Name {
		p.print("\tcanonical-name: %q\n", e.Canonical)
	}
	p.print("\texport-size: %d (%s)\n", e.Size, e.SizeText)
	p.print("\turi: %s\n", e.URI)
	if len(e.Contexts) > 0 {
		p.print("\tcontexts:\n")
	}
	for _, c := range e.Contexts {
		p.print("\t\t%s\n", printable(c))
	}
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"is_rotational", e.IsRotational},
		{"is_read_only", e.IsReadOnly},
		{"can_block_status_payload", e.CanBlockStatusPayload},
		{"can_cache", e.CanCache},
		{"can_df", e.CanDF},
		{"can_fast_zero", e.CanFastZero},
		{"can_flush", e.CanFlush},
		{"can_fua", e.CanFUA},
		{"can_multi_conn", e.CanMultiConn},
		{"can_trim", e.CanTrim},
		{"can_zero", e.CanZero},
	} {
		p.print("\t%s: %v\n", f.name, f.set)
	}
	if e.BlockMinimum != 0 {
		p.print("\tblock_size_minimum: %d\n", e.BlockMinimum)
		p.print("\tblock_size_preferred: %d\n", e.BlockPreferred)
		p.print("\tblock_size_maximum: %d\n", e.BlockMaximum)
	}
}

// printer keeps the first error of its writer.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) print(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Listed is one export as LIST names it.
type Listed struct {
	Name        string
	Description string
}

// List asks for the names of all exports, at most limits.MaxListed. An
// oldstyle server has one, which has no name.
func (s *Session) List(ctx context.Context) ([]Listed, error) {
	if s.protocol == Oldstyle {
		return []Listed{{}}, nil
	}
	if err := s.needFixed(wire.OptList); err != nil {
		return nil, err
	}
	var list []Listed
	err := s.do(ctx, func(context.Context) error {
		if err := s.send(wire.OptList, nil); err != nil {
			return err
		}
		return s.answers(wire.OptList, limits.MaxListed, func(rep wire.Rep, p []byte) error {
			name, rest, ok := wire.CutString(p)
			if rep != wire.RepServer || !ok || len(name) > limits.MaxString || len(rest) > limits.MaxString {
				return violation("%v of %d bytes in a list", rep, len(p))
			}
			list = append(list, Listed{Name: string(name), Description: string(rest)})
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list exports: %w", err)
	}
	return list, nil
}

// Info asks about an export without opening it. Servers before INFO answer
// with an *OptionError whose Rep is RepErrUnsup.
func (s *Session) Info(ctx context.Context, name string) (Export, error) {
	var e Export
	if s.old != nil {
		return s.oldExport(name)
	}
	err := s.needFixed(wire.OptInfo)
	if err == nil {
		err = s.do(ctx, func(context.Context) (err error) {
			e, err = s.info(wire.OptInfo, name)
			return err
		})
	}
	if err != nil {
		return Export{}, fmt.Errorf("export %q: %w", name, err)
	}
	return e, nil
}

// ListContexts asks which metadata contexts of an export match the queries,
// which are all when there is no query.
func (s *Session) ListContexts(ctx context.Context, name string, queries ...string) ([]string, error) {
	if s.replies < Structured {
		return nil, nil
	}
	var found []string
	err := s.do(ctx, func(context.Context) (err error) {
		found, _, err = s.meta(wire.OptListMeta, limits.MaxMetaQueries, name, queries)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("contexts of export %q: %w", name, err)
	}
	return found, nil
}

// Go selects the contexts that the server has of those named, opens the
// export and turns the session into a client, which owns the connection. The
// session has ended whether or not it fails.
func (s *Session) Go(ctx context.Context, name string, contexts []string) (*Client, error) {
	var e Export
	var ids []uint32
	err := s.do(ctx, func(context.Context) (err error) {
		e, ids, err = s.open(name, contexts)
		return err
	})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("export %q: %w", name, err)
	}
	return newClient(s, e, ids), nil
}

// Handover opens the export and gives the connection away at the first byte of
// its transmission phase, as a kernel wants it that transmits by itself; under
// TLS that is the encrypted connection. The form of replies is the one that
// was agreed: Options.Replies decides. A server that has sent anything after
// its last option reply breaks the protocol. The session has ended whether or
// not it fails.
func (s *Session) Handover(ctx context.Context, name string) (net.Conn, Export, error) {
	var e Export
	err := s.do(ctx, func(context.Context) (err error) {
		if e, _, err = s.open(name, nil); err != nil {
			return err
		}
		if n := s.br.Buffered(); n != 0 {
			return violation("%d bytes before the first request", n)
		}
		return nil
	})
	if err != nil {
		s.Close()
		return nil, Export{}, fmt.Errorf("export %q: %w", name, err)
	}
	return s.conn, e, nil
}

// Abort says goodbye and closes.
func (s *Session) Abort(ctx context.Context) error {
	defer s.Close()
	if s.protocol != NewstyleFixed {
		return nil
	}
	return s.do(ctx, func(context.Context) error {
		err := s.simpleOption(wire.OptAbort)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil // a server may hang up without a word
		}
		return err
	})
}

func (s *Session) needFixed(o wire.Opt) error {
	if s.protocol == NewstyleFixed {
		return nil
	}
	return &OptionError{Opt: o, Rep: wire.RepErrUnsup, Text: string(s.protocol) + " server"}
}

func (s *Session) open(name string, contexts []string) (Export, []uint32, error) {
	if s.old != nil {
		e, err := s.oldExport(name)
		return e, nil, err
	}
	if s.protocol == Newstyle {
		e, err := s.exportName(name)
		return e, nil, err
	}
	selected, ids, err := s.selectContexts(name, contexts)
	if err != nil {
		return Export{}, nil, err
	}
	e, err := s.info(wire.OptGo, name)
	var refused *OptionError
	if errors.As(err, &refused) && refused.Rep == wire.RepErrUnsup && s.replies != Extended {
		e, err = s.exportName(name)
	}
	e.Contexts = selected
	return e, ids, err
}

// selectContexts takes a server without contexts for one that has none of
// those asked for.
func (s *Session) selectContexts(name string, contexts []string) ([]string, []uint32, error) {
	if len(contexts) == 0 || s.replies < Structured {
		return nil, nil, nil
	}
	selected, ids, err := s.meta(wire.OptSetMeta, limits.MaxContexts, name, contexts)
	var refused *OptionError
	if errors.As(err, &refused) && !refused.Refused() && refused.Rep != wire.RepErrShutdown {
		return nil, nil, nil
	}
	return selected, ids, err
}

func (s *Session) oldExport(name string) (Export, error) {
	if name != "" {
		return Export{}, fmt.Errorf("export %q: %w", name, &OptionError{Opt: wire.OptExportName, Rep: wire.RepErrUnknown,
			Text: "the one export of an oldstyle server has no name"})
	}
	return *s.old, nil
}

// exportName opens an export by NBD_OPT_EXPORT_NAME, which a server refuses
// by hanging up.
func (s *Session) exportName(name string) (Export, error) {
	if len(name) > limits.MaxString {
		return Export{}, nameTooLong(wire.OptExportName, name)
	}
	if err := s.send(wire.OptExportName, []byte(name)); err != nil {
		return Export{}, err
	}
	n := 10
	if !s.noZeroes {
		n += wire.ExportNameZeroes
	}
	p, err := s.read(n)
	if errors.Is(err, io.EOF) {
		return Export{}, fmt.Errorf("%v refused: %w", wire.OptExportName, err)
	}
	if err != nil {
		return Export{}, err
	}
	e := Export{Name: name}
	return e, e.set(be.Uint64(p), be.Uint16(p[8:]))
}

func nameTooLong(o wire.Opt, name string) error {
	return &OptionError{Opt: o, Rep: wire.RepErrTooBig, Text: fmt.Sprintf("the name has %d bytes", len(name))}
}

// info runs INFO or GO.
func (s *Session) info(o wire.Opt, name string) (Export, error) {
	if len(name) > limits.MaxString {
		return Export{}, nameTooLong(o, name)
	}
	err := s.send(o, wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name,
		Infos: []wire.Info{wire.InfoName, wire.InfoDescription, wire.InfoBlockSize}}))
	if err != nil {
		return Export{}, err
	}
	e, seen := Export{Name: name}, false
	err = s.answers(o, limits.MaxInfoReplies, func(rep wire.Rep, p []byte) error {
		if rep != wire.RepInfo || len(p) < 2 {
			return violation("%v of %d bytes to %v", rep, len(p), o)
		}
		seen = seen || wire.Info(be.Uint16(p)) == wire.InfoExport
		return e.take(wire.Info(be.Uint16(p)), p[2:])
	})
	if err == nil && !seen {
		err = violation("%v acknowledged without a size", o)
	}
	if err != nil {
		return Export{}, err
	}
	return e, nil
}

// take adds one piece of information. Unknown ones are passed over.
func (e *Export) take(i wire.Info, p []byte) error {
	switch i {
	case wire.InfoExport:
		if len(p) != 10 {
			return violation("export information of %d bytes", len(p))
		}
		return e.set(be.Uint64(p), be.Uint16(p[8:]))
	case wire.InfoName, wire.InfoDescription:
		if len(p) > limits.MaxString {
			return violation("text of %d bytes", len(p))
		}
		if i == wire.InfoName {
			e.Canonical = string(p)
		} else {
			e.Description = string(p)
		}
	case wire.InfoBlockSize:
		if len(p) != 12 {
			return violation("block size information of %d bytes", len(p))
		}
		b := wire.BlockSizes{Min: be.Uint32(p), Preferred: be.Uint32(p[4:]), Max: be.Uint32(p[8:])}
		if b.Min == 0 || b.Min&(b.Min-1) != 0 || b.Min > limits.MaxIO || b.Preferred < b.Min || b.Max < b.Min {
			return violation("block sizes %d, %d, %d", b.Min, b.Preferred, b.Max)
		}
		e.Blocks = b
	}
	return nil
}

func (e *Export) set(size uint64, flags uint16) error {
	if size > math.MaxInt64 {
		return violation("export of %d bytes", size)
	}
	e.Size, e.Flags = int64(size), wire.ExportFlags(flags)
	return nil
}

// meta runs LIST_META_CONTEXT or SET_META_CONTEXT.
func (s *Session) meta(o wire.Opt, limit int, name string, queries []string) ([]string, []uint32, error) {
	if len(name) > limits.MaxString {
		return nil, nil, nameTooLong(o, name)
	}
	if err := s.send(o, wire.AppendMetaRequest(nil, wire.MetaRequest{Name: name, Queries: queries})); err != nil {
		return nil, nil, err
	}
	var names []string
	var ids []uint32
	err := s.answers(o, limit, func(rep wire.Rep, p []byte) error {
		if rep != wire.RepMetaContext || len(p) < 5 || len(p) > 4+limits.MaxString {
			return violation("%v of %d bytes to %v", rep, len(p), o)
		}
		id, context := be.Uint32(p), string(p[4:])
		if o == wire.OptSetMeta && (slices.Contains(ids, id) || slices.Contains(names, context)) {
			return violation("context %q with number %d twice", context, id)
		}
		names, ids = append(names, context), append(ids, id)
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return names, ids, nil
}

package wire

// Option is the header of one option that a client sends.
type Option struct {
	Opt Opt
	Len uint32
}

// DecodeOption reads an option header.
func DecodeOption(b []byte) (Option, error) {
	if len(b) < OptionHeaderSize {
		return Option{}, ErrShort
	}
	if be.Uint64(b) != MagicOption {
		return Option{}, ErrMagic
	}
	return Option{Opt: Opt(be.Uint32(b[8:])), Len: be.Uint32(b[12:])}, nil
}

// AppendOption appends an option with its payload.
func AppendOption(b []byte, o Opt, payload []byte) []byte {
	b = be.AppendUint64(b, MagicOption)
	b = be.AppendUint32(b, uint32(o))
	b = be.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// OptReply is the header of one reply to an option.
type OptReply struct {
	Opt Opt
	Rep Rep
	Len uint32
}

// DecodeOptReply reads an option reply header.
func DecodeOptReply(b []byte) (OptReply, error) {
	if len(b) < OptReplyHeaderSize {
		return OptReply{}, ErrShort
	}
	if be.Uint64(b) != MagicOptReply {
		return OptReply{}, ErrMagic
	}
	return OptReply{Opt: Opt(be.Uint32(b[8:])), Rep: Rep(be.Uint32(b[12:])), Len: be.Uint32(b[16:])}, nil
}

// AppendOptReply appends an option reply with its payload.
func AppendOptReply(b []byte, o Opt, r Rep, payload []byte) []byte {
	b = be.AppendUint64(b, MagicOptReply)
	b = be.AppendUint32(b, uint32(o))
	b = be.AppendUint32(b, uint32(r))
	b = be.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// AppendString appends a string with its 32-bit length.
func AppendString(b []byte, s string) []byte {
	b = be.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// CutString splits a length-prefixed string off b. ok is false when the
// length runs past the end.
func CutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := be.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n], b[4+n:], true
}

// InfoRequest is the payload of INFO and GO.
type InfoRequest struct {
	Name  string
	Infos []Info
}

// DecodeInfoRequest reads the payload of INFO or GO. The number of requests
// must use up the payload exactly.
func DecodeInfoRequest(p []byte) (InfoRequest, error) {
	name, rest, ok := CutString(p)
	if !ok || len(rest) < 2 {
		return InfoRequest{}, ErrShort
	}
	n := int(be.Uint16(rest))
	rest = rest[2:]
	if len(rest) != 2*n {
		return InfoRequest{}, ErrShort
	}
	r := InfoRequest{Name: string(name), Infos: make([]Info, n)}
	for i := range r.Infos {
		r.Infos[i] = Info(be.Uint16(rest[2*i:]))
	}
	return r, nil
}

// AppendInfoRequest appends the payload of INFO or GO.
func AppendInfoRequest(b []byte, r InfoRequest) []byte {
	b = AppendString(b, r.Name)
	b = be.AppendUint16(b, uint16(len(r.Infos)))
	for _, i := range r.Infos {
		b = be.AppendUint16(b, uint16(i))
	}
	return b
}

// AppendInfoExport appends an NBD_INFO_EXPORT.
func AppendInfoExport(b []byte, size uint64, flags ExportFlags) []byte {
	b = be.AppendUint16(b, uint16(InfoExport))
	b = be.AppendUint64(b, size)
	return be.AppendUint16(b, uint16(flags))
}

// AppendInfoText appends an NBD_INFO_NAME or NBD_INFO_DESCRIPTION.
func AppendInfoText(b []byte, i Info, text string) []byte {
	return append(be.AppendUint16(b, uint16(i)), text...)
}

// BlockSizes are the constraints of NBD_INFO_BLOCK_SIZE, in bytes.
type BlockSizes struct {
	Min, Preferred, Max uint32
}

// AppendInfoBlockSize appends an NBD_INFO_BLOCK_SIZE.
func AppendInfoBlockSize(b []byte, s BlockSizes) []byte {
	b = be.AppendUint16(b, uint16(InfoBlockSize))
	b = be.AppendUint32(b, s.Min)
	b = be.AppendUint32(b, s.Preferred)
	return be.AppendUint32(b, s.Max)
}

// MetaRequest is the payload of LIST_META_CONTEXT and SET_META_CONTEXT.
type MetaRequest struct {
	Name    string
	Queries []string
}

// DecodeMetaRequest reads the payload of LIST_META_CONTEXT or
// SET_META_CONTEXT with at most max queries.
func DecodeMetaRequest(p []byte, max int) (MetaRequest, error) {
	name, rest, ok := CutString(p)
	if !ok || len(rest) < 4 {
		return MetaRequest{}, ErrShort
	}
	n := be.Uint32(rest)
	rest = rest[4:]
	if uint64(n) > uint64(max) || uint64(n)*4 > uint64(len(rest)) {
		return MetaRequest{}, ErrShort
	}
	r := MetaRequest{Name: string(name), Queries: make([]string, n)}
	for i := range r.Queries {
		var q []byte
		if q, rest, ok = CutString(rest); !ok {
			return MetaRequest{}, ErrShort
		}
		r.Queries[i] = string(q)
	}
	if len(rest) != 0 {
		return MetaRequest{}, ErrShort
	}
	return r, nil
}

// AppendMetaRequest appends the payload of LIST_META_CONTEXT or
// SET_META_CONTEXT.
func AppendMetaRequest(b []byte, r MetaRequest) []byte {
	b = AppendString(b, r.Name)
	b = be.AppendUint32(b, uint32(len(r.Queries)))
	for _, q := range r.Queries {
		b = AppendString(b, q)
	}
	return b
}

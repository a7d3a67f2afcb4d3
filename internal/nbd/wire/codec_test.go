package wire

import (
	"bytes"
	"errors"
	"testing"
)

// headers are the codecs of fixed size: bytes to a value and back.
var headers = []struct {
	name   string
	size   int
	recode func([]byte) ([]byte, error)
	sample []byte
}{
	{"request", RequestSize, func(b []byte) ([]byte, error) {
		r, err := DecodeRequest(b)
		return AppendRequest(nil, r), err
	}, AppendRequest(nil, Request{Flags: FlagFUA, Cmd: CmdWrite, Cookie: 1 << 60, Off: 1 << 50, Len: 0xfffffe00})},
	{"extended request", ExtRequestSize, func(b []byte) ([]byte, error) {
		r, err := DecodeExtRequest(b)
		return AppendExtRequest(nil, r), err
	}, AppendExtRequest(nil, Request{Flags: FlagPayloadLen, Cmd: CmdExtents, Cookie: 3, Off: 1 << 63, Len: 1 << 40})},
	{"simple reply", SimpleReplySize, func(b []byte) ([]byte, error) {
		e, cookie, err := DecodeSimpleReply(b)
		return AppendSimpleReply(nil, e, cookie), err
	}, AppendSimpleReply(nil, ENOSPC, 77)},
	{"chunk", ChunkSize, func(b []byte) ([]byte, error) {
		c, err := DecodeChunk(b)
		return AppendChunk(nil, c), err
	}, AppendChunk(nil, Chunk{Flags: ChunkDone, Type: ChunkErrorOffset, Cookie: 5, Len: 99})},
	{"extended chunk", ExtChunkSize, func(b []byte) ([]byte, error) {
		c, err := DecodeExtChunk(b)
		return AppendExtChunk(nil, c), err
	}, AppendExtChunk(nil, Chunk{Type: ChunkExtentsExt, Cookie: 5, Off: 1 << 62, Len: 1 << 33})},
	{"option", OptionHeaderSize, func(b []byte) ([]byte, error) {
		o, err := DecodeOption(b)
		return AppendOption(nil, o.Opt, make([]byte, o.Len%8))[:OptionHeaderSize], err
	}, AppendOption(nil, OptGo, make([]byte, 7))[:OptionHeaderSize]},
	{"option reply", OptReplyHeaderSize, func(b []byte) ([]byte, error) {
		r, err := DecodeOptReply(b)
		return AppendOptReply(nil, r.Opt, r.Rep, make([]byte, r.Len%8))[:OptReplyHeaderSize], err
	}, AppendOptReply(nil, OptInfo, RepErrUnknown, make([]byte, 5))[:OptReplyHeaderSize]},
}

func TestHeadersSurviveTheRoundTrip(t *testing.T) {
	for _, h := range headers {
		t.Run(h.name, func(t *testing.T) {
			if len(h.sample) != h.size {
				t.Fatalf("size: got %d, want %d", len(h.sample), h.size)
			}
			got, err := h.recode(h.sample)
			if err != nil || !bytes.Equal(got, h.sample) {
				t.Errorf("got %x, %v; want %x", got, err, h.sample)
			}
		})
	}
}

func TestEveryPrefixOfAHeaderIsAnError(t *testing.T) {
	for _, h := range headers {
		for n := range h.size {
			if _, err := h.recode(h.sample[:n:n]); !errors.Is(err, ErrShort) {
				t.Errorf("%s cut to %d bytes: got %v, want %v", h.name, n, err, ErrShort)
			}
		}
	}
}

func TestEveryWrongMagicIsAnError(t *testing.T) {
	for _, h := range headers {
		for bit := range 32 {
			b := bytes.Clone(h.sample)
			b[bit/8] ^= 1 << (bit % 8)
			if _, err := h.recode(b); !errors.Is(err, ErrMagic) {
				t.Errorf("%s with bit %d flipped: got %v, want %v", h.name, bit, err, ErrMagic)
			}
		}
	}
}

func TestErrorChunkHasItsOffsetBehindTheText(t *testing.T) {
	p := AppendErrorOffset(nil, EIO, "bad sector", 4096)
	e, text, off, err := DecodeError(ChunkErrorOffset, p)
	if err != nil || e != EIO || string(text) != "bad sector" || off != 4096 {
		t.Errorf("got %v, %q, %d, %v", e, text, off, err)
	}
	if e, text, off, err = DecodeError(ChunkError, AppendError(nil, EPERM, "")); err != nil || e != EPERM || len(text) != 0 || off != 0 {
		t.Errorf("without text: got %v, %q, %d, %v", e, text, off, err)
	}
	for n := range p {
		if _, _, _, err := DecodeError(ChunkErrorOffset, p[:n]); !errors.Is(err, ErrShort) {
			t.Errorf("cut to %d bytes: got %v, want %v", n, err, ErrShort)
		}
	}
}

func TestInfoRequestUsesUpItsPayload(t *testing.T) {
	want := InfoRequest{Name: "disk", Infos: []Info{InfoBlockSize, InfoName}}
	p := AppendInfoRequest(nil, want)
	got, err := DecodeInfoRequest(p)
	if err != nil || got.Name != want.Name || len(got.Infos) != 2 || got.Infos[0] != InfoBlockSize {
		t.Errorf("got %+v, %v", got, err)
	}
	for n := range p {
		if _, err := DecodeInfoRequest(p[:n]); err == nil {
			t.Errorf("cut to %d bytes: accepted", n)
		}
	}
	if _, err := DecodeInfoRequest(append(p, 0)); err == nil {
		t.Error("a byte too many: accepted")
	}
	if _, err := DecodeInfoRequest([]byte{0xff, 0xff, 0xff, 0xff, 0, 0}); err == nil {
		t.Error("name longer than the payload: accepted")
	}
}

func TestMetaRequestIsBounded(t *testing.T) {
	want := MetaRequest{Name: "d", Queries: []string{"base:allocation", "", "qemu:"}}
	p := AppendMetaRequest(nil, want)
	got, err := DecodeMetaRequest(p, 3)
	if err != nil || got.Name != "d" || len(got.Queries) != 3 || got.Queries[2] != "qemu:" {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := DecodeMetaRequest(p, 2); err == nil {
		t.Error("more queries than allowed: accepted")
	}
	for n := range p {
		if _, err := DecodeMetaRequest(p[:n], 3); err == nil {
			t.Errorf("cut to %d bytes: accepted", n)
		}
	}
	if _, err := DecodeMetaRequest(append(p, 0), 3); err == nil {
		t.Error("a byte too many: accepted")
	}
	huge := be.AppendUint32(AppendString(nil, "d"), 0xffffffff)
	if _, err := DecodeMetaRequest(huge, 1<<31-1); err == nil {
		t.Error("4 billion queries in no bytes: accepted")
	}
}

func TestNamesAreTheProtocols(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{OptGo.String(), "NBD_OPT_GO"},
		{Opt(99).String(), "NBD_OPT_99"},
		{RepErrTLSReqd.String(), "NBD_REP_ERR_TLS_REQD"},
		{CmdZero.String(), "NBD_CMD_WRITE_ZEROES"},
		{Cmd(9).String(), "NBD_CMD_9"},
		{ChunkHole.String(), "NBD_REPLY_TYPE_OFFSET_HOLE"},
		{ENOSPC.String(), "ENOSPC"},
		{Errno(7).Error(), "errno 7"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
}

func TestErrorsHaveTheTopBit(t *testing.T) {
	for r := range repNames {
		if want := r >= RepErrUnsup; r.IsError() != want {
			t.Errorf("%v is an error: got %v, want %v", r, r.IsError(), want)
		}
	}
	for c := range chunkNames {
		if want := c == ChunkError || c == ChunkErrorOffset; c.IsError() != want {
			t.Errorf("%v is an error: got %v, want %v", c, c.IsError(), want)
		}
	}
}

func FuzzRequests(f *testing.F) {
	for _, h := range headers {
		f.Add(h.sample)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := DecodeRequest(b); err == nil && !bytes.Equal(AppendRequest(nil, r), b[:RequestSize]) {
			t.Errorf("compact %x became %+v", b, r)
		}
		if r, err := DecodeExtRequest(b); err == nil && !bytes.Equal(AppendExtRequest(nil, r), b[:ExtRequestSize]) {
			t.Errorf("extended %x became %+v", b, r)
		}
		if c, err := DecodeExtChunk(b); err == nil && !bytes.Equal(AppendExtChunk(nil, c), b[:ExtChunkSize]) {
			t.Errorf("chunk %x became %+v", b, c)
		}
	})
}

func FuzzPayloads(f *testing.F) {
	f.Add(AppendInfoRequest(nil, InfoRequest{Name: "disk", Infos: []Info{1, 2, 3}}))
	f.Add(AppendMetaRequest(nil, MetaRequest{Name: "disk", Queries: []string{"base:allocation"}}))
	f.Add(AppendErrorOffset(nil, EIO, "text", 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := DecodeInfoRequest(b); err == nil && !bytes.Equal(AppendInfoRequest(nil, r), b) {
			t.Errorf("info %x became %+v", b, r)
		}
		if r, err := DecodeMetaRequest(b, 16); err == nil && !bytes.Equal(AppendMetaRequest(nil, r), b) {
			t.Errorf("meta %x became %+v", b, r)
		}
		if e, text, off, err := DecodeError(ChunkErrorOffset, b); err == nil &&
			!bytes.HasPrefix(b, AppendErrorOffset(nil, e, string(text), off)) {
			t.Errorf("error %x became %v, %q, %d", b, e, text, off)
		}
	})
}

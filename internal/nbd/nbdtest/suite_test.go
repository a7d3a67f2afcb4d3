package nbdtest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// everything is a server for which every check applies but those of one mode.
func everything(mode TLSMode, readOnly bool) *Server {
	return &Server{
		Size: 1 << 40, ReadOnly: readOnly, Other: "other", Large: &Export{},
		TLS: TLS{Mode: mode},
		Features: Features{
			Flags:      wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero | wire.SendDF | wire.SendCache | wire.SendFastZero | wire.CanMultiConn,
			Structured: true, Extended: true, Contexts: true, BlockSizes: true, MinBlock: 512,
		},
	}
}

func TestEveryCheckHasAnIDOfItsOwnAndAClaim(t *testing.T) {
	for _, s := range []*Server{
		everything(TLSOff, false), everything(TLSOn, false), everything(TLSRequire, false), everything(TLSOff, true),
		{Size: MinSize},
	} {
		seen := map[string]bool{}
		for _, ck := range catalogue(s) {
			if seen[ck.id] {
				t.Errorf("ID %s is used twice", ck.id)
			}
			seen[ck.id] = true
			if ck.claim == "" || ck.run == nil || strings.ContainsAny(ck.id, " *") {
				t.Errorf("check %q with claim %q", ck.id, ck.claim)
			}
		}
	}
}

func TestADeviationThatPassesFailsTheTest(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name     string
		err      error
		deviates bool
		reason   string
		want     bool // a test failure
	}{
		{"passes", nil, false, "", false},
		{"fails", broken, false, "", true},
		{"deviates and fails", broken, true, "known", false},
		{"deviates and passes", nil, true, "known", true},
		{"races and fails", broken, true, Races + "known", false},
		{"races and passes", nil, true, Races + "known", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := verdict(tt.err, tt.deviates, tt.reason); (got != "") != tt.want {
				t.Errorf("verdict: %q, want a failure: %v", got, tt.want)
			}
		})
	}
}

func TestADeviationNamesOneCheckAllFormsOrAPrefix(t *testing.T) {
	for _, tt := range []struct {
		key, id string
		want    bool
	}{
		{"TX-01", "TX-01", true},
		{"TX-01", "TX-01@simple", true},
		{"TX-01@simple", "TX-01@simple", true},
		{"TX-01@simple", "TX-01@structured", false},
		{"TX-01", "TX-01/read@simple", false},
		{"TX-01/*", "TX-01/read@simple", true},
		{"TX-01/*", "TX-01@simple", false},
		{"TX-0", "TX-01", false},
	} {
		if got := matches(tt.key, tt.id); got != tt.want {
			t.Errorf("key %q stands for %q: %v, want %v", tt.key, tt.id, got, tt.want)
		}
	}
	s := everything(TLSOff, false)
	s.Deviations = map[string]string{"TX-01": "", "TX-99": "", "TL-13/1.0": "", "HS-05/*": ""}
	if got, want := stale(s, catalogue(s)), []string{"TL-13/1.0", "TX-99"}; !slices.Equal(got, want) {
		t.Errorf("stale deviations: %q, want %q", got, want)
	}
}

func TestBlockSizesFollowTheSpecification(t *testing.T) {
	const size = 1 << 30
	for _, tt := range []struct {
		sizes wire.BlockSizes
		good  bool
	}{
		{wire.BlockSizes{Min: 1, Preferred: 4096, Max: 32 << 20}, true},
		{wire.BlockSizes{Min: 512, Preferred: 512, Max: 1<<32 - 1}, true},
		{wire.BlockSizes{Min: 1 << 16, Preferred: 1 << 16, Max: 32 << 20}, true},
		{wire.BlockSizes{Min: 0, Preferred: 4096, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 3, Preferred: 4096, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 1 << 17, Preferred: 1 << 17, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 1, Preferred: 256, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 4096, Preferred: 512, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 1, Preferred: 5000, Max: 32 << 20}, false},
		{wire.BlockSizes{Min: 1, Preferred: 4096, Max: 512}, false},
		{wire.BlockSizes{Min: 1, Preferred: 4096, Max: 64 << 10}, false},
		{wire.BlockSizes{Min: 512, Preferred: 4096, Max: 32<<20 + 1}, false},
	} {
		if got := badBlockSizes(tt.sizes, size); (got == "") != tt.good {
			t.Errorf("block sizes %+v: %q, want good: %v", tt.sizes, got, tt.good)
		}
	}
	if badBlockSizes(wire.BlockSizes{Min: 512, Preferred: 512, Max: 1 << 20}, size+1) == "" {
		t.Errorf("a size that is no multiple of the minimum is taken")
	}
}

// converse lets f talk to a server that says its part whatever it is
// told, and then closes. It returns how f failed.
func converse(t *testing.T, says []byte, f func(p *peer)) error {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		_, _ = theirs.Write(says)
		_ = theirs.Close()
	}()
	s := &Server{Size: 1 << 20}
	c := &script{s: s, ctx: t.Context(), patience: patience}
	err := c.attempt(func(c *script) {
		c.closers = append(c.closers, func() { _ = ours.Close() })
		f(&peer{
			c: c, raw: ours, conn: ours, pending: map[uint64][]*request{},
			contexts: map[uint32]string{1: wire.ContextAllocation}, export: exportInfo{size: 1 << 20},
		})
	})
	<-done
	return err
}

// be32 and be64 spell integers.
func be32(n ...uint32) (b []byte) {
	for _, n := range n {
		b = be.AppendUint32(b, n)
	}
	return b
}

func be64(n ...uint64) (b []byte) {
	for _, n := range n {
		b = be.AppendUint64(b, n)
	}
	return b
}

// chunkOf is a chunk with its payload, as the form has it, for the request
// that TestRepliesAreHeldToTheRules sends: cookie 7, offset 512.
func chunkOf(f form, t wire.ChunkType, flags wire.ChunkFlags, payload ...[]byte) []byte {
	p := bytes.Join(payload, nil)
	h := wire.Chunk{Flags: flags, Type: t, Cookie: 7, Off: 512, Len: uint64(len(p))}
	if f == extended {
		return append(wire.AppendExtChunk(nil, h), p...)
	}
	return append(wire.AppendChunk(nil, h), p...)
}

func TestRepliesAreHeldToTheRules(t *testing.T) {
	const done, more = wire.ChunkDone, wire.ChunkFlags(0)
	kib := make([]byte, 1024)
	read := wire.Request{Cmd: wire.CmdRead, Off: 512, Len: 1024}
	status := wire.Request{Cmd: wire.CmdExtents, Off: 512, Len: 1024}
	for _, tt := range []struct {
		name   string
		form   form
		r      wire.Request
		script []byte
		want   string // part of the failure, or "" for success
	}{
		{"simple data", simple, read, append(wire.AppendSimpleReply(nil, 0, 7), kib...), ""},
		{"simple error", simple, read, wire.AppendSimpleReply(nil, wire.EIO, 7), ""},
		{"simple short data", simple, read, append(wire.AppendSimpleReply(nil, 0, 7), kib[1:]...), "1023 of 1024"},
		{"other cookie", simple, read, wire.AppendSimpleReply(nil, wire.EIO, 8), "not in flight"},
		{"unknown error", simple, read, wire.AppendSimpleReply(nil, 30, 7), "does not know"},
		{"ENOTSUP without FAST_ZERO", simple, read, wire.AppendSimpleReply(nil, wire.ENOTSUP, 7), "without FAST_ZERO"},
		{"chunk on a simple connection", simple, read, chunkOf(structured, wire.ChunkNone, done), "simple replies"},
		{"simple reply to a structured READ", structured, read, wire.AppendSimpleReply(nil, wire.EIO, 7), "simple reply"},
		{"simple reply on an extended connection", extended, read, wire.AppendSimpleReply(nil, wire.EIO, 7), "extended replies"},
		{"one data chunk", structured, read, chunkOf(structured, wire.ChunkData, done, be64(512), kib), ""},
		{"data and hole, out of order", structured, read, slices.Concat(
			chunkOf(structured, wire.ChunkHole, more, be64(1024), be32(512)),
			chunkOf(structured, wire.ChunkData, done, be64(512), kib[:512])), ""},
		{"data, then NONE", extended, read, slices.Concat(
			chunkOf(extended, wire.ChunkData, more, be64(512), kib), chunkOf(extended, wire.ChunkNone, done)), ""},
		{"gap", structured, read, chunkOf(structured, wire.ChunkData, done, be64(512), kib[:1023]), "succeeds with 1023"},
		{"overlap", structured, read, slices.Concat(
			chunkOf(structured, wire.ChunkData, more, be64(512), kib[:600]),
			chunkOf(structured, wire.ChunkData, done, be64(1000), kib[:536])), "comes twice"},
		{"before the request", structured, read, chunkOf(structured, wire.ChunkData, done, be64(511), kib), "content at 511"},
		{"behind the request", structured, read, chunkOf(structured, wire.ChunkData, done, be64(513), kib), "content at 513"},
		{"empty data chunk", structured, read, chunkOf(structured, wire.ChunkData, more, be64(512)), "data chunk of 8"},
		{"hole of size 0", structured, read, chunkOf(structured, wire.ChunkHole, more, be64(512), be32(0)), "512+0"},
		{"long hole chunk", structured, read, chunkOf(structured, wire.ChunkHole, done, be64(512), be64(1024)), "hole chunk of 16"},
		{"NONE with data", structured, read, chunkOf(structured, wire.ChunkNone, done, kib[:4]), "length 4"},
		{"NONE without DONE", structured, read, chunkOf(structured, wire.ChunkNone, more), "flags 0x0"},
		{"block status to a READ", structured, read, chunkOf(structured, wire.ChunkExtents, done, be32(1, 512, 0)), "chunk NBD_REPLY_TYPE_BLOCK_STATUS"},
		{"split DF", structured, wire.Request{Cmd: wire.CmdRead, Flags: wire.FlagDF, Off: 512, Len: 1024}, slices.Concat(
			chunkOf(structured, wire.ChunkData, more, be64(512), kib[:512]),
			chunkOf(structured, wire.ChunkData, done, be64(1024), kib[:512])), "in 2 chunks"},
		{"error after data", structured, read, slices.Concat(
			chunkOf(structured, wire.ChunkData, more, be64(512), kib[:512]),
			chunkOf(structured, wire.ChunkErrorOffset, done, wire.AppendErrorOffset(nil, wire.EIO, "x", 1024))), ""},
		{"error 0", structured, read, chunkOf(structured, wire.ChunkError, done, wire.AppendError(nil, 0, "x")), "number"},
		{"error with a tail", structured, read, chunkOf(structured, wire.ChunkError, done, wire.AppendError(nil, wire.EIO, "x"), kib[:1]), "8 bytes in all"},
		{"error without its offset", structured, read, chunkOf(structured, wire.ChunkErrorOffset, done, wire.AppendError(nil, wire.EIO, "x")), "truncated"},
		{"other offset in an extended chunk", extended, wire.Request{Cmd: wire.CmdRead, Off: 1024, Len: 512},
			chunkOf(extended, wire.ChunkNone, done), "repeats offset 512"},

		{"status", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1, 512, 0, 4096, 3)), ""},
		{"extended status", extended, status, chunkOf(extended, wire.ChunkExtentsExt, done, be32(1, 2), be64(512, 0, 4096, 3)), ""},
		{"extended status on a structured connection", structured, status, chunkOf(structured, wire.ChunkExtentsExt, done, be32(1, 1), be64(512, 0)), "chunk NBD"},
		{"compact status on an extended connection", extended, status, chunkOf(extended, wire.ChunkExtents, done, be32(1, 512, 0)), "chunk NBD"},
		{"status count", extended, status, chunkOf(extended, wire.ChunkExtentsExt, done, be32(1, 2), be64(512, 0)), "count 2"},
		{"no extent", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1)), "chunk of 4"},
		{"half an extent", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1, 512)), "chunk of 8"},
		{"extent of length 0", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1, 512, 0, 0, 0)), "extent 1 of length 0"},
		{"extent too many", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1, 1024, 0, 512, 0)), "starts past"},
		{"extent past the end", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(1, 1<<20, 0)), "past the end"},
		{"other context", structured, status, chunkOf(structured, wire.ChunkExtents, done, be32(2, 1024, 0)), "context 2"},
		{"context twice", structured, status, slices.Concat(
			chunkOf(structured, wire.ChunkExtents, more, be32(1, 1024, 0)),
			chunkOf(structured, wire.ChunkExtents, done, be32(1, 1024, 0))), "answered twice"},
		{"no context", structured, status, chunkOf(structured, wire.ChunkNone, done), "0 of 1 contexts"},
		{"REQ_ONE with two", structured, wire.Request{Cmd: wire.CmdExtents, Flags: wire.FlagReqOne, Off: 512, Len: 1024},
			chunkOf(structured, wire.ChunkExtents, done, be32(1, 512, 0, 512, 3)), "2 extents"},
		{"REQ_ONE beyond", structured, wire.Request{Cmd: wire.CmdExtents, Flags: wire.FlagReqOne, Off: 512, Len: 1024},
			chunkOf(structured, wire.ChunkExtents, done, be32(1, 2048, 0)), "1 extents of 2048"},
		{"simple success to a status", structured, status, wire.AppendSimpleReply(nil, 0, 7), "simple reply"},
		{"end of stream", structured, read, nil, "0 of 4 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := converse(t, tt.script, func(p *peer) {
				p.form = tt.form
				p.encodeAs(7, tt.r, nil)
				p.next()
			})
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("reply refused: %v", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("reply: got %v, want a failure with %q", err, tt.want)
			}
		})
	}
}

func TestOptionRepliesAreHeldToTheRules(t *testing.T) {
	const name = "disk"
	export := wire.AppendOptReply(nil, wire.OptGo, wire.RepInfo, wire.AppendInfoExport(nil, 1<<20, 1))
	ack := wire.AppendOptReply(nil, wire.OptGo, wire.RepAck, nil)
	for _, tt := range []struct {
		name   string
		script []byte
		want   string
	}{
		{"export, ACK", slices.Concat(export, ack), ""},
		{"ACK alone", ack, "without INFO_EXPORT"},
		{"export twice", slices.Concat(export, export, ack), "twice"},
		{"other option", wire.AppendOptReply(nil, wire.OptInfo, wire.RepAck, nil), "is for NBD_OPT_INFO"},
		{"ACK with data", wire.AppendOptReply(nil, wire.OptGo, wire.RepAck, []byte("x")), "ACK with 1"},
		{"short export", wire.AppendOptReply(nil, wire.OptGo, wire.RepInfo, wire.AppendInfoExport(nil, 1, 1)[:11]), "0 of 20 bytes"},
		{"short export, ACK", slices.Concat(wire.AppendOptReply(nil, wire.OptGo, wire.RepInfo, wire.AppendInfoExport(nil, 1, 1)[:11]), ack), "has 9 bytes"},
		{"server reply", slices.Concat(wire.AppendOptReply(nil, wire.OptGo, wire.RepServer, nil), ack), "before ACK"},
		{"error", wire.AppendOptReply(nil, wire.OptGo, wire.RepErrUnknown, nil), "want success"},
		{"wrong magic", make([]byte, 20), "wrong magic"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := converse(t, tt.script, func(p *peer) { p.info(wire.OptGo, name) })
			if got := err != nil; got != (tt.want != "") || got && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("GO: got %v, want a failure with %q", err, tt.want)
			}
		})
	}
}

func TestTheWayAConnectionEndsIsTold(t *testing.T) {
	for _, tt := range []struct {
		name   string
		script []byte
		expect func(p *peer)
		ok     bool
	}{
		{"closed, wanted closed", nil, func(p *peer) { p.wantClosed("x") }, true},
		{"data, wanted closed", []byte("data"), func(p *peer) { p.wantClosed("x") }, false},
		{"data, wanted the end", []byte("data"), func(p *peer) { p.wantEnd("x") }, true},
		{"closed, wanted a clean end", nil, func(p *peer) { p.wantEOF("x") }, true},
		{"data, wanted a clean end", []byte("data"), func(p *peer) { p.wantEOF("x") }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := converse(t, tt.script, tt.expect); (err == nil) != tt.ok {
				t.Errorf("got %v, want success: %v", err, tt.ok)
			}
		})
	}
	t.Run("still open", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		c := &script{patience: time.Millisecond, closers: []func(){func() { ours.Close() }}}
		if err := c.attempt(func(c *script) { (&peer{c: c, raw: ours, conn: ours}).wantEnd("x") }); err == nil {
			t.Errorf("an open connection counts as closed")
		}
	})
}

package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// replyHeader announces an option reply whose payload may be another.
func replyHeader(o wire.Opt, r wire.Rep, n uint32) []byte {
	b := wire.AppendOptReply(nil, o, r, nil)
	binary.BigEndian.PutUint32(b[16:], n)
	return b
}

// skipTo refuses options until one of kind o has come.
func (p *peer) skipTo(o wire.Opt) {
	for {
		got, _ := p.option()
		if got == o {
			return
		}
		p.reply(got, wire.RepErrUnsup, nil)
	}
}

const fixed = wire.FlagFixedNewstyle | wire.FlagNoZeroes

func greeted(script func(*peer)) func(*peer) {
	return func(p *peer) {
		p.greet(fixed)
		script(p)
		p.drain()
	}
}

// infoReply answers GO with the informations given.
func infoReply(infos ...[]byte) func(*peer) {
	return greeted(func(p *peer) {
		p.skipTo(wire.OptGo)
		for _, i := range infos {
			p.reply(wire.OptGo, wire.RepInfo, i)
		}
		p.reply(wire.OptGo, wire.RepAck, nil)
	})
}

func listReply(payload func(*peer)) func(*peer) {
	return greeted(func(p *peer) {
		p.skipTo(wire.OptList)
		payload(p)
	})
}

func newOp(conn net.Conn) error {
	c, err := New(context.Background(), conn, Options{Contexts: []string{wire.ContextAllocation}})
	if err == nil {
		c.Close()
	}
	return err
}

func listOp(conn net.Conn) error {
	s, err := Negotiate(context.Background(), conn, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.List(context.Background())
	return err
}

func contextsOp(conn net.Conn) error {
	s, err := Negotiate(context.Background(), conn, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.ListContexts(context.Background(), "")
	return err
}

// metaReply accepts structured replies and answers o with the contexts given
// as number and name.
func metaReply(o wire.Opt, contexts ...any) func(*peer) {
	return greeted(func(p *peer) {
		p.skipTo(wire.OptStructuredReply)
		p.reply(wire.OptStructuredReply, wire.RepAck, nil)
		p.skipTo(o)
		for i := 0; i < len(contexts); i += 2 {
			p.reply(o, wire.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, uint32(contexts[i].(int))),
				contexts[i+1].(string)...))
		}
		p.reply(o, wire.RepAck, nil)
	})
}

func TestHostileHandshakeIsAnError(t *testing.T) {
	export := wire.AppendInfoExport(nil, 1<<20, allFlags)
	var many []any
	for i := range limits.MaxContexts + 1 {
		many = append(many, i, fmt.Sprintf("x:%d", i))
	}
	for _, tt := range []struct {
		name   string
		script func(*peer)
		op     func(net.Conn) error
		want   string
	}{
		{"another protocol", func(p *peer) { p.send([]byte("SSH-2.0-OpenSSH_9.2p1 Debian")) }, newOp, "not of an NBD server"},
		{"unknown handshake", func(p *peer) { p.send([]byte("NBDMAGICNBDMAGIC")) }, newOp, "unknown handshake"},
		{"oldstyle of 2^63 bytes", func(p *peer) {
			b := binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), wire.MagicOldstyle)
			p.send(append(binary.BigEndian.AppendUint64(b, 1<<63), make([]byte, 128)...))
		}, newOp, "export of 9223372036854775808 bytes"},
		{"export name of 2^64-1 bytes", func(p *peer) {
			p.greet(0)
			p.option()
			p.send(append(binary.BigEndian.AppendUint64(nil, math.MaxUint64), make([]byte, 126)...))
		}, newOp, "export of 18446744073709551615 bytes"},
		{"wrong reply magic", greeted(func(p *peer) { p.option(); p.send(make([]byte, 20)) }), newOp, "wrong magic"},
		{"reply to another option", greeted(func(p *peer) { p.option(); p.reply(wire.OptList, wire.RepAck, nil) }), newOp, "while"},
		{"reply of 4 GiB", greeted(func(p *peer) {
			o, _ := p.option()
			p.send(replyHeader(o, wire.RepErrUnsup, math.MaxUint32))
		}), newOp, "reply of 4294967295 bytes"},
		{"ack with payload", greeted(func(p *peer) {
			o, _ := p.option()
			p.reply(o, wire.RepAck, []byte("x"))
		}), newOp, "acknowledged with 1 bytes"},
		{"unknown reply to an option without replies", greeted(func(p *peer) {
			o, _ := p.option()
			p.reply(o, wire.RepServer, []byte("x"))
		}), newOp, "more than 0 replies"},
		{"go without a size", infoReply(), newOp, "without a size"},
		{"go with 2^63 bytes", infoReply(wire.AppendInfoExport(nil, 1<<63, 0)), newOp, "export of 9223372036854775808 bytes"},
		{"short export information", infoReply(export[:11]), newOp, "information of 9 bytes"},
		{"empty information", infoReply(nil), newOp, "of 0 bytes"},
		{"block size of zero", infoReply(export, wire.AppendInfoBlockSize(nil, wire.BlockSizes{Preferred: 4096, Max: 4096})), newOp, "block sizes 0"},
		{"block size of three", infoReply(export, wire.AppendInfoBlockSize(nil, wire.BlockSizes{Min: 3, Preferred: 4096, Max: 4096})), newOp, "block sizes 3"},
		{"maximum below minimum", infoReply(export, wire.AppendInfoBlockSize(nil, wire.BlockSizes{Min: 512, Preferred: 512, Max: 1})), newOp, "block sizes 512"},
		{"short block size", infoReply(export, wire.AppendInfoBlockSize(nil, wire.BlockSizes{})[:8]), newOp, "block size information of 6"},
		{"long name", infoReply(export, wire.AppendInfoText(nil, wire.InfoName, strings.Repeat("x", 4097))), newOp, "text of 4097 bytes"},
		{"endless information", greeted(func(p *peer) {
			p.skipTo(wire.OptGo)
			for {
				p.reply(wire.OptGo, wire.RepInfo, []byte{9, 9})
			}
		}), newOp, "more than 64 replies"},
		{"list entry of 4 GiB", listReply(func(p *peer) {
			p.send(replyHeader(wire.OptList, wire.RepServer, math.MaxUint32))
		}), listOp, "reply of 4294967295 bytes"},
		{"list name beyond its reply", listReply(func(p *peer) {
			p.reply(wire.OptList, wire.RepServer, []byte{0xff, 0xff, 0xff, 0xff, 'x'})
		}), listOp, "of 5 bytes in a list"},
		{"list name of 4097 bytes", listReply(func(p *peer) {
			p.reply(wire.OptList, wire.RepServer, wire.AppendString(nil, strings.Repeat("x", 4097)))
		}), listOp, "in a list"},
		{"endless list", listReply(func(p *peer) {
			for {
				p.reply(wire.OptList, wire.RepServer, wire.AppendString(nil, "x"))
			}
		}), listOp, "more than 10000 replies"},
		{"context number twice", metaReply(wire.OptSetMeta, 1, "a:b", 1, "a:c"), newOp, "twice"},
		{"context name twice", metaReply(wire.OptSetMeta, 1, "a:b", 2, "a:b"), newOp, "twice"},
		{"context without a name", metaReply(wire.OptSetMeta, 1, ""), newOp, "of 4 bytes"},
		{"too many contexts", metaReply(wire.OptSetMeta, many...), newOp, "more than 16 replies"},
		{"context name of 4097 bytes", metaReply(wire.OptListMeta, 1, strings.Repeat("x", 4097)), contextsOp, "of 4101 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.op(serve(t, tt.script))
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want a protocol error with %q", err, tt.want)
			}
		})
	}
}

func TestRefusalIsAnOptionError(t *testing.T) {
	for _, rep := range []wire.Rep{wire.RepErrPolicy, wire.RepErrUnknown, wire.RepErrShutdown, wire.RepErrTLSReqd} {
		err := newOp(serve(t, greeted(func(p *peer) {
			p.skipTo(wire.OptGo)
			p.reply(wire.OptGo, rep, []byte("no \x1b[31mway"))
		})))
		var e *OptionError
		if !errors.As(err, &e) || e.Rep != rep || e.Opt != wire.OptGo {
			t.Errorf("%v: got %v", rep, err)
		}
		if strings.ContainsRune(err.Error(), 0x1b) {
			t.Errorf("%q carries the server's control characters", err)
		}
	}
}

func TestTLSRequiredIsNotAnsweredByFallingBack(t *testing.T) {
	err := newOp(serve(t, greeted(func(p *peer) {
		o, _ := p.option()
		p.reply(o, wire.RepErrTLSReqd, nil)
	})))
	var e *OptionError
	if !errors.As(err, &e) || e.Rep != wire.RepErrTLSReqd || !e.Refused() {
		t.Errorf("got %v", err)
	}
}

func TestServerWithoutGoIsOpenedByName(t *testing.T) {
	conn := serve(t, func(p *peer) {
		p.greet(wire.FlagFixedNewstyle)
		p.skipTo(wire.OptGo)
		p.reply(wire.OptGo, wire.RepErrUnsup, nil)
		if o, name := p.option(); o != wire.OptExportName || string(name) != "disk" {
			return
		}
		b := binary.BigEndian.AppendUint64(nil, 12345)
		p.send(append(binary.BigEndian.AppendUint16(b, uint16(wire.HasFlags)), make([]byte, 124)...))
		r, _ := p.request()
		p.simple(r, wire.OK)
		p.send([]byte("abc"))
		p.drain()
	})
	c, err := New(t.Context(), conn, Options{Export: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, 3)
	if err := c.ReadAt(t.Context(), got, 0); err != nil || string(got) != "abc" || c.Export().Size != 12345 {
		t.Errorf("read %q, %v of %d bytes", got, err, c.Export().Size)
	}
}

func TestOldstyleServerHasNoNamedExport(t *testing.T) {
	conn := serve(t, func(p *peer) {
		b := binary.BigEndian.AppendUint64([]byte("NBDMAGIC"), wire.MagicOldstyle)
		p.send(append(binary.BigEndian.AppendUint64(b, 512), make([]byte, 128)...))
		p.drain()
	})
	if _, err := New(t.Context(), conn, Options{Export: "disk"}); err == nil {
		t.Error("a named export of an oldstyle server was opened")
	}
}

func readOp(c *Client) error { return c.ReadAt(context.Background(), make([]byte, 4096), 8192) }
func writeOp(c *Client) error {
	return c.WriteAt(context.Background(), make([]byte, 4096), 8192, 0)
}
func statusOp(c *Client) error {
	_, err := c.Extents(context.Background(), 8192, 4096, 0)
	return err
}
func oneOp(c *Client) error {
	_, err := c.Extents(context.Background(), 8192, 4096, wire.FlagReqOne)
	return err
}

// respond answers the first request.
func respond(answer func(p *peer, r wire.Request)) func(*peer) {
	return func(p *peer) {
		r, _ := p.request()
		answer(p, r)
	}
}

func one(t wire.ChunkType, payload []byte) func(*peer) {
	return respond(func(p *peer, r wire.Request) { p.chunk(r, wire.ChunkDone, t, payload) })
}

func hole(off uint64, n uint32) []byte { return wire.AppendHole(nil, off, n) }

func TestHostileReplyEndsTheConnection(t *testing.T) {
	full := make([]byte, 4096)
	for _, tt := range []struct {
		name    string
		replies Replies
		script  func(*peer)
		op      func(*Client) error
		want    string
	}{
		{"wrong magic", Simple, respond(func(p *peer, r wire.Request) { p.send(make([]byte, 16)) }), readOp, "begins with"},
		{"chunk among simple replies", Simple, one(wire.ChunkNone, nil), readOp, "begins with"},
		{"simple reply among extended ones", Extended, respond(func(p *peer, r wire.Request) { p.simple(r, wire.EIO) }), readOp, "begins with"},
		{"compact chunk among extended ones", Extended, respond(func(p *peer, r wire.Request) {
			p.send(wire.AppendChunk(nil, wire.Chunk{Flags: 1, Cookie: r.Cookie}))
		}), writeOp, "begins with"},
		{"unknown cookie", Simple, respond(func(p *peer, r wire.Request) { r.Cookie += 7; p.simple(r, wire.OK) }), writeOp, "cookie"},
		{"unknown cookie of a chunk", Structured, respond(func(p *peer, r wire.Request) { r.Cookie = 0; p.chunk(r, 1, wire.ChunkNone, nil) }), writeOp, "cookie"},
		{"simple success to a read", Structured, respond(func(p *peer, r wire.Request) { p.simple(r, wire.OK); p.send(full) }), readOp, "simple reply"},
		{"simple success to block status", Structured, respond(func(p *peer, r wire.Request) { p.simple(r, wire.OK) }), statusOp, "simple reply"},
		{"simple reply behind a chunk", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full[:1]))
			p.simple(r, wire.EIO)
		}), readOp, "behind chunks"},
		{"nothing as the whole of a read", Structured, one(wire.ChunkNone, nil), readOp, "ends with 0"},
		{"half of a read", Structured, one(wire.ChunkData, data(8192, full[:2048])), readOp, "ends with 2048"},
		{"read with a gap", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full[:100]))
			p.chunk(r, 1, wire.ChunkData, data(8192+101, full[:4096-101]))
		}), readOp, "ends with 4095"},
		{"data before the request", Structured, one(wire.ChunkData, data(8191, full)), readOp, "piece"},
		{"data behind the request", Structured, one(wire.ChunkData, data(8193, full)), readOp, "piece"},
		{"data far away", Structured, one(wire.ChunkData, data(math.MaxUint64, full)), readOp, "piece"},
		{"data longer than the request", Structured, one(wire.ChunkData, data(8192, make([]byte, 4097))), readOp, "4105 bytes"},
		{"data of 4 GiB", Structured, respond(func(p *peer, r wire.Request) { p.header(r, 1, wire.ChunkData, math.MaxUint32) }), readOp, "4294967295 bytes"},
		{"data of no bytes", Structured, one(wire.ChunkData, data(8192, nil)), readOp, "of 8 bytes"},
		{"data without an offset", Structured, one(wire.ChunkData, make([]byte, 7)), readOp, "of 7 bytes"},
		{"data twice", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full[:2048]))
			p.chunk(r, 1, wire.ChunkData, data(8192+2047, full[:2049]))
		}), readOp, "overlap"},
		{"hole over data", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full[:2048]))
			p.chunk(r, 1, wire.ChunkHole, hole(8192, 4096))
		}), readOp, "overlap"},
		{"hole of no bytes", Structured, one(wire.ChunkHole, hole(8192, 0)), readOp, "piece"},
		{"hole behind the request", Structured, one(wire.ChunkHole, hole(8192, 4097)), readOp, "piece"},
		{"hole at the end of the world", Structured, one(wire.ChunkHole, hole(math.MaxUint64, math.MaxUint32)), readOp, "piece"},
		{"short hole", Structured, one(wire.ChunkHole, hole(8192, 4096)[:11]), readOp, "of 11 bytes"},
		{"data to a write", Structured, one(wire.ChunkData, data(8192, full)), writeOp, "to NBD_CMD_WRITE"},
		{"extents to a read", Structured, one(wire.ChunkExtents, extents(1, 4096, 0)), readOp, "to NBD_CMD_READ"},
		{"none with payload", Structured, one(wire.ChunkNone, full), writeOp, "with 4096 bytes"},
		{"none that is not the last", Structured, respond(func(p *peer, r wire.Request) { p.chunk(r, 0, wire.ChunkNone, nil) }), writeOp, "flags 0x0"},
		{"unknown chunk", Structured, one(77, nil), readOp, "NBD_REPLY_TYPE_77"},
		{"error of 4 GiB", Structured, respond(func(p *peer, r wire.Request) { p.header(r, 1, wire.ChunkError, math.MaxUint32) }), readOp, "4294967295 bytes"},
		{"error without a number", Structured, one(wire.ChunkError, []byte{0, 0, 0, 5}), readOp, "of 4 bytes"},
		{"error that is none", Structured, one(wire.ChunkError, wire.AppendError(nil, wire.OK, "fine")), readOp, "without an error"},
		{"error text beyond its chunk", Structured, one(wire.ChunkError, wire.AppendError(nil, wire.EIO, "text")[:8]), readOp, "does not fit"},
		{"error chunk longer than its text", Structured, one(wire.ChunkError, append(wire.AppendError(nil, wire.EIO, "text"), 0)), readOp, "does not fit"},
		{"error of unknown type without a text", Structured, one(1<<15+9, []byte{0, 0, 0, 5, 9, 9}), readOp, "does not fit"},
		{"error elsewhere", Structured, one(wire.ChunkErrorOffset, wire.AppendErrorOffset(nil, wire.EIO, "", 8191)), readOp, "error at 8191"},
		{"endless errors", Structured, respond(func(p *peer, r wire.Request) {
			for {
				p.chunk(r, 0, wire.ChunkError, wire.AppendError(nil, wire.EIO, ""))
			}
		}), readOp, "more than 1024 errors"},
		{"reply for another offset", Extended, respond(func(p *peer, r wire.Request) { r.Off++; p.chunk(r, 1, wire.ChunkNone, nil) }), writeOp, "offset 8193"},
		{"extended data of 2^63 bytes", Extended, respond(func(p *peer, r wire.Request) { p.header(r, 1, wire.ChunkData, math.MaxInt64) }), readOp, "9223372036854775807 bytes"},
		{"no extents", Structured, one(wire.ChunkNone, nil), statusOp, "without context 1"},
		{"extents of no context", Structured, one(wire.ChunkExtents, extents(9, 4096, 0)), statusOp, "context 9"},
		{"extents twice", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkExtents, extents(1, 4096, 0))
			p.chunk(r, 1, wire.ChunkExtents, extents(1, 4096, 0))
		}), statusOp, "twice"},
		{"empty list of extents", Structured, one(wire.ChunkExtents, extents(1)), statusOp, "of 4 bytes"},
		{"ragged list of extents", Structured, one(wire.ChunkExtents, extents(1, 4096, 0, 1)), statusOp, "of 16 bytes"},
		{"extent of no bytes", Structured, one(wire.ChunkExtents, extents(1, 0, 0)), statusOp, "extent of no bytes"},
		{"extent behind the end", Structured, one(wire.ChunkExtents, extents(1, 4096, 0, 1, 0)), statusOp, "behind the end"},
		{"two extents for one", Structured, one(wire.ChunkExtents, extents(1, 1, 0, 1, 1)), oneOp, "one was asked for"},
		{"2^20+1 extents", Structured, respond(func(p *peer, r wire.Request) {
			p.header(r, 1, wire.ChunkExtents, 4+8*(1<<20+1))
		}), statusOp, "of 8388620 bytes"},
		{"64-bit extents in compact form", Structured, one(wire.ChunkExtentsExt, extents64(1, 4096, 0)), statusOp, "to NBD_CMD_BLOCK_STATUS"},
		{"compact extents in 64-bit form", Extended, one(wire.ChunkExtents, extents(1, 4096, 0)), statusOp, "to NBD_CMD_BLOCK_STATUS"},
		{"64-bit extent of no bytes", Extended, one(wire.ChunkExtentsExt, extents64(1, 0, 0)), statusOp, "extent of no bytes"},
		{"64-bit extents that overflow", Extended, one(wire.ChunkExtentsExt, extents64(1, 1<<63, 0, 1<<63, 0)), statusOp, "behind the end"},
		{"64-bit state of base:allocation", Extended, one(wire.ChunkExtentsExt, extents64(1, 4096, 1<<32)), statusOp, "state 0x100000000"},
		{"wrong count of 64-bit extents", Extended, respond(func(p *peer, r wire.Request) {
			b := extents64(1, 4096, 0)
			b[7] = 2
			p.chunk(r, 1, wire.ChunkExtentsExt, b)
		}), statusOp, "counts 2"},
		{"64-bit extents of 2^64-8 bytes", Extended, respond(func(p *peer, r wire.Request) {
			c := wire.Chunk{Flags: 1, Type: wire.ChunkExtentsExt, Cookie: r.Cookie, Off: r.Off, Len: math.MaxUint64 - 7}
			p.send(wire.AppendExtChunk(nil, c))
		}), statusOp, "bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, terms{replies: tt.replies, contexts: []string{wire.ContextAllocation}}, tt.script)
			err := tt.op(c)
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want a protocol error with %q", err, tt.want)
			}
			if err := writeOp(c); !errors.Is(err, ErrClosed) {
				t.Errorf("the next request: %v, want %v", err, ErrClosed)
			}
		})
	}
}

func TestReadInTooManyPiecesEndsTheConnection(t *testing.T) {
	c := dial(t, terms{replies: Structured}, respond(func(p *peer, r wire.Request) {
		for i := uint64(0); ; i += 2 {
			p.chunk(r, 0, wire.ChunkHole, hole(r.Off+i, 1))
		}
	}))
	err := c.ReadAt(t.Context(), make([]byte, 1<<20), 0)
	if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), "pieces") {
		t.Errorf("got %v", err)
	}
}

func TestErrorIsNeverTurnedIntoZeroes(t *testing.T) {
	full := bytes.Repeat([]byte{'x'}, 4096)
	for _, tt := range []struct {
		name    string
		replies Replies
		script  func(*peer)
		want    wire.Errno
	}{
		{"simple", Simple, respond(func(p *peer, r wire.Request) { p.simple(r, wire.EIO) }), wire.EIO},
		{"simple among structured", Structured, respond(func(p *peer, r wire.Request) { p.simple(r, wire.EINVAL) }), wire.EINVAL},
		{"unknown number", Simple, respond(func(p *peer, r wire.Request) { p.simple(r, 0xffffffff) }), 0xffffffff},
		{"chunk", Structured, one(wire.ChunkError, wire.AppendError(nil, wire.ENOMEM, "no memory")), wire.ENOMEM},
		{"unknown type", Structured, one(1<<15+9, append(wire.AppendError(nil, wire.EIO, "odd"), 1, 2, 3)), wire.EIO},
		{"after all data", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full))
			p.chunk(r, 1, wire.ChunkError, wire.AppendError(nil, wire.EIO, "too late"))
		}), wire.EIO},
		{"with an offset, before the last data", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192, full[:100]))
			p.chunk(r, 0, wire.ChunkErrorOffset, wire.AppendErrorOffset(nil, wire.EIO, "", 8192+50))
			p.chunk(r, 1, wire.ChunkData, data(8192+100, full[100:]))
		}), wire.EIO},
		{"the first of two", Structured, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkError, wire.AppendError(nil, wire.ENOSPC, ""))
			p.chunk(r, 0, wire.ChunkError, wire.AppendError(nil, wire.EIO, ""))
			p.chunk(r, 1, wire.ChunkNone, nil)
		}), wire.ENOSPC},
		{"extended", Extended, one(wire.ChunkError, wire.AppendError(nil, wire.EOVERFLOW, "")), wire.EOVERFLOW},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, terms{replies: tt.replies}, func(p *peer) {
				tt.script(p)
				r, _ := p.request()
				if tt.replies == Extended {
					p.chunk(r, 1, wire.ChunkNone, nil)
				} else {
					p.simple(r, wire.OK)
				}
			})
			err := readOp(c)
			var e *Error
			if !errors.As(err, &e) || e.Errno != tt.want || e.Off != 8192 || e.Len != 4096 {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if err := writeOp(c); err != nil {
				t.Errorf("the connection did not survive: %v", err)
			}
		})
	}
}

func TestPiecesOfAReadArriveInAnyOrder(t *testing.T) {
	want := make([]byte, 4096)
	for i := range want {
		want[i] = byte(i)
	}
	clear(want[1000:2000])
	for _, replies := range []Replies{Structured, Extended} {
		c := dial(t, terms{replies: replies}, respond(func(p *peer, r wire.Request) {
			p.chunk(r, 0, wire.ChunkData, data(8192+3000, want[3000:]))
			p.chunk(r, 0, wire.ChunkHole, hole(8192+1000, 1000))
			p.chunk(r, 0, wire.ChunkData, data(8192+2000, want[2000:3000]))
			p.chunk(r, 0, wire.ChunkData, data(8192, want[:1000]))
			p.chunk(r, 1, wire.ChunkNone, nil)
		}))
		got := bytes.Repeat([]byte{0xa5}, 4096)
		if err := c.ReadAt(t.Context(), got, 8192); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%v: error %v, equal %v", replies, err, bytes.Equal(got, want))
		}
	}
}

func TestExtentsAreCutToTheRequest(t *testing.T) {
	for _, tt := range []struct {
		replies Replies
		chunk   wire.ChunkType
		payload []byte
	}{
		{Structured, wire.ChunkExtents, extents(1, 1000, 3, math.MaxUint32, 0)},
		{Extended, wire.ChunkExtentsExt, extents64(1, 1000, 3, math.MaxUint64, 0)},
	} {
		c := dial(t, terms{replies: tt.replies, contexts: []string{wire.ContextAllocation}}, one(tt.chunk, tt.payload))
		got, err := c.Extents(t.Context(), 8192, 4096, 0)
		if err != nil || len(got) != 1 || len(got[0]) != 2 ||
			got[0][0] != (Extent{8192, 1000, 3}) || got[0][1] != (Extent{9192, 3096, 0}) {
			t.Errorf("%v: got %v, %v", tt.replies, got, err)
		}
	}
}

func TestSeveralContextsComeInTheirOwnOrder(t *testing.T) {
	names := []string{wire.ContextAllocation, "qemu:dirty-bitmap:b", "x:y"}
	c := dial(t, terms{replies: Extended, contexts: names}, respond(func(p *peer, r wire.Request) {
		p.chunk(r, 0, wire.ChunkExtentsExt, extents64(3, 4096, 1<<63))
		p.chunk(r, 0, wire.ChunkExtentsExt, extents64(1, 4096, 3))
		p.chunk(r, 1, wire.ChunkExtentsExt, extents64(2, 100, 1, 3996, 0))
	}))
	got, err := c.Extents(t.Context(), 8192, 4096, 0)
	if err != nil || fmt.Sprint(c.Export().Contexts) != fmt.Sprint(names) {
		t.Fatalf("contexts %q, %v", c.Export().Contexts, err)
	}
	want := "[[{8192 4096 3}] [{8192 100 1} {8292 3996 0}] [{8192 4096 9223372036854775808}]]"
	if fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestHandoverGivesAwayAnUntouchedConnection(t *testing.T) {
	conn := serve(t, func(p *peer) {
		p.haggle(terms{size: 1 << 20, flags: allFlags})
		if r, _ := p.request(); r.Cookie != 9 || p.ext {
			panic("not the request of the test")
		}
		p.send([]byte("answer"))
		p.drain()
	})
	s, err := Negotiate(t.Context(), conn, Options{Replies: Simple})
	must(t, err)
	got, e, err := s.Handover(t.Context(), "disk")
	must(t, err)
	if got != conn || e.Name != "disk" || e.Size != 1<<20 || e.Flags != allFlags || s.Replies() != Simple {
		t.Errorf("another connection, or export %+v", e)
	}
	_, err = got.Write(wire.AppendRequest(nil, wire.Request{Cmd: wire.CmdRead, Cookie: 9, Len: 512}))
	must(t, err)
	b := make([]byte, 6)
	if _, err = io.ReadFull(got, b); err != nil || string(b) != "answer" {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestHandoverOfABufferedByteBreaksTheProtocol(t *testing.T) {
	conn := serve(t, greeted(func(p *peer) {
		p.skipTo(wire.OptGo)
		b := wire.AppendOptReply(nil, wire.OptGo, wire.RepInfo, wire.AppendInfoExport(nil, 1<<20, allFlags))
		p.send(append(wire.AppendOptReply(b, wire.OptGo, wire.RepAck, nil), 'x'))
	}))
	s, err := Negotiate(t.Context(), conn, Options{Replies: Simple})
	must(t, err)
	if _, _, err := s.Handover(t.Context(), "disk"); !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v", err)
	}
	if _, err := conn.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is left open: %v", err)
	}
}

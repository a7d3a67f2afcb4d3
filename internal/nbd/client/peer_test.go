package client

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// sockets returns two connected ends.
func sockets(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return ends[0], ends[1]
}

// peer is the server's end of a scripted conversation. Its methods end the
// script when the client is gone.
type peer struct {
	conn   io.ReadWriteCloser
	ext    bool
	budget int // bytes that may still be sent; negative: all
}

// serve runs the script against the connection that it returns; the test
// waits for its end.
func serve(t testing.TB, script func(*peer)) net.Conn {
	t.Helper()
	client, server := sockets(t)
	done := make(chan struct{})
	t.Cleanup(func() {
		client.Close()
		<-done
	})
	go func() {
		defer close(done)
		defer server.Close()
		script(&peer{conn: server, budget: -1})
	}()
	return client
}

func (p *peer) send(b []byte) {
	if p.budget >= 0 {
		b = b[:min(len(b), p.budget)]
		p.budget -= len(b)
	}
	if _, err := p.conn.Write(b); err != nil || p.budget == 0 {
		runtime.Goexit()
	}
}

func (p *peer) recv(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(p.conn, b); err != nil {
		runtime.Goexit()
	}
	return b
}

func (p *peer) greet(flags uint16) {
	p.send(binary.BigEndian.AppendUint16([]byte("NBDMAGICIHAVEOPT"), flags))
	p.recv(4)
}

func (p *peer) option() (wire.Opt, []byte) {
	o, err := wire.DecodeOption(p.recv(wire.OptionHeaderSize))
	if err != nil {
		panic(err)
	}
	return o.Opt, p.recv(int(o.Len))
}

func (p *peer) reply(o wire.Opt, r wire.Rep, payload []byte) {
	p.send(wire.AppendOptReply(nil, o, r, payload))
}

// terms is what a scripted server offers.
type terms struct {
	replies  Replies
	size     uint64
	flags    wire.ExportFlags
	blocks   wire.BlockSizes
	contexts []string
}

const allFlags = wire.HasFlags | wire.SendFlush | wire.SendFUA | wire.SendTrim | wire.SendZero |
	wire.SendDF | wire.SendCache | wire.SendFastZero | wire.CanMultiConn

// haggle answers options properly until GO has succeeded.
func (p *peer) haggle(a terms) {
	p.greet(wire.FlagFixedNewstyle | wire.FlagNoZeroes)
	for {
		o, payload := p.option()
		switch {
		case o == wire.OptExtendedHeaders && a.replies == Extended:
			p.ext = true
			p.reply(o, wire.RepAck, nil)
		case o == wire.OptStructuredReply && a.replies == Structured:
			p.reply(o, wire.RepAck, nil)
		case o == wire.OptList:
			p.reply(o, wire.RepServer, append(wire.AppendString(nil, "one"), "the first"...))
			p.reply(o, wire.RepServer, wire.AppendString(nil, ""))
			p.reply(o, wire.RepAck, nil)
		case o == wire.OptListMeta, o == wire.OptSetMeta:
			for i, c := range a.contexts {
				p.reply(o, wire.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, uint32(i+1)), c...))
			}
			p.reply(o, wire.RepAck, nil)
		case o == wire.OptInfo, o == wire.OptGo:
			p.info(o, a)
			if o == wire.OptGo {
				return
			}
		case o == wire.OptAbort:
			p.reply(o, wire.RepAck, nil)
			return
		case o == wire.OptExportName:
			_ = payload
			p.send(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(nil, a.size), uint16(a.flags)))
			return
		default:
			p.reply(o, wire.RepErrUnsup, []byte("what?"))
		}
	}
}

func (p *peer) info(o wire.Opt, a terms) {
	p.reply(o, wire.RepInfo, wire.AppendInfoExport(nil, a.size, a.flags))
	p.reply(o, wire.RepInfo, wire.AppendInfoText(nil, wire.InfoName, "canonical"))
	p.reply(o, wire.RepInfo, wire.AppendInfoText(nil, wire.InfoDescription, "a disk"))
	if a.blocks != (wire.BlockSizes{}) {
		p.reply(o, wire.RepInfo, wire.AppendInfoBlockSize(nil, a.blocks))
	}
	p.reply(o, wire.RepInfo, []byte{0x77, 0x77, 1, 2, 3}) // not known to anybody
	p.reply(o, wire.RepAck, nil)
}

func (p *peer) request() (r wire.Request, payload []byte) {
	var err error
	if p.ext {
		r, err = wire.DecodeExtRequest(p.recv(wire.ExtRequestSize))
	} else {
		r, err = wire.DecodeRequest(p.recv(wire.RequestSize))
	}
	if err != nil {
		panic(err)
	}
	if r.Cmd == wire.CmdWrite {
		payload = p.recv(int(r.Len))
	}
	return r, payload
}

// chunk sends one chunk of the answer to r in the form that was agreed.
func (p *peer) chunk(r wire.Request, f wire.ChunkFlags, t wire.ChunkType, payload []byte) {
	p.header(r, f, t, len(payload))
	p.send(payload)
}

// header announces a chunk whose payload may be another.
func (p *peer) header(r wire.Request, f wire.ChunkFlags, t wire.ChunkType, n int) {
	c := wire.Chunk{Flags: f, Type: t, Cookie: r.Cookie, Off: r.Off, Len: uint64(n)}
	if p.ext {
		p.send(wire.AppendExtChunk(nil, c))
	} else {
		p.send(wire.AppendChunk(nil, c))
	}
}

func (p *peer) simple(r wire.Request, e wire.Errno) {
	p.send(wire.AppendSimpleReply(nil, e, r.Cookie))
}

// drain reads until the client hangs up.
func (p *peer) drain() { io.Copy(io.Discard, p.conn) }

// data is the payload of a data chunk.
func data(off uint64, b []byte) []byte {
	return append(binary.BigEndian.AppendUint64(nil, off), b...)
}

// extents is the payload of a block status chunk: pairs of length and flags.
func extents(id uint32, pairs ...uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, id)
	for _, v := range pairs {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

// extents64 is the payload of an extended block status chunk.
func extents64(id uint32, pairs ...uint64) []byte {
	b := binary.BigEndian.AppendUint32(nil, id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(pairs)/2))
	for _, v := range pairs {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// dial opens a client on a scripted server with the terms a and leaves the
// transmission phase to the script.
func dial(t testing.TB, a terms, script func(*peer)) *Client {
	t.Helper()
	if a.flags == 0 {
		a.flags = allFlags
	}
	if a.size == 0 {
		a.size = 1 << 20
	}
	conn := serve(t, func(p *peer) {
		p.haggle(a)
		script(p)
		p.drain()
	})
	c, err := New(context.Background(), conn, Options{Contexts: a.contexts})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

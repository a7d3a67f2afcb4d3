package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// haggle connects and sends the flags of a modern client.
func (r *rig) haggle() net.Conn {
	r.t.Helper()
	c := r.dial(r.t)
	c.SetDeadline(time.Now().Add(hangLimit))
	r.expect(c, 18)
	r.send(c, clientFlags(nil))
	return c
}

// told is one reply to an option, all of it.
type told struct {
	rep  wire.Rep
	data string
}

func (a told) String() string { return fmt.Sprintf("%v %q", a.rep, a.data) }

// option sends an option and reads its replies; the last one is ACK or an error.
func (r *rig) option(c net.Conn, o wire.Opt, payload string) (l []told) {
	r.t.Helper()
	r.send(c, wire.AppendOption(nil, o, []byte(payload)))
	for {
		to, got := r.told(c)
		if to != o {
			r.t.Fatalf("reply to %v: got one to %v", o, to)
		}
		l = append(l, got)
		if got.rep == wire.RepAck || got.rep.IsError() {
			return l
		}
	}
}

// told reads one reply, and says to what.
func (r *rig) told(c net.Conn) (wire.Opt, told) {
	r.t.Helper()
	h, err := wire.DecodeOptReply(r.expect(c, wire.OptReplyHeaderSize))
	if err != nil {
		r.t.Fatal(err)
	}
	return h.Opt, told{h.Rep, string(r.expect(c, int(h.Len)))}
}

func infoRequest(name string, infos ...wire.Info) string {
	return string(wire.AppendInfoRequest(nil, wire.InfoRequest{Name: name, Infos: infos}))
}

func metaRequest(name string, queries ...string) string {
	return string(wire.AppendMetaRequest(nil, wire.MetaRequest{Name: name, Queries: queries}))
}

// contextReply is the payload of a META_CONTEXT reply.
func contextReply(id uint32, name string) string {
	return string(binary.BigEndian.AppendUint32(nil, id)) + name
}

func infoText(i wire.Info, text string) string { return string(wire.AppendInfoText(nil, i, text)) }

// TestOptionsAreAnsweredInFull: what is sent to the last byte, for what clients
// may ignore and nothing else notices: texts, names and numbers.
func TestOptionsAreAnsweredInFull(t *testing.T) {
	const flags = fullFlags | wire.SendFastZero
	ack := told{rep: wire.RepAck}
	export := told{wire.RepInfo, string(wire.AppendInfoExport(nil, 1<<20, flags))}
	sizes := told{wire.RepInfo, string(wire.AppendInfoBlockSize(nil, wire.BlockSizes{Min: 1, Preferred: 4096, Max: limits.AdvertisedIO}))}
	for _, tt := range []struct {
		name    string
		change  func(*Options) // may be nil
		opt     wire.Opt
		payload string
		want    []told
	}{
		{"list", nil, wire.OptList, "", []told{{wire.RepServer, "\x00\x00\x00\x04diska disk"}, ack}},
		{"info of an alias", nil, wire.OptInfo, infoRequest("", wire.InfoName, wire.InfoDescription), []told{
			export, {wire.RepInfo, infoText(wire.InfoName, "disk")}, {wire.RepInfo, infoText(wire.InfoDescription, "a disk")}, sizes, ack,
		}},
		{"info unasked", nil, wire.OptInfo, infoRequest("disk"), []told{export, sizes, ack}},
		{"contexts listed", nil, wire.OptListMeta, metaRequest(""), []told{
			{wire.RepMetaContext, contextReply(0, wire.ContextAllocation)},
			{wire.RepMetaContext, contextReply(0, depthContext)},
			{wire.RepMetaContext, contextReply(0, bitmapContext)}, ack,
		}},
		{"contexts selected", nil, wire.OptSetMeta, metaRequest("disk", bitmapContext, wire.ContextAllocation), []told{
			{wire.RepMetaContext, contextReply(0, wire.ContextAllocation)},
			{wire.RepMetaContext, contextReply(2, bitmapContext)}, ack,
		}},
		{"unknown option", nil, 99, "", []told{{wire.RepErrUnsup, "option is not supported"}}},
		{"unknown export", nil, wire.OptInfo, infoRequest("other"), []told{{wire.RepErrUnknown, "no such export"}}},
		{"data of list", nil, wire.OptList, "x", []told{{wire.RepErrInvalid, "option takes no data"}}},
		{"malformed info", nil, wire.OptInfo, "x", []told{{wire.RepErrInvalid, "malformed request"}}},
		{"malformed query", nil, wire.OptSetMeta, metaRequest("disk", "x"), []told{{wire.RepErrInvalid, "malformed query"}}},
		{"tls", nil, wire.OptStartTLS, "", []told{{wire.RepErrUnsup, "TLS is not enabled"}}},
		{"structured replies twice", nil, wire.OptStructuredReply, "", []told{{wire.RepErrInvalid, "structured replies are already in use"}}},
		{"no contexts to list", func(o *Options) { o.NoMeta = true }, wire.OptListMeta, metaRequest("disk"), []told{{wire.RepErrUnsup, "metadata contexts are turned off"}}},
		{"no contexts to select", func(o *Options) { o.NoMeta = true }, wire.OptSetMeta, metaRequest("disk", wire.ContextAllocation), []told{{wire.RepErrUnsup, "metadata contexts are turned off"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := describedRig(t)
			if tt.change != nil {
				tt.change(&r.opt)
			}
			c := r.haggle()
			r.option(c, wire.OptStructuredReply, "")
			if got := r.option(c, tt.opt, tt.payload); !slices.Equal(got, tt.want) {
				t.Errorf("%v: got %v, want %v", tt.opt, got, tt.want)
			}
		})
	}
}

// TestContextsOfAnAliasAreThoseOfTheExport: they are selected by one name and
// used by another.
func TestContextsOfAnAliasAreThoseOfTheExport(t *testing.T) {
	for _, names := range [][2]string{{"", "disk"}, {"disk", ""}} {
		r := describedRig(t)
		c := r.haggle()
		r.option(c, wire.OptStructuredReply, "")
		r.option(c, wire.OptSetMeta, metaRequest(names[0], wire.ContextAllocation))
		r.option(c, wire.OptGo, infoRequest(names[1]))
		k := &chunkReader{rig: r, send: func(b []byte) { r.send(c, b) }, expect: func(n int) []byte { return r.expect(c, n) }}
		if typ, p := k.do(wire.Request{Cmd: wire.CmdExtents, Len: 1 << 20}); typ != wire.ChunkExtents {
			t.Errorf("contexts selected for %q, opened by %q: extents are %v %q", names[0], names[1], typ, p)
		}
	}
}

// TestGreetingIsMasked: only what the mask leaves is offered, and taken.
func TestGreetingIsMasked(t *testing.T) {
	for _, tt := range []struct{ mask, offered uint16 }{
		{0xffff, wire.FlagFixedNewstyle | wire.FlagNoZeroes},
		{wire.FlagFixedNewstyle, wire.FlagFixedNewstyle},
		{wire.FlagNoZeroes, wire.FlagNoZeroes},
		{0, 0},
	} {
		t.Run(fmt.Sprintf("%#x", tt.mask), func(t *testing.T) {
			r := memRig(t, 1<<20)
			r.opt.MaskHandshake = tt.mask
			for flags := range uint16(4) {
				c := r.dial(t)
				c.SetDeadline(time.Now().Add(hangLimit))
				if got := binary.BigEndian.Uint16(r.expect(c, 18)[16:]); got != tt.offered {
					t.Fatalf("offered: got %#x, want %#x", got, tt.offered)
				}
				r.send(c, binary.BigEndian.AppendUint32(nil, uint32(flags)))
				if flags&^tt.offered != 0 {
					if n, err := c.Read(make([]byte, 1)); err != io.EOF {
						t.Errorf("client flags %#x: got %d bytes, %v, want EOF", flags, n, err)
					}
					continue
				}
				r.send(c, wire.AppendOption(nil, wire.OptExportName, nil))
				r.expect(c, 10)
				if flags&wire.FlagNoZeroes == 0 {
					r.expect(c, wire.ExportNameZeroes)
				}
				if e := r.ask(c, wire.CmdRead, 0, 512); e != wire.OK {
					t.Errorf("client flags %#x: read: got %v", flags, e)
				}
			}
		})
	}
}

// errorPayload is what a chunk with an error carries; at < 0 is without offset.
func errorPayload(e wire.Errno, text string, at int64) []byte {
	if at < 0 {
		return wire.AppendError(nil, e, text)
	}
	return wire.AppendErrorOffset(nil, e, text, uint64(at))
}

// TestErrorsAreToldInFull: the number, a text for people and, for a read that the
// storage has broken off, the place.
func TestErrorsAreToldInFull(t *testing.T) {
	const size, left = 4 << 20, 4096
	for _, cache := range []string{"writeback", "none"} {
		path := filepath.Join(t.TempDir(), "disk.img")
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		k := rawRig(t, path, "pool", cache).structured()
		if err := os.Truncate(path, left); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name string
			req  wire.Request
			typ  wire.ChunkType
			want []byte
		}{
			{"read of what is gone", wire.Request{Cmd: wire.CmdRead, Len: limits.InlineReply}, wire.ChunkErrorOffset, errorPayload(wire.EIO, "input/output error", left)},
			{"read beyond the end", wire.Request{Cmd: wire.CmdRead, Off: size, Len: 512}, wire.ChunkError, errorPayload(wire.EINVAL, "beyond the end of the disk", -1)},
			{"trim beyond the end", wire.Request{Cmd: wire.CmdTrim, Off: size, Len: 512}, wire.ChunkError, errorPayload(wire.EINVAL, "beyond the end of the disk", -1)},
			{"flush of a range", wire.Request{Cmd: wire.CmdFlush, Len: 512}, wire.ChunkError, errorPayload(wire.EINVAL, "flush takes no range", -1)},
			{"foreign flag", wire.Request{Cmd: wire.CmdFlush, Flags: wire.FlagDF}, wire.ChunkError, errorPayload(wire.EINVAL, "flag is not allowed here", -1)},
			{"unknown command", wire.Request{Cmd: 99}, wire.ChunkError, errorPayload(wire.EINVAL, "unknown command", -1)},
		} {
			if typ, p := k.do(tt.req); typ != tt.typ || !bytes.Equal(p, tt.want) {
				t.Errorf("%s, cache %s: got %v %q, want %v %q", tt.name, cache, typ, p, tt.typ, tt.want)
			}
		}
	}
}

// slowList is an export whose List waits until it is opened.
type slowList struct {
	*oneExport
	entered, open chan struct{}
}

func (x *slowList) List(p *transport.Peer) []ExportInfo {
	x.entered <- struct{}{}
	<-x.open
	return x.oneExport.List(p)
}

// TestOptionsOfADrainAreRefused: a client that negotiates when the server is told
// to end learns why it gets no further, and may leave in good order; one that says
// nothing is not waited for.
func TestOptionsOfADrainAreRefused(t *testing.T) {
	r := memRig(t, 1<<20)
	r.opt.Handshake = time.Hour
	x := &slowList{r.exports, make(chan struct{}), make(chan struct{})}
	r.opt.Exports = x
	silent, c := r.haggle(), r.haggle()
	r.option(silent, wire.OptStructuredReply, "") // and no more
	opts := []wire.Opt{wire.OptInfo, wire.OptStartTLS, wire.OptStructuredReply, 99, wire.OptGo, wire.OptAbort}
	all := wire.AppendOption(nil, wire.OptList, nil)
	for _, o := range opts {
		all = wire.AppendOption(all, o, nil)
	}
	r.send(c, all)
	<-x.entered
	server, down := r.server, make(chan error, 1)
	r.server = nil
	go func() { down <- server.Shutdown(context.Background()) }()
	<-server.quit
	close(x.open)
	for _, want := range []told{{wire.RepServer, "\x00\x00\x00\x04diska disk"}, {wire.RepAck, ""}} {
		if o, got := r.told(c); o != wire.OptList || got != want {
			t.Errorf("the option before the drain: got %v for %v, want %v", got, o, want)
		}
	}
	for _, o := range opts {
		want := told{wire.RepErrShutdown, "server is shutting down"}
		if o == wire.OptAbort {
			want = told{rep: wire.RepAck}
		}
		if to, got := r.told(c); to != o || got != want {
			t.Errorf("%v: got %v for %v, want %v", o, got, to, want)
		}
	}
	for _, c := range []net.Conn{c, silent} {
		if n, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("afterwards: got %d bytes, %v, want EOF", n, err)
		}
		c.Close()
	}
	select {
	case err := <-down:
		if err != nil {
			t.Errorf("shutdown: %v", err)
		}
	case <-time.After(hangLimit):
		t.Error("the shutdown waits for a client that says nothing")
	}
}

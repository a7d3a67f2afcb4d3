package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// stream is a connection whose server says a fixed text, not before gate is
// closed, and hears nothing.
type stream struct {
	net.Conn
	text *bytes.Reader
	gate chan struct{}
}

func newStream(text []byte) *stream {
	return &stream{text: bytes.NewReader(text), gate: make(chan struct{})}
}

func (s *stream) Read(p []byte) (int, error) {
	<-s.gate
	return s.text.Read(p)
}
func (s *stream) Write(p []byte) (int, error)        { return len(p), nil }
func (s *stream) Close() error                       { return nil }
func (s *stream) SetDeadline(time.Time) error        { return nil }
func (s *stream) SetWriteDeadline(t time.Time) error { return nil }

// fuzzCalls are the requests that a fuzzed stream answers, with the cookies 1
// to 5.
func fuzzCalls() []*call {
	return []*call{
		{req: wire.Request{Cmd: wire.CmdRead, Off: 8192, Len: 4096}, buf: make([]byte, 4096)},
		{req: wire.Request{Cmd: wire.CmdExtents, Off: 8192, Len: 4096}, lists: make([][]Extent, 2)},
		{req: wire.Request{Cmd: wire.CmdWrite, Off: 8192, Len: 4096}},
		{req: wire.Request{Cmd: wire.CmdFlush}},
		{req: wire.Request{Cmd: wire.CmdExtents, Flags: wire.FlagReqOne, Off: 0, Len: 1 << 30}, lists: make([][]Extent, 2)},
	}
}

func fuzzHandshake(t *testing.T, text []byte) {
	conn := newStream(text)
	close(conn.gate)
	ctx := context.Background()
	s, err := Negotiate(ctx, conn, Options{})
	if err != nil {
		return
	}
	defer s.Close()
	s.List(ctx)
	s.ListContexts(ctx, "disk")
	s.Info(ctx, "disk")
	c, err := s.Go(ctx, "disk", []string{wire.ContextAllocation})
	if err != nil {
		return
	}
	defer c.Close()
	if e := c.Export(); e.Size < 0 || e.Blocks.Min > uint32(e.MaxPayload()) {
		t.Errorf("export %+v", e)
	}
}

func fuzzReplies(t *testing.T, replies Replies, text []byte) {
	conn := newStream(text)
	s := &Session{conn: conn, br: bufio.NewReaderSize(conn, 8192), replies: replies}
	c := newClient(s, Export{Size: 1 << 30, Flags: allFlags, Contexts: []string{wire.ContextAllocation, "x:y"}}, []uint32{1, 2})
	calls := fuzzCalls()
	for _, k := range calls {
		if err := c.begin(context.Background(), k, nil); err != nil {
			t.Fatal(err)
		}
	}
	close(conn.gate)
	<-c.readDone // the text ends, and all calls with it
	for _, k := range calls {
		<-k.done
		checkCall(t, k, replies)
	}
}

// checkCall checks what a caller may rely on.
func checkCall(t *testing.T, k *call, replies Replies) {
	if k.err != nil {
		var e *Error
		if errors.As(k.err, &e) == (errors.Is(k.err, ErrProtocol) || errors.Is(k.err, ErrClosed)) {
			t.Errorf("%v failed with %v", k.req.Cmd, k.err)
		}
		return
	}
	if k.req.Cmd == wire.CmdRead && replies != Simple && k.covered.n != k.req.Len {
		t.Errorf("read succeeded with %d of %d bytes", k.covered.n, k.req.Len)
	}
	for _, l := range k.lists {
		next := int64(k.req.Off)
		for _, e := range l {
			if e.Off != next || e.Len <= 0 {
				t.Errorf("extents %v of %+v", l, k.req)
			}
			next = e.Off + e.Len
		}
		if next == int64(k.req.Off) || next > int64(k.req.Off+k.req.Len) {
			t.Errorf("extents of %+v end at %d", k.req, next)
		}
	}
}

// FuzzClient feeds the client what a server may say: first a handshake, then
// the replies to fuzzCalls in each of the three forms.
func FuzzClient(f *testing.F) {
	f.Fuzz(func(t *testing.T, form uint8, text []byte) {
		if form == 0 {
			fuzzHandshake(t, text)
			return
		}
		fuzzReplies(t, Replies(1+form%3), text)
	})
}

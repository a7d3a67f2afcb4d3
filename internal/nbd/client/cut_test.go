package client

import (
	"bytes"
	"context"
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// pattern is what the scripted disk holds.
func pattern(off, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte((off+i)*31) | 1
	}
	return p
}

// answerAll serves requests until the client leaves.
func answerAll(p *peer, replies Replies) {
	for {
		r, _ := p.request()
		switch {
		case r.Cmd == wire.CmdDisc:
			return
		case r.Cmd == wire.CmdRead && replies == Simple:
			p.simple(r, wire.OK)
			p.send(pattern(int(r.Off), int(r.Len)))
		case r.Cmd == wire.CmdRead:
			half := int(r.Len) / 2
			p.chunk(r, 0, wire.ChunkData, data(r.Off, pattern(int(r.Off), half)))
			p.chunk(r, 0, wire.ChunkHole, hole(r.Off+uint64(half), 4))
			p.chunk(r, 1, wire.ChunkData, data(r.Off+uint64(half+4), pattern(int(r.Off)+half+4, half-4)))
		case r.Cmd == wire.CmdExtents && replies == Extended:
			p.chunk(r, 1, wire.ChunkExtentsExt, extents64(1, r.Len/2, 3, r.Len/2, 0))
		case r.Cmd == wire.CmdExtents:
			p.chunk(r, 1, wire.ChunkExtents, extents(1, uint32(r.Len/2), 3, uint32(r.Len/2), 0))
		case r.Cmd == wire.CmdTrim && replies != Simple:
			p.chunk(r, 1, wire.ChunkError, wire.AppendError(nil, wire.EINVAL, "no trim"))
		case r.Cmd == wire.CmdTrim:
			p.simple(r, wire.EINVAL)
		case replies == Simple:
			p.simple(r, wire.OK)
		default:
			p.chunk(r, 1, wire.ChunkNone, nil)
		}
	}
}

// converse has one whole conversation and returns how many of its steps were
// right. A step that succeeds with a wrong result fails the test; one that
// fails ends the conversation.
func converse(t *testing.T, conn net.Conn, replies Replies) int {
	t.Helper()
	ctx := context.Background()
	s, err := Negotiate(ctx, conn, Options{Replies: replies})
	if err != nil {
		return 0
	}
	defer s.Close()
	list, err := s.List(ctx)
	if err != nil {
		return 1
	}
	if !slices.Equal(list, []Listed{{"one", "the first"}, {"", ""}}) {
		t.Errorf("list %q", list)
	}
	if e, err := s.Info(ctx, "one"); err != nil {
		return 2
	} else if e.Size != 1<<20 || e.Description != "a disk" || e.Canonical != "canonical" {
		t.Errorf("info %+v", e)
	}
	if names, err := s.ListContexts(ctx, "one"); err != nil {
		return 3
	} else if replies != Simple && !slices.Equal(names, []string{wire.ContextAllocation}) {
		t.Errorf("contexts %q", names)
	}
	c, err := s.Go(ctx, "one", []string{wire.ContextAllocation})
	if err != nil {
		return 4
	}
	defer c.Close()
	return 5 + transmit(t, c, replies)
}

func transmit(t *testing.T, c *Client, replies Replies) int {
	ctx := context.Background()
	got := make([]byte, 64)
	want := pattern(4096, 64)
	if replies != Simple {
		clear(want[32:36])
	}
	if err := c.ReadAt(ctx, got, 4096); err != nil {
		return 0
	}
	if !bytes.Equal(got, want) {
		t.Errorf("read %x, want %x", got, want)
	}
	if replies != Simple {
		l, err := c.Extents(ctx, 0, 8192, 0)
		if err != nil {
			return 1
		}
		if want := []Extent{{0, 4096, 3}, {4096, 4096, 0}}; len(l) != 1 || !slices.Equal(l[0], want) {
			t.Errorf("extents %v", l)
		}
	}
	var e *Error
	if err := c.Trim(ctx, 0, 4096, 0); !errors.As(err, &e) {
		if err == nil {
			t.Error("a refused trim succeeded")
		}
		return 2
	}
	for i, f := range []func() error{
		func() error { return c.WriteAt(ctx, want, 0, wire.FlagFUA) },
		func() error { return c.Zero(ctx, 0, 4096, 0) },
		func() error { return c.Flush(ctx) },
	} {
		if f() != nil {
			return 3 + i
		}
	}
	return 6
}

// count serves a conversation of which the server sends at most budget bytes
// and returns the steps that were right and the bytes sent.
func count(t *testing.T, replies Replies, budget int) (steps, sent int) {
	t.Helper()
	client, server := sockets(t)
	p := &peer{conn: server, budget: budget}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer server.Close()
		p.haggle(terms{replies: replies, size: 1 << 20, flags: allFlags, contexts: []string{wire.ContextAllocation},
			blocks: wire.BlockSizes{Min: 1, Preferred: 4096, Max: 1 << 20}})
		answerAll(p, replies)
	}()
	steps = converse(t, client, replies)
	client.Close()
	<-done
	return steps, budget - p.budget
}

func TestServerMayHangUpAtEveryByte(t *testing.T) {
	for _, replies := range []Replies{Simple, Structured, Extended} {
		t.Run(replies.String(), func(t *testing.T) {
			all, sent := count(t, replies, 1<<20)
			if all != 11 {
				t.Fatalf("the whole conversation stopped at step %d", all)
			}
			last := 0
			for n := 1; n < sent; n++ {
				steps, _ := count(t, replies, n)
				if steps < last || steps >= all {
					t.Fatalf("%d of %d bytes: %d steps, with a byte less %d", n, sent, steps, last)
				}
				last = steps
			}
		})
	}
}

package client

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

func TestCancelledReadLeavesItsBufferAlone(t *testing.T) {
	begun, cancelled := make(chan struct{}), make(chan struct{})
	c := dial(t, terms{replies: Structured}, func(p *peer) {
		r, _ := p.request()
		p.header(r, 1, wire.ChunkData, 8+4096)
		p.send(data(r.Off, bytes.Repeat([]byte{1}, 100)))
		close(begun)
		<-cancelled
		p.send(bytes.Repeat([]byte{1}, 3996))
		r, _ = p.request()
		p.chunk(r, 1, wire.ChunkNone, nil)
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	p := make([]byte, 4096)
	if err := c.ReadAt(ctx, p, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	clear(p)
	close(cancelled)
	// The next reply comes behind the rest of the abandoned one.
	must(t, c.Flush(t.Context()))
	if !bytes.Equal(p, make([]byte, 4096)) {
		t.Error("the buffer of a cancelled read was written to")
	}
}

func TestCancelWhileTheServerTakesNothing(t *testing.T) {
	hold := make(chan struct{})
	c := dial(t, terms{}, func(p *peer) { <-hold })
	defer close(hold)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	errs := make(chan error, 3)
	for range cap(errs) {
		go func() {
			started <- struct{}{}
			errs <- c.WriteAt(ctx, make([]byte, 1<<20), 0, 0)
		}()
	}
	for range cap(errs) {
		<-started
	}
	cancel()
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, context.Canceled) && !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
}

func TestContextThatEndsBehindTheWriteDoesNotHarm(t *testing.T) {
	c := dial(t, terms{}, func(p *peer) {
		for {
			r, _ := p.request()
			p.simple(r, wire.OK)
		}
	})
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(cancel)
		if err := c.WriteAt(ctx, make([]byte, 512), 0, 0); err != nil && !errors.Is(err, context.Canceled) {
			if errors.Is(err, ErrClosed) {
				t.Fatal("an interrupted write ended the connection without its own context being the reason")
			}
			t.Fatal(err)
		}
		wg.Wait()
		select {
		case <-c.failed: // it was interrupted half way, as documented
			return
		default:
		}
	}
}

func TestHandshakeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	conn := serve(t, func(p *peer) {
		p.greet(fixed)
		p.option()
		cancel()
		p.drain()
	})
	if _, err := New(ctx, conn, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestHandshakeHasABound(t *testing.T) {
	client, server := sockets(t)
	defer server.Close()
	s := &Session{raw: client, conn: client}
	err := s.do(context.Background(), func(ctx context.Context) error {
		end, ok := ctx.Deadline()
		if rest := time.Until(end); !ok || rest > limits.Handshake {
			t.Errorf("the step may take %v", rest)
		}
		return errors.New("enough")
	})
	if err == nil {
		t.Error("the step's error is lost")
	}
}

func TestDisconnectWaitsForRepliesInFlight(t *testing.T) {
	leave := make(chan struct{})
	conn := serve(t, func(p *peer) {
		p.haggle(terms{size: 1 << 20, flags: allFlags})
		r, _ := p.request()
		close(leave)
		if d, _ := p.request(); d.Cmd != wire.CmdDisc {
			return
		}
		p.simple(r, wire.OK)
	})
	c, err := New(t.Context(), conn, Options{})
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- c.Flush(context.Background()) }()
	<-leave
	must(t, c.Disconnect(t.Context()))
	if err := <-done; err != nil {
		t.Errorf("flush in flight at Disconnect: %v", err)
	}
	if err := c.Flush(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("flush after Disconnect: %v", err)
	}
}

func TestRequestsThatCannotWorkAreNotSent(t *testing.T) {
	var few wire.ExportFlags = wire.HasFlags
	for _, tt := range []struct {
		name  string
		terms terms
		op    func(*Client) error
		want  wire.Errno
	}{
		{"read behind the end", terms{}, func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, 2), 1<<20-1) }, wire.EINVAL},
		{"read far behind the end", terms{}, func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, 2), 1<<62) }, wire.EINVAL},
		{"negative offset", terms{}, func(c *Client) error { return c.Zero(t.Context(), -1, 1, 0) }, wire.EINVAL},
		{"negative length", terms{}, func(c *Client) error { return c.Trim(t.Context(), 0, -1, 0) }, wire.EINVAL},
		{"write to a read-only export", terms{flags: few | wire.ReadOnly}, writeOp, wire.EPERM},
		{"flush that is not offered", terms{flags: few}, func(c *Client) error { return c.Flush(t.Context()) }, wire.ENOTSUP},
		{"zero that is not offered", terms{flags: few}, func(c *Client) error { return c.Zero(t.Context(), 0, 1, 0) }, wire.ENOTSUP},
		{"trim that is not offered", terms{flags: few}, func(c *Client) error { return c.Trim(t.Context(), 0, 1, 0) }, wire.ENOTSUP},
		{"cache that is not offered", terms{flags: few}, func(c *Client) error { return c.Cache(t.Context(), 0, 1) }, wire.ENOTSUP},
		{"FUA that is not offered", terms{flags: few}, func(c *Client) error { return c.WriteAt(t.Context(), []byte{1}, 0, wire.FlagFUA) }, wire.ENOTSUP},
		{"fast zero that is not offered", terms{flags: few | wire.SendZero}, func(c *Client) error { return c.Zero(t.Context(), 0, 1, wire.FlagFastZero) }, wire.ENOTSUP},
		{"block status without a context", terms{}, statusOp, wire.ENOTSUP},
		{"unaligned offset", terms{blocks: wire.BlockSizes{Min: 512, Preferred: 4096, Max: 4096}},
			func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, 512), 1) }, wire.EINVAL},
		{"unaligned length", terms{blocks: wire.BlockSizes{Min: 512, Preferred: 4096, Max: 4096}},
			func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, 511), 0) }, wire.EINVAL},
		{"more than the maximum", terms{blocks: wire.BlockSizes{Min: 512, Preferred: 4096, Max: 4096}},
			func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, 4608), 0) }, wire.EOVERFLOW},
		{"more than any maximum", terms{size: 1 << 30, blocks: wire.BlockSizes{Min: 1, Preferred: 4096, Max: 0xffffffff}},
			func(c *Client) error { return c.ReadAt(t.Context(), make([]byte, limits.MaxIO+1), 0) }, wire.EOVERFLOW},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, tt.terms, func(p *peer) {
				p.recv(1)
				panic("a request was sent")
			})
			if err := tt.op(c); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestLongRangesGoInPieces(t *testing.T) {
	const size = 5<<30 + 12345
	got := make(chan wire.Request, 16)
	c := dial(t, terms{size: size}, func(p *peer) {
		for {
			r, _ := p.request()
			got <- r
			p.simple(r, wire.OK)
		}
	})
	must(t, c.Zero(t.Context(), 0, size, wire.FlagNoHole))
	close(got)
	next := uint64(0)
	for r := range got {
		if r.Off != next || r.Len == 0 || r.Len > limits.MaxEffect || r.Flags != wire.FlagNoHole || r.Cmd != wire.CmdZero {
			t.Errorf("request %+v, want offset %d", r, next)
		}
		next += r.Len
	}
	if next != size {
		t.Errorf("%d bytes were zeroed, want %d", next, int64(size))
	}
}

func TestNothingIsSentForNoBytes(t *testing.T) {
	c := dial(t, terms{}, func(p *peer) {
		p.recv(1)
		panic("a request was sent")
	})
	must(t, c.ReadAt(t.Context(), nil, 1<<20))
	must(t, c.WriteAt(t.Context(), nil, 0, 0))
	must(t, c.Zero(t.Context(), 0, 0, 0))
}

func TestMapAsksNoMoreThanItMust(t *testing.T) {
	const size = 5<<30 + 512
	for _, tt := range []struct {
		replies Replies
		want    int
	}{{Structured, 6}, {Extended, 1}} {
		asked := make(chan wire.Request, 16)
		c := dial(t, terms{replies: tt.replies, size: size, contexts: []string{wire.ContextAllocation}}, func(p *peer) {
			for {
				r, _ := p.request()
				asked <- r
				if tt.replies == Extended {
					p.chunk(r, 1, wire.ChunkExtentsExt, extents64(1, r.Len, 3))
				} else {
					p.chunk(r, 1, wire.ChunkExtents, extents(1, uint32(r.Len), 3))
				}
			}
		})
		var got []Extent
		must(t, c.Map(t.Context(), wire.ContextAllocation, 0, size, func(e Extent) bool { got = append(got, e); return true }))
		if len(got) != 1 || got[0] != (Extent{0, size, 3}) || len(asked) != tt.want {
			t.Errorf("%v: map %v with %d requests, want one extent with %d", tt.replies, got, len(asked), tt.want)
		}
	}
}

func TestMapEndsWhenItIsTold(t *testing.T) {
	c := dial(t, terms{replies: Structured, contexts: []string{wire.ContextAllocation}}, func(p *peer) {
		for i := uint32(0); ; i++ {
			r, _ := p.request()
			p.chunk(r, 1, wire.ChunkExtents, extents(1, 512, i%2))
		}
	})
	n := 0
	must(t, c.Map(t.Context(), wire.ContextAllocation, 0, 1<<20, func(Extent) bool { n++; return n < 3 }))
	if n != 3 {
		t.Errorf("%d extents, want 3", n)
	}
	if err := c.Map(t.Context(), "no:such", 0, 1, func(Extent) bool { return true }); err == nil {
		t.Error("a context that is not selected was mapped")
	}
}

// Package client is the client's side of the NBD protocol. A Session
// negotiates, a Client transmits; New makes one of the other in one step.
//
// The server is not trusted. Every length it sends is checked against a bound
// of package limits before anything is allocated, every reply against the
// request that it claims to answer. What does not fit ends the connection
// with an error that matches ErrProtocol: bytes that did not arrive are never
// handed out as zeroes.
package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// Replies is a form of replies, the best one first in preference.
type Replies int

const (
	// Best asks for the best form that the server has.
	Best Replies = iota
	// Simple replies carry an error number and nothing else.
	Simple
	// Structured replies come in chunks; they allow block status.
	Structured
	// Extended headers are structured replies with 64-bit lengths.
	Extended
)

// String is the name that nbdinfo uses.
func (r Replies) String() string {
	switch r {
	case Simple:
		return "simple"
	case Structured:
		return "structured"
	case Extended:
		return "extended"
	}
	return "best"
}

// Options say what to negotiate.
type Options struct {
	// Export is the name of the export for New.
	Export string

	// TLS, if not nil, makes STARTTLS a condition: the session ends with an
	// error when the server refuses it. The configuration is not changed;
	// its ServerName must be set unless it verifies in another way.
	TLS *tls.Config

	// Contexts are the metadata contexts that New selects, if the server
	// has them; Export.Contexts says which it has.
	Contexts []string

	// Replies is the best form of replies to ask for.
	Replies Replies
}

// Export is what the server says about an export.
type Export struct {
	// Name is the one that was asked for, Canonical the server's own, or "".
	Name, Canonical string
	Description     string
	// Size is in bytes.
	Size  int64
	Flags wire.ExportFlags
	// Blocks are the size constraints in bytes, all zero when the server
	// named none.
	Blocks wire.BlockSizes
	// Contexts are the selected metadata contexts, in the server's order.
	Contexts []string
}

// Has reports whether all of the flags are set.
func (e *Export) Has(f wire.ExportFlags) bool { return e.Flags&f == f }

// MaxPayload is the largest read or write in bytes: what the server allows,
// 32 MiB if it does not say, and never above limits.MaxIO.
func (e *Export) MaxPayload() int {
	if e.Blocks.Max == 0 {
		return limits.AdvertisedIO
	}
	return int(min(e.Blocks.Max, limits.MaxIO))
}

// Client transmits requests for one export on one connection. It is safe for
// concurrent use: requests of several goroutines are in flight together.
//
// A context that ends stops the waiting, not the request, which the server
// may still carry out. A request whose sending was interrupted half way ends
// the connection.
type Client struct {
	conn     net.Conn
	br       *bufio.Reader // readLoop only
	export   Export
	protocol Protocol
	tls      bool
	replies  Replies
	ids      []uint32 // of export.Contexts

	// slots bounds the calls in pending; sender is held by who writes.
	slots  chan struct{}
	sender chan struct{}
	header []byte // scratch of the sender

	readDone chan struct{}
	failed   chan struct{} // closed by fail

	mu      sync.Mutex
	pending map[uint64]*call // guarded by mu
	cookie  uint64           // guarded by mu; the last one given out
	err     error            // guarded by mu; why failed is closed
	leaving bool             // guarded by mu; DISC is about to be sent
}

// New negotiates on conn and opens the export of o. The whole of it may take
// limits.Handshake. The client owns conn, also when New fails.
func New(ctx context.Context, conn net.Conn, o Options) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	s, err := Negotiate(ctx, conn, o)
	if err != nil {
		return nil, err
	}
	return s.Go(ctx, o.Export, o.Contexts)
}

func newClient(s *Session, e Export, ids []uint32) *Client {
	c := &Client{
		conn: s.conn, br: s.br, export: e, protocol: s.protocol, tls: s.tls, replies: s.replies, ids: ids,
		slots:    make(chan struct{}, limits.ClientRequests),
		sender:   make(chan struct{}, 1),
		header:   make([]byte, 0, limits.InlineReply),
		readDone: make(chan struct{}),
		failed:   make(chan struct{}),
		pending:  make(map[uint64]*call),
	}
	go c.readLoop()
	return c
}

// Export is what the server said when the export was opened. The contexts in
// it are shared: do not change them.
func (c *Client) Export() Export { return c.export }

// Protocol is the handshake that was used.
func (c *Client) Protocol() Protocol { return c.protocol }

// TLS reports whether the connection is encrypted.
func (c *Client) TLS() bool { return c.tls }

// Replies is the form of replies that was agreed.
func (c *Client) Replies() Replies { return c.replies }

// Close ends the connection at once; requests in flight fail with ErrClosed.
// It returns when no goroutine of the client is left.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.readDone
	return nil
}

// Disconnect says goodbye: it sends NBD_CMD_DISC, waits until the server has
// answered what is in flight and hung up, at most limits.Linger, and closes.
// No request may be started after it.
func (c *Client) Disconnect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, limits.Linger)
	defer cancel()
	defer c.Close()
	c.mu.Lock()
	c.leaving = true
	c.mu.Unlock()
	err := c.write(ctx, &call{req: wire.Request{Cmd: wire.CmdDisc}}, nil)
	if err != nil {
		return fmt.Errorf("disconnect: %w", err)
	}
	select {
	case <-c.readDone:
	case <-ctx.Done(): // the server keeps the line open: close it from here
	}
	return nil
}

// fail ends the connection for the first err given and every pending call
// with it.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	calls := c.pending
	c.pending = nil
	close(c.failed)
	c.mu.Unlock()
	// A tls.Conn sends close_notify here, with a bound of its own.
	c.conn.Close()
	for _, k := range calls {
		k.abandon()
		k.finish(err)
	}
}

// cause is why the connection ended.
func (c *Client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(c.err, ErrClosed) {
		return c.err
	}
	return fmt.Errorf("%w: %w", ErrClosed, c.err)
}

// past is a deadline that interrupts at once.
var past = time.Unix(1, 0)

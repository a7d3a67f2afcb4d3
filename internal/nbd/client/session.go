package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var be = binary.BigEndian

// Protocol is the handshake that a server speaks, named as nbdinfo does.
type Protocol string

const (
	Oldstyle      Protocol = "oldstyle"
	Newstyle      Protocol = "newstyle"
	NewstyleFixed Protocol = "newstyle-fixed"
)

// oldstyleZeroes end the greeting of an oldstyle server (proto.md, "Oldstyle
// negotiation").
const oldstyleZeroes = 124

// Session is a connection that still negotiates. It is for one goroutine.
// Every method may take limits.Handshake and ends the session on any error
// that is not an *OptionError.
type Session struct {
	raw      net.Conn // below TLS
	conn     net.Conn
	br       *bufio.Reader
	protocol Protocol
	noZeroes bool
	tls      bool
	replies  Replies
	old      *Export // what an oldstyle greeting said
	buf      []byte  // payload of the last option reply
}

// Negotiate greets the server, starts TLS if o asks for it and agrees on the
// form of replies. The session owns conn, also when Negotiate fails.
func Negotiate(ctx context.Context, conn net.Conn, o Options) (*Session, error) {
	s := &Session{raw: conn, conn: conn, br: bufio.NewReaderSize(conn, limits.TurnBuffer), replies: Simple}
	err := s.do(ctx, func(ctx context.Context) error {
		if err := s.greet(); err != nil {
			return err
		}
		if err := s.startTLS(ctx, o.TLS); err != nil {
			return err
		}
		return s.agreeReplies(o.Replies)
	})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("nbd handshake: %w", err)
	}
	return s, nil
}

// Protocol is the handshake that the server speaks.
func (s *Session) Protocol() Protocol { return s.protocol }

// TLS reports whether the session is encrypted.
func (s *Session) TLS() bool { return s.tls }

// Replies is the form of replies that was agreed.
func (s *Session) Replies() Replies { return s.replies }

// Close ends the session at once.
func (s *Session) Close() error { return s.conn.Close() }

// do runs one step of the handshake under the bound of the session.
func (s *Session) do(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limits.Handshake)
	defer cancel()
	raw := s.raw
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(past) })
	err := step(ctx)
	if !stop() {
		s.Close()
		return ctx.Err()
	}
	var refused *OptionError
	if err != nil && !errors.As(err, &refused) {
		s.Close()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%w: %w", ErrClosed, err)
		}
	}
	return err
}

// read reads exactly n bytes, n being bounded by the caller, into the
// session's buffer.
func (s *Session) read(n int) ([]byte, error) {
	if cap(s.buf) < n {
		s.buf = make([]byte, n)
	}
	p := s.buf[:n]
	_, err := io.ReadFull(s.br, p)
	return p, err
}

func (s *Session) greet() error {
	p, err := s.read(16)
	if err != nil {
		return err
	}
	if be.Uint64(p) != wire.MagicInit {
		return violation("greeting %x is not of an NBD server", p[:8])
	}
	switch be.Uint64(p[8:]) {
	case wire.MagicOldstyle:
		return s.greetOld()
	case wire.MagicOption:
		return s.greetNew()
	}
	return violation("unknown handshake %x", p[8:16])
}

func (s *Session) greetOld() error {
	s.protocol = Oldstyle
	p, err := s.read(8 + 4 + oldstyleZeroes)
	if err != nil {
		return err
	}
	s.old = &Export{}
	return s.old.set(be.Uint64(p), be.Uint16(p[10:]))
}

func (s *Session) greetNew() error {
	p, err := s.read(2)
	if err != nil {
		return err
	}
	flags := be.Uint16(p)
	s.protocol = Newstyle
	if flags&wire.FlagFixedNewstyle != 0 {
		s.protocol = NewstyleFixed
	}
	s.noZeroes = flags&wire.FlagNoZeroes != 0
	_, err = s.conn.Write(be.AppendUint32(nil, uint32(flags&(wire.FlagFixedNewstyle|wire.FlagNoZeroes))))
	return err
}

// startTLS never goes on without TLS (proto.md, "Protocol downgrade
// attacks").
func (s *Session) startTLS(ctx context.Context, config *tls.Config) error {
	if config == nil {
		return nil
	}
	if s.protocol != NewstyleFixed {
		return fmt.Errorf("%w: %s handshake", ErrNoTLS, s.protocol)
	}
	if err := s.simpleOption(wire.OptStartTLS); err != nil {
		// The refusal is final: both chains say so, and Negotiate closes.
		return fmt.Errorf("%w: %w", ErrNoTLS, err)
	}
	if n := s.br.Buffered(); n != 0 {
		return violation("%d bytes before the TLS handshake", n)
	}
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	conn := tls.Client(s.raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrTLS, err)
	}
	s.conn, s.tls = conn, true
	s.br.Reset(conn)
	return nil
}

// agreeReplies asks for the best form up to best and takes the next one when
// the server does not have it.
func (s *Session) agreeReplies(best Replies) error {
	if s.protocol != NewstyleFixed {
		return nil
	}
	for _, try := range []struct {
		replies Replies
		opt     wire.Opt
	}{
		{Extended, wire.OptExtendedHeaders},
		{Structured, wire.OptStructuredReply},
	} {
		if best != Best && try.replies > best {
			continue
		}
		err := s.simpleOption(try.opt)
		if err == nil {
			s.replies = try.replies
			return nil
		}
		var refused *OptionError
		if !errors.As(err, &refused) || refused.Rep == wire.RepErrTLSReqd || refused.Rep == wire.RepErrShutdown {
			return err
		}
	}
	return nil
}

// simpleOption sends an option without payload that is answered by ACK.
func (s *Session) simpleOption(o wire.Opt) error {
	if err := s.send(o, nil); err != nil {
		return err
	}
	return s.answers(o, 0, nil)
}

func (s *Session) send(o wire.Opt, payload []byte) error {
	_, err := s.conn.Write(wire.AppendOption(nil, o, payload))
	return err
}

// answers reads the replies to o until its ACK or error. Each before that is
// given to take, at most limit of them; its payload is valid until take
// returns.
func (s *Session) answers(o wire.Opt, limit int, take func(wire.Rep, []byte) error) error {
	for n := 0; ; n++ {
		rep, p, err := s.answer(o)
		switch {
		case err != nil:
			return err
		case rep.IsError():
			return &OptionError{Opt: o, Rep: rep, Text: clip(p)}
		case rep == wire.RepAck:
			if len(p) != 0 {
				return violation("%v acknowledged with %d bytes", o, len(p))
			}
			return nil
		case n == limit:
			return violation("more than %d replies to %v", limit, o)
		}
		if err := take(rep, p); err != nil {
			return err
		}
	}
}

func (s *Session) answer(o wire.Opt) (wire.Rep, []byte, error) {
	p, err := s.read(wire.OptReplyHeaderSize)
	if err != nil {
		return 0, nil, err
	}
	h, err := wire.DecodeOptReply(p)
	if err != nil {
		return 0, nil, violation("reply to %v: %v", o, err)
	}
	if h.Opt != o {
		return 0, nil, violation("reply to %v while %v was asked", h.Opt, o)
	}
	if h.Len > limits.MaxOptReply {
		return 0, nil, violation("reply of %d bytes to %v", h.Len, o)
	}
	p, err = s.read(int(h.Len))
	return h.Rep, p, err
}

package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// Errors that end a negotiation. They are the client's doing.
var (
	errClientFlags  = errors.New("client set flags that were not offered")
	errPlainOption  = errors.New("client without fixed newstyle sent another option than EXPORT_NAME")
	errOptionLength = errors.New("option is too long")
	errOptionCount  = errors.New("too many options")
	errInjected     = errors.New("plaintext behind STARTTLS")
	errExportName   = errors.New("EXPORT_NAME cannot be answered")
)

// agreed is what option haggling has settled so far. STARTTLS replaces it
// whole: nothing negotiated in plaintext survives (CVE-2021-3716).
type agreed struct {
	structured bool
	extended   bool
	meta       metaChoice
}

// negotiation is the state of one handshake. Option handlers see bytes and
// this state; they append replies to out and do no I/O.
type negotiation struct {
	opt  *Options
	tls  TLSMode
	conn transport.Conn
	in   *bufio.Reader
	out  []byte
	slot *slot
	quit <-chan struct{} // closed when the server drains

	offered  uint16 // handshake flags sent
	fixed    bool   // the client knows fixed newstyle
	noZeroes bool
	secure   bool // inside TLS
	agreed   agreed
	asked    int // options that limits.MaxOptions bounds

	// export is set when the client may start transmission.
	export *Export
}

// verdict is what follows an option.
type verdict uint8

const (
	again verdict = iota
	upgradeTLS
	transmit
	hangUp
)

// handshakeBuffer is room for the usual options in one read.
const handshakeBuffer = 4096

func newNegotiation(srv *Server, c transport.Conn, s *slot, tls TLSMode) *negotiation {
	return &negotiation{opt: &srv.opt, tls: tls, conn: c, slot: s, quit: srv.quit, in: bufio.NewReaderSize(c, handshakeBuffer)}
}

// run ends with an export to serve, with nil and no export when the client
// left in good order, or with an error.
func (n *negotiation) run(ctx context.Context) error {
	if n.opt.Oldstyle {
		return n.oldstyle(ctx)
	}
	if err := n.greet(); err != nil {
		return err
	}
	for range limits.MaxInfos {
		if n.asked == limits.MaxOptions {
			return errOptionCount
		}
		v, err := n.option(ctx)
		if ferr := n.flush(); err == nil {
			err = ferr
		}
		if err != nil {
			return err
		}
		switch v {
		case transmit:
			return nil
		case hangUp:
			return nil
		case upgradeTLS:
			if err := n.startTLS(); err != nil {
				return err
			}
		}
	}
	return errOptionCount
}

// greet sends the greeting and reads the client's flags (proto.md, "Newstyle
// negotiation"). A flag that is unknown or was not offered ends it.
func (n *negotiation) greet() error {
	n.offered = (wire.FlagFixedNewstyle | wire.FlagNoZeroes) & n.opt.MaskHandshake
	n.out = binary.BigEndian.AppendUint64(n.out, wire.MagicInit)
	n.out = binary.BigEndian.AppendUint64(n.out, wire.MagicOption)
	n.out = binary.BigEndian.AppendUint16(n.out, n.offered)
	if err := n.flush(); err != nil {
		return err
	}
	var b [4]byte
	if _, err := io.ReadFull(n.in, b[:]); err != nil {
		return quietEOF(err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(n.offered) != 0 {
		return errClientFlags
	}
	n.fixed = flags&wire.FlagFixedNewstyle != 0
	n.noZeroes = flags&wire.FlagNoZeroes != 0
	return nil
}

// option reads one option and answers it.
func (n *negotiation) option(ctx context.Context) (verdict, error) {
	var b [wire.OptionHeaderSize]byte
	if _, err := io.ReadFull(n.in, b[:]); err != nil {
		return hangUp, quietEOF(err)
	}
	h, err := wire.DecodeOption(b[:])
	if err != nil {
		return hangUp, err
	}
	if !n.fixed && h.Opt != wire.OptExportName {
		return hangUp, errPlainOption
	}
	if h.Len > limits.MaxOption {
		return hangUp, fmt.Errorf("%w: %v announces %d bytes", errOptionLength, h.Opt, h.Len)
	}
	p := make([]byte, h.Len)
	if _, err := io.ReadFull(n.in, p); err != nil {
		return hangUp, quietEOF(err)
	}
	n.opt.Log.Debug("option", "peer", n.conn.Peer(), "option", h.Opt.String(), "bytes", h.Len)
	return n.answer(ctx, h.Opt, p)
}

// answer applies the TLS mode, then refuses what a server that drains does not
// begin any more, then applies the option's row.
func (n *negotiation) answer(ctx context.Context, o wire.Opt, p []byte) (verdict, error) {
	row := findOption(o)
	if n.tls == TLSRequire && !n.secure && !(row != nil && row.plain) {
		// FORCEDTLS: every option, known or not (proto.md, "FORCEDTLS mode").
		if o == wire.OptExportName {
			return hangUp, errExportName
		}
		return n.fail(o, wire.RepErrTLSReqd, "TLS is required"), nil
	}
	if o != wire.OptAbort && n.draining() {
		if o == wire.OptExportName {
			return hangUp, errDraining
		}
		return n.fail(o, wire.RepErrShutdown, errDraining.Error()), nil
	}
	if row == nil {
		return n.fail(o, wire.RepErrUnsup, "option is not supported"), nil
	}
	if row.noData && len(p) != 0 {
		return n.fail(o, wire.RepErrInvalid, "option takes no data"), nil
	}
	return row.run(n, ctx, o, p)
}

func (n *negotiation) draining() bool {
	select {
	case <-n.quit:
		return true
	default:
		return false
	}
}

// reply appends one reply to option o.
func (n *negotiation) reply(o wire.Opt, r wire.Rep, payload []byte) {
	n.out = wire.AppendOptReply(n.out, o, r, payload)
}

// ack ends option o well.
func (n *negotiation) ack(o wire.Opt) verdict {
	n.reply(o, wire.RepAck, nil)
	return again
}

// fail ends option o with an error; the text is for people.
func (n *negotiation) fail(o wire.Opt, r wire.Rep, text string) verdict {
	n.asked++
	n.opt.Log.Debug("option refused", "peer", n.conn.Peer(), "option", o.String(), "reply", r.String(), "reason", text)
	n.reply(o, r, []byte(text))
	return again
}

func (n *negotiation) flush() error {
	if len(n.out) == 0 {
		return nil
	}
	_, err := n.conn.Write(n.out)
	n.out = n.out[:0]
	return err
}

// startTLS runs behind the acknowledged STARTTLS. Bytes that the client sent
// in plaintext behind the option were injected, or it is out of step: the
// connection ends before any is looked at.
func (n *negotiation) startTLS() error {
	if n.in.Buffered() > 0 {
		return errInjected
	}
	secure, err := n.opt.Encrypt(n.conn)
	if err != nil {
		return err
	}
	n.conn = secure
	n.in = bufio.NewReaderSize(secure, handshakeBuffer)
	n.secure = true
	n.agreed = agreed{}
	return nil
}

// early takes what the client sent behind its last option: requests, already.
func (n *negotiation) early() []byte {
	b, _ := n.in.Peek(n.in.Buffered())
	return b
}

// close ends a negotiation that does not lead to transmission.
func (n *negotiation) close(orderly bool) {
	if n.export != nil {
		n.export.Close()
	}
	part(n.conn, orderly)
}

// quietEOF makes leaving between messages, and in the middle of one, io.EOF.
func quietEOF(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}

// Package nbdtest is the conformance suite of the NBD protocol's server side.
// It speaks to any server that can be dialled, in raw scripted conversations:
// bytes sent, bytes expected, or the end of the connection. It shares the
// numbers and codecs of package wire with the product, and none of its logic.
//
// Every check has an ID. HS, TL and TX are the acceptance list of handshake,
// TLS and transmission; WR is a rule of the wire that is easily got wrong. A
// check that depends on the form of replies runs once per form, its ID ends in
// @simple, @structured or @extended.
package nbdtest

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// TLSMode says when a server speaks TLS.
type TLSMode string

const (
	// TLSOff: STARTTLS is refused. It is the zero value's meaning, too.
	TLSOff TLSMode = "off"
	// TLSOn: plain and upgraded connections see the export.
	TLSOn TLSMode = "on"
	// TLSRequire: nothing but STARTTLS and ABORT is answered in plain.
	TLSRequire TLSMode = "require"
)

// TLS says how to upgrade a connection.
type TLS struct {
	Mode TLSMode
	// Config is the client's side. The suite clones it and lowers its
	// versions for the checks of old ones.
	Config *tls.Config
}

// Export is one disk of a server.
type Export struct {
	Name string
	Size int64 // bytes
}

// Features are what the server is expected to offer. A check of something that
// is not offered does not run; that the offer is the expected one is a check of
// its own.
type Features struct {
	// Flags are the transmission flags with structured replies negotiated.
	// SendDF is expected to be missing without them.
	Flags wire.ExportFlags
	// Structured and Extended: the server accepts the option.
	Structured, Extended bool
	// Contexts: base:allocation can be selected.
	Contexts bool
	// BlockSizes: INFO_BLOCK_SIZE is answered when asked for.
	BlockSizes bool
	// MinBlock is the smallest request that is served, in bytes; 0 means 1.
	MinBlock int64
	// AnyLimit: requests above 32 MiB are a matter of taste, not of this
	// server's promise, and are not tried.
	AnyLimit bool
}

// Server is a server under test. Checks write to the export, unless it is
// read-only, and assume that nobody else does.
type Server struct {
	// Dial makes a new connection. A connection with CloseWrite is also
	// tested half-closed; a *net.UnixConn also with file descriptors
	// attached; one with SetLinger also with resets.
	Dial func(ctx context.Context) (net.Conn, error)

	// Export is the name of the export, Size its size in bytes, at least
	// MinSize.
	Export string
	Size   int64

	ReadOnly bool
	TLS      TLS
	Features Features

	// Other is the name of a second export of any size, or "".
	Other string

	// Large is an optional sparse export of 8 TiB or more that takes zeroing
	// and trimming of 4 GiB without writing them out.
	Large *Export

	// Deviations maps the ID of a check that the server is known not to pass
	// to the reason. A listed check must fail, so that the list cannot rot.
	// An ID without its @form stands for all forms, one that ends in * for all
	// IDs that begin so. A reason that begins with Races is that of a check
	// whose outcome is a matter of luck.
	Deviations map[string]string

	// Handshake and Stall are the time limits of the server, for TimeLimits.
	Handshake, Stall time.Duration

	// Invariants is called once before the first check and after each
	// negative one. The first call may take the baseline.
	Invariants func(t *testing.T)
}

// Races begins the reason of a deviation that does not show every time. Such a
// check may pass.
const Races = "races: "

// MinSize is the smallest export the suite works on, in bytes.
const MinSize = 192 << 20

// has reports whether all the transmission flags are offered.
func (s *Server) has(f wire.ExportFlags) bool { return s.Features.Flags&f == f }

// minBlock is the request granularity.
func (s *Server) minBlock() int64 { return max(s.Features.MinBlock, 1) }

// canTLS reports whether a connection can be upgraded.
func (s *Server) canTLS() bool { return s.TLS.Mode == TLSOn || s.TLS.Mode == TLSRequire }

// form is the form of replies on one connection.
type form string

const (
	simple     form = "simple"
	structured form = "structured"
	extended   form = "extended"
)

// forms lists the forms that the server has.
func (s *Server) forms() []form {
	l := []form{simple}
	if s.Features.Structured {
		l = append(l, structured)
	}
	if s.Features.Extended {
		l = append(l, extended)
	}
	return l
}

// best is the richest form that the server has.
func (s *Server) best() form {
	l := s.forms()
	return l[len(l)-1]
}

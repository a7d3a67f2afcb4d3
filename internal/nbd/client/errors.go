package client

import (
	"errors"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

var (
	// ErrProtocol marks every error by which the server broke the protocol.
	// The connection has ended when it is returned.
	ErrProtocol = errors.New("server broke the protocol")

	// ErrClosed is returned by requests on a client that was closed or whose
	// server has gone.
	ErrClosed = errors.New("connection is closed")

	// ErrNoTLS is returned when TLS was asked for and the server cannot
	// offer it. There is no way on without TLS.
	ErrNoTLS = errors.New("server does not offer TLS")

	// ErrTLS is returned when the TLS handshake fails. In TLS 1.3 a server
	// refuses a client's certificate only after it: then the next step
	// fails, otherwise.
	ErrTLS = errors.New("tls handshake")
)

// OptionError is a server's refusal of one option. The session goes on.
type OptionError struct {
	Opt wire.Opt
	Rep wire.Rep
	// Text is what the server said, at most limits.MaxString bytes. It is
	// the server's: print it quoted.
	Text string
}

func (e *OptionError) Error() string {
	s := fmt.Sprintf("%v refused: %v", e.Opt, e.Rep)
	if e.Text != "" {
		s += fmt.Sprintf(" (%q)", e.Text)
	}
	return s
}

// Refused reports whether the server refuses on principle (policy, TLS
// required) rather than because it cannot.
func (e *OptionError) Refused() bool {
	return e.Rep == wire.RepErrPolicy || e.Rep == wire.RepErrTLSReqd
}

// Error is the failure of one request. The connection goes on.
type Error struct {
	Cmd wire.Cmd
	// Off and Len are the request's range in bytes.
	Off, Len int64
	Errno    wire.Errno
	// Text is what the server said, or why the request was never sent.
	Text string
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%v at %d+%d: %v", e.Cmd, e.Off, e.Len, e.Errno)
	if e.Text != "" {
		s += fmt.Sprintf(" (%q)", e.Text)
	}
	return s
}

// Unwrap yields the error number, which errors.Is can match.
func (e *Error) Unwrap() error { return e.Errno }

// violation is an error that matches ErrProtocol.
func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// clip bounds a text from the server.
func clip(p []byte) string { return string(p[:min(len(p), limits.MaxString)]) }

package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/attach"
	"github.com/vmdiskd/vmdiskd/internal/backing/open"
	"github.com/vmdiskd/vmdiskd/internal/backing/qcow2/format"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
)

// destinationError is about the destination of a copy, whose format and files the flags
// for the source do not say.
type destinationError struct {
	path string
	err  error
}

func (e destinationError) Error() string { return fmt.Sprintf("destination %q: %v", e.path, e.err) }
func (e destinationError) Unwrap() error { return e.err }

// advice says what to do about an error, behind its text.
func advice(err error) string {
	var socket *control.SocketError
	destination := errors.As(err, new(destinationError))
	switch {
	case errors.As(err, &socket):
		return socketAdvice(socket)
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return "; --tls-certificates=FOLDER has the CA"
	case errors.Is(err, attach.ErrOff):
		return "; --config does that"
	case errors.Is(err, attach.ErrUnnamed):
		return "; --export names another"
	case destination && errors.Is(err, open.ErrDenied):
		return "; but those are for the source: of a destination no other file is opened"
	case destination && errors.Is(err, format.ErrOther):
		return "; if it is raw, say so: -O raw"
	case errors.Is(err, format.ErrOther):
		return "; if it is raw, say so: -f raw"
	}
	return ""
}

func socketAdvice(err *control.SocketError) string {
	const another = "--socket or " + socketVariable + " name another"
	switch {
	case errors.Is(err, control.ErrForeign):
		return "; " + another
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return "; is vmdiskd --config running (systemctl status vmdiskd)? " + another
	case errors.Is(err, fs.ErrPermission):
		return "; owner and mode of [control] say who may connect, and read-users and change-users, or -groups, who is answered"
	}
	return "; does [control] of the daemon name this user in read-users or change-users, or a group in read-groups or change-groups?"
}

package nbd

import (
	"errors"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

// errnoOf is the one place that turns an error into a number for the wire
// (proto.md, "Error values"). Out of range is ENOSPC for the two writing
// commands and EINVAL for the others; ENOTSUP is for FAST_ZERO alone.
func errnoOf(err error, req *wire.Request) wire.Errno {
	var e wire.Errno
	if errors.As(err, &e) {
		return e
	}
	switch backing.KindOf(err) {
	case backing.ErrOutOfRange:
		if req.Cmd == wire.CmdWrite || req.Cmd == wire.CmdZero {
			return wire.ENOSPC
		}
		return wire.EINVAL
	case backing.ErrReadOnly:
		return wire.EPERM
	case backing.ErrNoSpace:
		return wire.ENOSPC
	case backing.ErrAlignment, backing.ErrInvalid:
		return wire.EINVAL
	case backing.ErrNotSupported:
		if req.Cmd == wire.CmdZero && req.Flags&wire.FlagFastZero != 0 {
			return wire.ENOTSUP
		}
		return wire.EINVAL
	}
	return wire.EIO
}

// errorText is what the peer may read: the text of the kind, which names no
// path of the host.
func errorText(err error, e wire.Errno) string {
	var k backing.Kind
	if errors.As(err, &k) {
		return string(k)
	}
	var r *refusal
	if errors.As(err, &r) {
		return r.text
	}
	return e.String()
}

// refusal is an error that the protocol side finds by itself.
type refusal struct {
	errno wire.Errno
	text  string
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.errno }

package backing

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
)

// Kind classifies an error for the caller; errors.Is matches it. Its text is
// fit for a guest: it names no path of the host.
type Kind string

func (k Kind) Error() string { return string(k) }

const (
	ErrIO           Kind = "input/output error"
	ErrNoSpace      Kind = "no space left on the storage"
	ErrReadOnly     Kind = "read-only"
	ErrOutOfRange   Kind = "beyond the end of the disk"
	ErrAlignment    Kind = "not aligned to the block size"
	ErrInvalid      Kind = "invalid request"
	ErrNotSupported Kind = "not supported"
	ErrPoisoned     Kind = "an earlier write was lost, the disk must be opened anew"
	ErrLocked       Kind = "image is in use"
	ErrNotMappable  Kind = "not mappable"
)

// Error is an error with its place. The log shows all of it, the guest sees
// the text of Kind.
type Error struct {
	Op   string
	Path string
	Off  int64 // -1 when the error concerns the whole device
	Len  int64
	Kind Kind
	Err  error // the cause, may be nil
}

func (e *Error) Error() string {
	s := e.Op
	if e.Path != "" {
		s += fmt.Sprintf(" %q", e.Path)
	}
	if e.Off >= 0 {
		s += fmt.Sprintf(" at %d+%d", e.Off, e.Len)
	}
	s += ": " + string(e.Kind)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap yields the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// KindOf classifies any error; what it does not know is ErrIO.
func KindOf(err error) Kind {
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		switch e {
		case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
			return ErrNoSpace
		case syscall.EROFS, syscall.EPERM, syscall.EACCES:
			return ErrReadOnly
		case syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.ENOTTY:
			return ErrNotSupported
		}
		return ErrIO
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrIO
	}
	return ErrIO
}

// Wrap gives err its kind and place. nil stays nil; an *Error stays as it is.
// That the caller gave up waiting happened to the caller: it has no kind, and
// stays as it is too.
func Wrap(op string, off, n int64, err error) error { return WrapIn(op, "", off, n, err) }

// WrapIn is Wrap for what happened to the image at path, which an *Error
// without a path gets.
func WrapIn(op, path string, off, n int64, err error) error {
	if err == nil || GaveUp(err) {
		return err
	}
	var e *Error // below: it costs an allocation
	if errors.As(err, &e) {
		return WithPath(path, err)
	}
	return &Error{Op: op, Path: path, Off: off, Len: n, Kind: KindOf(err), Err: err}
}

// GaveUp tells whether err is about the caller's patience: another caller may
// have more.
func GaveUp(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// WithPath gives path to an err that is an *Error without one. Any other err
// stays as it is, and so does one that only holds an *Error.
func WithPath(path string, err error) error {
	e, is := err.(*Error)
	if !is || e.Path != "" || path == "" {
		return err
	}
	named := *e
	named.Path = path
	return &named
}

package qmp

import (
	"errors"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Classes of errors that QEMU names. Any other text may come.
const (
	ClassGeneric         = "GenericError"
	ClassCommandNotFound = "CommandNotFound"
	ClassDeviceNotActive = "DeviceNotActive"
	ClassDeviceNotFound  = "DeviceNotFound"
)

var (
	// ErrClosed is for use of a monitor that Close has ended.
	ErrClosed = errors.New("monitor closed")

	// ErrProtocol is for a peer that does not speak QMP. The monitor is of
	// no use afterwards.
	ErrProtocol = errors.New("not the machine protocol")

	// ErrLost is for a connection that the peer has ended.
	ErrLost = errors.New("monitor connection lost")

	// ErrNoGreeting is for a monitor that accepts and says nothing, which a
	// QEMU does that already serves another client.
	ErrNoGreeting = errors.New("no greeting: the monitor may be in use by another client, QEMU serves one per socket")

	// ErrUnanswered is for a command that was sent and not answered in time:
	// it may have been carried out, now or later.
	ErrUnanswered = errors.New("no reply in time, the command may have been carried out")

	// ErrTooMany is for a monitor with limits.QMPPending commands without a
	// reply, or limits.QMPSubscribers subscribers.
	ErrTooMany = errors.New("too many at once")

	// ErrInvalid is for arguments that are not sent because they cannot be
	// right.
	ErrInvalid = errors.New("invalid")
)

// Error is QEMU's refusal of a command, or an agent's.
type Error struct {
	Command string // as sent
	Class   string // as QEMU names it
	Desc    string // printable, at most limits.QMPErrorText bytes
}

// Error names the command and quotes nothing: Desc is printable.
func (e *Error) Error() string {
	text := e.Command + ": " + e.Desc
	if e.Class != ClassGeneric && e.Class != "" {
		text += " (" + e.Class + ")"
	}
	return text
}

// HasClass reports whether err is QEMU's refusal with the class.
func HasClass(err error, class string) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == class
}

// printable bounds a peer's text to n bytes and escapes what could change
// the terminal or the line it is printed on.
func printable(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		part := s[:size]
		if r == utf8.RuneError && size == 1 || !unicode.IsPrint(r) {
			q := strconv.Quote(part)
			part = q[1 : len(q)-1]
		}
		if b.Len()+len(part) > n {
			break
		}
		b.WriteString(part)
		s = s[size:]
	}
	return b.String()
}

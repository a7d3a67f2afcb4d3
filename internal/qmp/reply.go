package qmp

import (
	"encoding/json"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// EncodeCommand is a command as one line without its end, for a transport of
// the caller's own such as libvirt's. Errors are ErrInvalid.
func EncodeCommand(command string, arguments any) ([]byte, error) {
	b, err := encode(command, arguments, "")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return b[:len(b)-1], nil
}

// DecodeReply reads the reply to a command: what it holds, QEMU's refusal as
// *Error, or ErrProtocol.
func DecodeReply(command string, reply []byte) (json.RawMessage, error) {
	if len(reply) > limits.QMPLine {
		return nil, fmt.Errorf("%s: %w: a reply of %d bytes", command, ErrProtocol, len(reply))
	}
	m, err := parseMessage(reply)
	if err == nil && m.Return == nil && m.Error == nil {
		err = fmt.Errorf("%w: no reply: %q", ErrProtocol, head(reply))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return m.Return, m.refusal(command)
}

// Printable bounds a peer's text to n bytes and escapes what could change the
// terminal or the line that it is printed on.
func Printable(s string, n int) string { return printable(s, n) }

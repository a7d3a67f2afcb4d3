package qmp

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Event is what QEMU reports by itself.
type Event struct {
	Name string
	Data json.RawMessage // an object, or empty; the receiver's to read
	Time time.Time       // by QEMU's clock
}

// message is any line from a monitor. Only one of Greeting, Event, Return
// and Error is set.
type message struct {
	Greeting *struct {
		Version struct {
			Package string  `json:"package"`
			QEMU    Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
	ID     json.RawMessage `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// Version is QEMU's own, as its greeting says.
type Version struct {
	Major int `json:"major"`
	Minor int `json:"minor"`
	Micro int `json:"micro"`
}

// String is like "7.2.22".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// parseMessage reads one line; the result refers to it.
func parseMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("%w: %q is no message on one line (a monitor with pretty=on cannot be used): %w", ErrProtocol, head(line), err)
	}
	kinds := 0
	for _, set := range []bool{m.Greeting != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if set {
			kinds++
		}
	}
	if kinds != 1 || len(m.Event) > limits.QMPName {
		return m, fmt.Errorf("%w: %q is no greeting, event or reply", ErrProtocol, head(line))
	}
	return m, nil
}

// head is the part of a line that an error shows.
func head(line []byte) []byte {
	const shown = 80
	if len(line) > shown {
		return line[:shown]
	}
	return line
}

// event is the message as an event, with data of its own.
func (m *message) event() Event {
	return Event{
		Name: m.Event,
		Data: bytes.Clone(m.Data),
		Time: time.Unix(m.Timestamp.Seconds, 0).Add(time.Duration(m.Timestamp.Microseconds%1e6) * time.Microsecond),
	}
}

// refusal is the error of a reply.
func (m *message) refusal(command string) error {
	if m.Error == nil {
		return nil
	}
	return &Error{
		Command: command,
		Class:   printable(m.Error.Class, limits.QMPName),
		Desc:    printable(m.Error.Desc, limits.QMPErrorText),
	}
}

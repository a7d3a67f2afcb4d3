package qmp

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestLinesAreWholeAndBounded(t *testing.T) {
	const max = 40 << 10 // longer than the buffer
	long := strings.Repeat("l", max-1)
	for _, tt := range []struct {
		name, in string
		want     []string
		err      error
	}{
		{"lines", "a\nb\r\n", []string{"a", "b"}, io.EOF},
		{"blank lines are skipped", "\n\r\n \na\n", []string{"a"}, io.EOF},
		{"cut", "a\nb", []string{"a"}, io.ErrUnexpectedEOF},
		{"as long as allowed", long + "\na\n", []string{long, "a"}, io.EOF},
		{"too long", long + "l\n", nil, ErrProtocol},
		{"too long without end", strings.Repeat("x", 3*max), nil, ErrProtocol},
	} {
		for _, r := range []io.Reader{strings.NewReader(tt.in), iotest.OneByteReader(strings.NewReader(tt.in)), iotest.DataErrReader(strings.NewReader(tt.in))} {
			l := newLineReader(r, max)
			for _, want := range tt.want {
				if got, err := l.next(); err != nil || string(got) != want {
					t.Fatalf("%s: got %.20q, %v, want %.20q", tt.name, got, err, want)
				}
			}
			if got, err := l.next(); !errors.Is(err, tt.err) {
				t.Errorf("%s: then %.20q, %v, want %v", tt.name, got, err, tt.err)
			}
		}
	}
}

func TestHalfALineHasADeadline(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	l := newLineReader(a, 1000)
	l.arm, l.rest = a.SetReadDeadline, 20*time.Millisecond
	go io.WriteString(b, `{"half`)
	if line, err := l.next(); err == nil {
		t.Errorf("read %q", line)
	} else if !errors.Is(lost(err), ErrProtocol) {
		t.Errorf("error %v", err)
	}
}

// FuzzMonitorInput holds what any bytes of a peer may do: lines within the
// bound, messages of one kind, errors that say which.
func FuzzMonitorInput(f *testing.F) {
	for _, s := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}`,
		`{"return": {}, "id": 1}`, `{"error": {"class": "GenericError", "desc": "x"}, "id": 1}`,
		`{"event": "E", "data": {"a": [1]}, "timestamp": {"seconds": -1, "microseconds": 99999999999}}`, "\xff{}\n\n{", `{"return":null}`,
	} {
		f.Add([]byte(s + "\r\n" + s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		const max = 200
		l := newLineReader(bytes.NewReader(in), max)
		for {
			line, err := l.next()
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrProtocol) {
					t.Fatalf("reader: %v", err)
				}
				return
			}
			if len(line) == 0 || len(line) > max || bytes.IndexByte(line, '\n') >= 0 {
				t.Fatalf("line %q", line)
			}
			m, err := parseMessage(line)
			if err != nil {
				if !errors.Is(err, ErrProtocol) {
					t.Fatalf("message: %v", err)
				}
				continue
			}
			if m.Event != "" {
				m.event()
			}
			if err := m.refusal("c"); err != nil && strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Fatalf("refusal %q", err)
			}
		}
	})
}

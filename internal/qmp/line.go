package qmp

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"time"
)

// readBuffer holds most lines whole.
const readBuffer = 16 << 10

// lineReader reads lines of bounded length. Waiting for a line to begin is
// unbounded, waiting for its rest is not.
type lineReader struct {
	r   *bufio.Reader
	max int
	// arm sets the deadline of reads: the zero time means none. Nil for
	// readers without.
	arm  func(time.Time) error
	rest time.Duration
}

func newLineReader(r io.Reader, max int) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, readBuffer), max: max}
}

// next returns the next line that is not blank, without its end. It is the
// caller's to keep. A line of more than max bytes is ErrProtocol, the end of
// the stream io.EOF, within a line io.ErrUnexpectedEOF.
func (l *lineReader) next() ([]byte, error) {
	for {
		line, err := l.line()
		if err != nil {
			return nil, err
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			return line, nil
		}
	}
}

func (l *lineReader) line() ([]byte, error) {
	if err := l.setDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if _, err := l.r.Peek(1); err != nil {
		return nil, err
	}
	if err := l.setDeadline(time.Now().Add(l.rest)); err != nil {
		return nil, err
	}
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		if len(line)+len(part) > l.max {
			return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrProtocol, l.max)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line, nil
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func (l *lineReader) setDeadline(t time.Time) error {
	if l.arm == nil {
		return nil
	}
	return l.arm(t)
}

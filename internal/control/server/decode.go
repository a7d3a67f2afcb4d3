package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// decode reads one JSON object of at most limits.ControlBody bytes into v, a
// pointer to a struct. It is stricter than encoding/json: text is UTF-8, each
// name is known, lower case and there once, none is missing that is not
// omitempty, there is no null and nothing behind the end.
func decode(b []byte, v any) error {
	if len(b) > limits.ControlBody {
		return fmt.Errorf("longer than %d bytes", limits.ControlBody)
	}
	if !utf8.Valid(b) {
		return errors.New("not UTF-8")
	}
	if err := checkJSON(b); err != nil {
		return err
	}
	if err := checkRequired(reflect.TypeOf(v), b); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// level is an object or array that is not closed yet.
type level struct {
	names map[string]bool // nil: an array
	value bool            // of an object: the next token is a value
}

// checkJSON walks through the tokens of b.
func checkJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var open []level
	for {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			return errors.New("not a whole JSON object")
		}
		if err != nil {
			return fmt.Errorf("not JSON: %w", err)
		}
		if open, err = step(open, tok); err != nil {
			return err
		}
		if len(open) == 0 {
			break
		}
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON object")
	}
	return nil
}

// step takes one token.
func step(open []level, tok json.Token) ([]level, error) {
	if len(open) == 0 && tok != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	if n := len(open); n > 0 && open[n-1].names != nil && !open[n-1].value {
		if tok == json.Delim('}') {
			return pop(open), nil
		}
		return open, open[n-1].name(tok)
	}
	switch tok := tok.(type) {
	case json.Delim:
		switch tok {
		case ']':
			return pop(open), nil
		case '{':
			open = append(open, level{names: map[string]bool{}})
		case '[':
			open = append(open, level{})
		}
		if len(open) > limits.ControlDepth {
			return nil, fmt.Errorf("nested deeper than %d levels", limits.ControlDepth)
		}
		return open, nil
	case nil:
		return nil, errors.New("null is not a value")
	case string:
		if err := checkText(tok); err != nil {
			return nil, err
		}
	}
	open[len(open)-1].value = false
	return open, nil
}

// pop closes the last level, which was a value of the one around it.
func pop(open []level) []level {
	open = open[:len(open)-1]
	if n := len(open); n > 0 {
		open[n-1].value = false
	}
	return open
}

// name takes a name. Upper case is refused, because encoding/json would find
// the field all the same and two names would mean one.
func (l *level) name(tok json.Token) error {
	name, _ := tok.(string)
	switch {
	case strings.ContainsFunc(name, func(r rune) bool { return r != '-' && (r < 'a' || r > 'z') && (r < '0' || r > '9') }):
		return fmt.Errorf("unknown field %q", short(name))
	case l.names[name]:
		return fmt.Errorf("%q is there twice", short(name))
	}
	l.names[name] = true
	l.value = true
	return nil
}

// checkText refuses U+FFFD, which encoding/json puts where an escape is half a
// surrogate pair: the text would not be what was sent.
func checkText(s string) error {
	switch {
	case strings.ContainsRune(s, utf8.RuneError):
		return errors.New("text that is not Unicode")
	case strings.ContainsRune(s, 0):
		return errors.New("text with a zero byte")
	}
	return nil
}

// short bounds what an error repeats.
func short(s string) string {
	if len(s) > 64 {
		s = strings.ToValidUTF8(s[:64], "") + "…"
	}
	return s
}

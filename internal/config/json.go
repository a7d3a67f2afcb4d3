package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// DecodeJSON reads one JSON object of at most limits.ExportJSON bytes into v, a
// pointer to a struct whose keys have small ASCII letters, digits and "-" only.
// What encoding/json lets pass is refused: unknown keys, keys given twice or in
// another case, null, text that is not UTF-8 or half a UTF-16 pair, anything
// behind the object, and more than limits.ExportDepth levels.
func DecodeJSON(b []byte, v any) error { return decodeJSON(b, v, limits.ExportJSON) }

func decodeJSON(b []byte, v any, most int) error {
	switch {
	case len(b) > most:
		return fmt.Errorf("it has %d bytes, which is more than %d", len(b), most)
	case !utf8.Valid(b):
		return errors.New("it is not UTF-8")
	case !json.Valid(b):
		return syntaxOf(b)
	}
	if err := checkPairs(b); err != nil {
		return err
	}
	if err := checkTokens(b); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// syntaxOf says why b is no JSON.
func syntaxOf(b []byte) error {
	var raw json.RawMessage
	err := json.Unmarshal(b, &raw)
	if se, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("byte %d: %w", se.Offset, err)
	}
	return fmt.Errorf("it is not JSON: %w", err)
}

// level is an object or a list that is being read.
type level struct {
	keys map[string]bool // of an object; nil for a list
	key  bool            // a key comes next
}

// checkTokens walks valid JSON for what the decoder does not care about.
func checkTokens(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var stack []level
	for {
		t, err := d.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if len(stack) == 0 && t != json.Delim('{') {
			return errors.New("it is not an object")
		}
		if t == json.Delim('}') || t == json.Delim(']') {
			if stack = stack[:len(stack)-1]; len(stack) == 0 {
				return nil
			}
			continue
		}
		if len(stack) > 0 {
			isKey, err := stack[len(stack)-1].take(t)
			if err != nil {
				return err
			}
			if isKey {
				continue
			}
		}
		switch t {
		case json.Delim('{'):
			stack = append(stack, level{keys: map[string]bool{}, key: true})
		case json.Delim('['):
			stack = append(stack, level{})
		case nil:
			return errors.New("null is no value here")
		}
		if len(stack) > limits.ExportDepth {
			return fmt.Errorf("it has more than %d levels", limits.ExportDepth)
		}
	}
}

// take counts a token, the first of a value or a key, into an object.
func (l *level) take(t json.Token) (isKey bool, err error) {
	if l.keys == nil {
		return false, nil
	}
	if !l.key {
		l.key = true
		return false, nil
	}
	l.key = false
	name, _ := t.(string)
	other := func(r rune) bool { return !('a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '-') }
	switch {
	case strings.ContainsFunc(name, other):
		return true, fmt.Errorf("unknown field %q", cut(name))
	case l.keys[name]:
		return true, fmt.Errorf("field %q is given twice", cut(name))
	}
	l.keys[name] = true
	return true, nil
}

// checkPairs refuses halves of UTF-16 pairs among the escapes of valid JSON.
func checkPairs(b []byte) error {
	for i := 0; i < len(b); i++ {
		if b[i] != '\\' {
			continue
		}
		if b[i+1] != 'u' {
			i++
			continue
		}
		switch r := hex4(b[i+2:]); {
		case r >= 0xdc00 && r <= 0xdfff:
			return fmt.Errorf("byte %d: half a pair of UTF-16", i+1)
		case r >= 0xd800 && r <= 0xdbff:
			if rest := b[i+6:]; len(rest) < 6 || rest[0] != '\\' || rest[1] != 'u' || hex4(rest[2:])&^0x3ff != 0xdc00 {
				return fmt.Errorf("byte %d: half a pair of UTF-16", i+1)
			}
			i += 6
		}
		i += 5
	}
	return nil
}

// hex4 reads four digits of valid JSON.
func hex4(b []byte) (r rune) {
	for _, c := range b[:4] {
		switch {
		case c <= '9':
			r = r<<4 | rune(c-'0')
		default:
			r = r<<4 | rune(c|0x20-'a'+10)
		}
	}
	return r
}

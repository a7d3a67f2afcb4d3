package format

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// JSONPrefix begins a file name that is a description in JSON.
const JSONPrefix = "json:"

// ParseJSONFile reads a file name of the one form allowed with JSONPrefix,
// which is an image format above a file:
//
//	json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/a/b"}}
//
// with "raw" for the format too, and with "file.driver" and "file.filename" for
// the inner object. All of it must be said, once, and nothing else.
func ParseJSONFile(s string) (format, filename string, err error) {
	text, ok := strings.CutPrefix(s, JSONPrefix)
	switch {
	case !ok:
		return "", "", fmt.Errorf("file name does not begin with %q", JSONPrefix)
	case len(s) > limits.JSONName:
		return "", "", fmt.Errorf("json: file name of %d bytes is too long", len(s))
	case !utf8.ValidString(s):
		return "", "", fmt.Errorf("json: file name is not UTF-8")
	}
	dec := json.NewDecoder(strings.NewReader(text))
	values := map[string]string{}
	if err := readObject(dec, "", values); err != nil {
		return "", "", err
	}
	if _, err := dec.Token(); err != io.EOF {
		return "", "", fmt.Errorf("json: file name goes on behind its end")
	}
	format, filename = values["driver"], values["file.filename"]
	switch {
	case format != "raw" && format != "qcow2":
		return "", "", fmt.Errorf("json: driver %q is not supported", format)
	case values["file.driver"] != "file":
		return "", "", fmt.Errorf("json: file driver %q is not supported", values["file.driver"])
	case filename == "":
		return "", "", fmt.Errorf("json: no file name")
	case HasControl(filename) || strings.ContainsRune(filename, utf8.RuneError):
		return "", "", fmt.Errorf("json: file name %q has control characters", filename)
	}
	return format, filename, nil
}

// readObject reads an object whose values are strings into values, its keys
// with prefix before them.
func readObject(dec *json.Decoder, prefix string, values map[string]string) error {
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("json: %s is not an object", orWhole(prefix))
	}
	for {
		t, err := dec.Token()
		if err != nil {
			return fmt.Errorf("json: %w", err)
		}
		if t == json.Delim('}') {
			return nil
		}
		name, _ := t.(string) // the decoder lets only strings be keys
		key := prefix + name
		switch key {
		case "file":
			if _, twice := values[key]; twice {
				return fmt.Errorf("json: %q is said twice", key)
			}
			values[key] = ""
			err = readObject(dec, "file.", values)
		case "driver", "file.driver", "file.filename":
			err = readString(dec, key, values)
		default:
			err = fmt.Errorf("json: option %q is not supported", key)
		}
		if err != nil {
			return err
		}
	}
}

func readString(dec *json.Decoder, key string, values map[string]string) error {
	t, err := dec.Token()
	if err != nil {
		return fmt.Errorf("json: %w", err)
	}
	s, ok := t.(string)
	if !ok {
		return fmt.Errorf("json: %q is not a string", key)
	}
	if _, twice := values[key]; twice {
		return fmt.Errorf("json: %q is said twice", key)
	}
	values[key] = s
	return nil
}

// orWhole names what prefix leads to.
func orWhole(prefix string) string {
	if prefix == "" {
		return "file name"
	}
	return fmt.Sprintf("%q", strings.TrimSuffix(prefix, "."))
}

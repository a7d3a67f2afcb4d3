package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
)

// checkRequired refuses an object that leaves out a field which t, a struct,
// does not mark with omitempty: a name that was forgotten is not the empty
// name. The JSON in b has been checked.
func checkRequired(t reflect.Type, b []byte) error {
	switch t.Kind() {
	case reflect.Pointer:
		return checkRequired(t.Elem(), b)
	case reflect.Slice:
		var elems []json.RawMessage
		if json.Unmarshal(b, &elems) != nil {
			return nil // of another kind, which the decoder refuses
		}
		for _, e := range elems {
			if err := checkRequired(t.Elem(), e); err != nil {
				return err
			}
		}
	case reflect.Struct:
		var fields map[string]json.RawMessage
		if !bytes.HasPrefix(bytes.TrimSpace(b), []byte("{")) || json.Unmarshal(b, &fields) != nil {
			return nil
		}
		return checkFields(t, fields)
	}
	return nil
}

func checkFields(t reflect.Type, fields map[string]json.RawMessage) error {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			if err := checkFields(f.Type, fields); err != nil {
				return err
			}
			continue
		}
		name, opt, _ := strings.Cut(f.Tag.Get("json"), ",")
		v, ok := fields[name]
		if !ok && opt != "omitempty" {
			return fmt.Errorf("%q is missing", name)
		}
		if !ok {
			continue
		}
		if err := checkRequired(f.Type, v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

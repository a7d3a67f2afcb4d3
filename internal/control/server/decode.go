package server

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/config"
)

// decode reads a body into v, a pointer to a struct, as config.DecodeJSON does.
// It also refuses an object that leaves out what v does not mark with
// omitempty: a name that was forgotten is not the empty name.
func decode(b []byte, v any) error {
	if err := config.DecodeJSON(b, v); err != nil {
		return err
	}
	return checkRequired(reflect.TypeOf(v), b)
}

// checkRequired looks for what b, which was decoded into a t, leaves out.
func checkRequired(t reflect.Type, b []byte) error {
	switch t.Kind() {
	case reflect.Pointer:
		return checkRequired(t.Elem(), b)
	case reflect.Slice:
		var elems []json.RawMessage
		if err := json.Unmarshal(b, &elems); err != nil {
			return err
		}
		for _, e := range elems {
			if err := checkRequired(t.Elem(), e); err != nil {
				return err
			}
		}
	case reflect.Struct:
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(b, &fields); err != nil {
			return err
		}
		return checkFields(t, fields)
	}
	return nil
}

// checkFields is checkRequired of a struct. What has the name "-" is never said.
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
		if !ok && opt != "omitempty" && name != "-" {
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

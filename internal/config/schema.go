package config

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/vmdiskd/vmdiskd/internal/cmdline"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

var (
	sizeType     = reflect.TypeFor[Size]()
	durationType = reflect.TypeFor[Duration]()
)

// schema walks a document beside the types of Config. The decoder of the
// library does not care about the case of keys, takes a number for a duration
// of nanoseconds and a table for a list: so it is checked here.
type schema struct {
	file   string
	p      unstable.Parser
	at     reflect.Type    // of the table that the last header named; nil if it is unknown
	lists  map[string]bool // the lists that headers such as [[export]] have begun
	errors Errors
}

// checkSchema finds all keys that do not exist and all values of a wrong kind.
// A document that is no TOML is the last error.
func checkSchema(file string, b []byte) Errors {
	s := schema{file: file, at: reflect.TypeFor[Config](), lists: map[string]bool{}}
	s.p.Reset(b)
	for s.p.NextExpression() && len(s.errors) < limits.ConfigProblems {
		switch e := s.p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			s.header(e)
		case unstable.KeyValue:
			s.keyValue(e, s.at)
		}
	}
	if err := s.p.Error(); err != nil {
		s.syntax(err)
	}
	return s.errors.sorted()
}

func (s *schema) fail(r unstable.Range, format string, a ...any) {
	at := s.p.Shape(r).Start
	s.errors = append(s.errors, &Error{s.file, at.Line, at.Column, fmt.Sprintf(format, a...)})
}

func (s *schema) syntax(err error) {
	r := unstable.Range{}
	text := plain(err)
	if pe, ok := errors.AsType[*unstable.ParserError](err); ok {
		r, text = s.p.Range(pe.Highlight), plain(errors.New(pe.Message))
	}
	if strings.Contains(text, "leading zero") {
		text += "; a mode is text, as \"0660\""
	}
	s.fail(r, "%s", text)
}

// header follows the keys of [a.b] or [[a.b]].
func (s *schema) header(e *unstable.Node) {
	t := reflect.TypeFor[Config]()
	var path strings.Builder
	var last *unstable.Node
	list := false // t is a list, of which the last table is meant
	s.at = nil
	for it := e.Key(); it.Next(); {
		last = it.Node()
		if list {
			t = t.Elem()
		}
		if t = s.field(t, last); t == nil {
			return
		}
		fmt.Fprintf(&path, "%q.", last.Data)
		list = isTables(t)
		if list && !it.IsLast() && !s.lists[path.String()] {
			s.fail(last.Raw, "%q is a list of tables: write [[%s]] first", last.Data, last.Data)
			return
		}
	}
	switch {
	case e.Kind == unstable.ArrayTable && !list:
		s.fail(last.Raw, "%q is not a list of tables", last.Data)
	case e.Kind == unstable.Table && list:
		s.fail(last.Raw, "%q is a list of tables: write it in [[ ]]", last.Data)
	case list:
		s.at = t.Elem()
		s.lists[path.String()] = true
		s.forget(path.String())
	case t.Kind() == reflect.Struct || t.Kind() == reflect.Map:
		s.at = t
	default:
		s.fail(last.Raw, "%q is not a table", last.Data)
	}
}

// forget ends the lists inside the tables of a list, where a new one begins.
func (s *schema) forget(list string) {
	for k := range s.lists {
		if k != list && strings.HasPrefix(k, list) {
			delete(s.lists, k)
		}
	}
}

// isTables tells whether values of type t are lists of tables.
func isTables(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct
}

// field is the type of a key of t, without a pointer. A key that t does not
// have is an error, and nil.
func (s *schema) field(t reflect.Type, key *unstable.Node) reflect.Type {
	name := string(key.Data)
	var keys []string
	switch t.Kind() {
	case reflect.Map:
		return t.Elem()
	case reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			k := f.Tag.Get("toml")
			if k == "-" { // no key
				continue
			}
			keys = append(keys, k)
			switch {
			case k != name:
			case f.Type.Kind() == reflect.Pointer:
				return f.Type.Elem()
			default:
				return f.Type
			}
		}
	}
	meant := ""
	if near := cmdline.Nearest(name, keys); near != "" {
		meant = fmt.Sprintf(": did you mean %q?", near)
	}
	s.fail(key.Raw, "there is no key %q here%s", name, meant)
	return nil
}

// keyValue checks a.b = value in a table of type t; nil is an unknown one.
func (s *schema) keyValue(e *unstable.Node, t reflect.Type) {
	if t == nil {
		return
	}
	for it := e.Key(); it.Next(); {
		key := it.Node()
		if t = s.field(t, key); t == nil {
			return
		}
		if isTables(t) && !it.IsLast() {
			s.fail(key.Raw, "%q is a list of tables", key.Data)
			return
		}
		if it.IsLast() {
			s.value(e.Value(), t, key)
		}
	}
}

// value checks the kind of a value of key, or in a list of key.
func (s *schema) value(v *unstable.Node, t reflect.Type, key *unstable.Node) {
	var ok bool
	var want string
	switch {
	case t == sizeType:
		ok, want = v.Kind == unstable.String || v.Kind == unstable.Integer, `a size, as 4096 or "10G"`
	case t == durationType:
		ok, want = v.Kind == unstable.String, `a duration, as "250ms" or "5s"`
	case t.Kind() == reflect.String:
		ok, want = v.Kind == unstable.String, "text in quotes"
	case t.Kind() == reflect.Bool:
		ok, want = v.Kind == unstable.Bool, "true or false"
	case t.Kind() == reflect.Float64:
		ok, want = v.Kind == unstable.Float || v.Kind == unstable.Integer, "a number"
	case t.Kind() == reflect.Slice:
		ok, want = v.Kind == unstable.Array, "a list in [ ]"
	case t.Kind() == reflect.Struct || t.Kind() == reflect.Map:
		ok, want = v.Kind == unstable.InlineTable, "a table"
	default:
		ok, want = v.Kind == unstable.Integer, "a whole number"
	}
	if string(key.Data) == "mode" && v.Kind == unstable.Integer {
		want = fmt.Sprintf("text in quotes, as \"0%s\"", strings.TrimPrefix(string(v.Data), "0o"))
	}
	if !ok {
		s.fail(key.Raw, "%q: want %s", key.Data, want)
		return
	}
	switch v.Kind {
	case unstable.Array:
		for it := v.Children(); it.Next(); {
			s.value(it.Node(), t.Elem(), key)
		}
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			s.keyValue(it.Node(), t)
		}
	}
}

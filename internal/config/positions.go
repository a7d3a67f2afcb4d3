package config

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// Paths name keys and tables of a document, as ."export"[0]."image".

// within is the path of a key of a table.
func within(path, key string) string { return path + "." + strconv.Quote(key) }

// nth is the path of a table of a list.
func nth(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// positions are where the keys and tables of a document without syntax errors
// stand.
type positions struct {
	p    unstable.Parser
	at   map[string]unstable.Position
	size map[string]int // of the lists that headers such as [[export]] make
}

func positionsOf(b []byte) *positions {
	s := &positions{at: map[string]unstable.Position{}, size: map[string]int{}}
	s.p.Reset(b)
	table := ""
	for s.p.NextExpression() {
		switch e := s.p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = s.header(e)
		case unstable.KeyValue:
			s.keyValue(e, table)
		}
	}
	return s
}

// see keeps where the first mention of a path is.
func (s *positions) see(path string, key *unstable.Node) {
	if _, ok := s.at[path]; !ok {
		s.at[path] = s.p.Shape(key.Raw).Start
	}
}

// header is the path of the table that [a.b] or [[a.b]] begins. On the way the
// last table of each list is meant.
func (s *positions) header(e *unstable.Node) (path string) {
	for it := e.Key(); it.Next(); {
		key := it.Node()
		path = within(path, string(key.Data))
		if e.Kind == unstable.ArrayTable && it.IsLast() {
			s.size[path]++
		}
		if n := s.size[path]; n > 0 {
			path = nth(path, n-1)
		}
		s.see(path, key)
	}
	return path
}

func (s *positions) keyValue(e *unstable.Node, path string) {
	var key *unstable.Node
	for it := e.Key(); it.Next(); {
		key = it.Node()
		path = within(path, string(key.Data))
		s.see(path, key)
	}
	s.value(e.Value(), path, key)
}

// value follows what is inside a value of key.
func (s *positions) value(v *unstable.Node, path string, key *unstable.Node) {
	switch v.Kind {
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			s.keyValue(it.Node(), path)
		}
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); i++ {
			s.see(nth(path, i), key)
			s.value(it.Node(), nth(path, i), key)
		}
	}
}

// of is the position of a path, or of the closest table around it that is in the
// document.
func (s *positions) of(path string) (line, column int) {
	for path != "" {
		if at, ok := s.at[path]; ok {
			return at.Line, at.Column
		}
		if list, ok := strings.CutSuffix(path, "]"); ok {
			path = list[:strings.LastIndexByte(list, '[')]
			continue
		}
		path = path[:max(0, strings.LastIndex(path, `."`))]
	}
	return 1, 1
}

// placed are the problems of the document b, where they are in the file.
func placed(file string, b []byte, ps Problems) Errors {
	where := positionsOf(b)
	es := make(Errors, len(ps))
	for i, p := range ps {
		line, column := where.of(p.path)
		es[i] = &Error{File: file, Line: line, Column: column, Text: p.String()}
	}
	return es.sorted()
}

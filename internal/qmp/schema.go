package qmp

import (
	"context"
	"encoding/json"
	"fmt"
)

// Schema is what query-qmp-schema says: which commands, events and options
// this QEMU has.
type Schema struct {
	named map[string]*schemaType
}

// schemaType is one entry of the schema. Names of types are numbers that
// change from version to version; only the way from a command to them counts.
type schemaType struct {
	Name    string `json:"name"`
	Meta    string `json:"meta-type"`
	ArgType string `json:"arg-type"`
	Members []struct {
		Name string `json:"name"`
	} `json:"members"`
	Variants []struct {
		Case string `json:"case"`
		Type string `json:"type"`
	} `json:"variants"`
}

// Schema asks for the schema once; it has 200 KiB.
func (m *Monitor) Schema(ctx context.Context) (*Schema, error) {
	m.mu.Lock()
	s := m.schema
	m.mu.Unlock()
	if s != nil {
		return s, nil
	}
	s, err := QuerySchema(ctx, m)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.schema = s
	m.mu.Unlock()
	return s, nil
}

// QuerySchema asks for the schema, as Monitor.Schema does by any other way.
func QuerySchema(ctx context.Context, x Executor) (*Schema, error) {
	entries, err := ask[[]*schemaType](ctx, x, "query-qmp-schema", nil)
	if err != nil {
		return nil, err
	}
	s := &Schema{named: make(map[string]*schemaType, len(entries))}
	for _, e := range entries {
		if e != nil {
			s.named[e.Name] = e
		}
	}
	return s, nil
}

// HasCommand reports whether QEMU knows the command.
func (s *Schema) HasCommand(name string) bool { return s.has(name, "command") }

// HasEvent reports whether QEMU knows the event.
func (s *Schema) HasEvent(name string) bool { return s.has(name, "event") }

func (s *Schema) has(name, meta string) bool {
	t := s.named[name]
	return t != nil && t.Meta == meta
}

// HasOption reports whether a command takes the option: an argument that it
// always takes, or, with a variant such as a driver's name, one of that
// variant's.
func (s *Schema) HasOption(command, variant, option string) bool {
	if !s.HasCommand(command) {
		return false
	}
	args := s.named[s.named[command].ArgType]
	if args != nil && variant != "" {
		of := ""
		for _, v := range args.Variants {
			if v.Case == variant {
				of = v.Type
			}
		}
		args = s.named[of]
	}
	if args == nil {
		return false
	}
	for _, m := range args.Members {
		if m.Name == option {
			return true
		}
	}
	return false
}

// ask executes a command and decodes what it returns.
func ask[T any](ctx context.Context, x Executor, command string, arguments any) (T, error) {
	var v T
	raw, err := x.Execute(ctx, command, arguments)
	if err != nil {
		return v, err
	}
	return v, decode(command, raw, &v)
}

// decode reads what a command returned.
func decode(command string, raw json.RawMessage, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("%s: %w: %w", command, ErrProtocol, err)
	}
	return nil
}

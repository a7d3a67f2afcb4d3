package qmp

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Supports reports whether this QEMU has the command. It is asked once.
func (m *Monitor) Supports(ctx context.Context, command string) (bool, error) {
	m.mu.Lock()
	known := m.known
	m.mu.Unlock()
	if known == nil {
		var err error
		if known, err = Commands(ctx, m); err != nil {
			return false, err
		}
		m.mu.Lock()
		m.known = known
		m.mu.Unlock()
	}
	_, ok := known[command]
	return ok, nil
}

// Commands are the names of those that a QEMU has, at most limits.QMPItems.
func Commands(ctx context.Context, x Executor) (map[string]struct{}, error) {
	const command = "query-commands"
	list, err := ask[[]struct {
		Name string `json:"name"`
	}](ctx, x, command, nil)
	if err != nil {
		return nil, err
	}
	if len(list) > limits.QMPItems {
		return nil, fmt.Errorf("%s: %w: %d commands", command, ErrProtocol, len(list))
	}
	known := make(map[string]struct{}, len(list))
	for _, c := range list {
		known[c.Name] = struct{}{}
	}
	return known, nil
}

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
	raw, err := m.Execute(ctx, "query-qmp-schema", nil)
	if err != nil {
		return nil, err
	}
	if s, err = parseSchema(raw); err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.schema = s
	m.mu.Unlock()
	return s, nil
}

func parseSchema(raw json.RawMessage) (*Schema, error) {
	var entries []*schemaType
	if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, fmt.Errorf("query-qmp-schema: %w: %w", ErrProtocol, err)
	}
	s := &Schema{named: make(map[string]*schemaType, len(entries))}
	for _, e := range entries {
		if e != nil {
			s.named[e.Name] = e
		}
	}
	return s, nil
}

// HasEvent reports whether QEMU knows the event.
func (s *Schema) HasEvent(name string) bool {
	t := s.named[name]
	return t != nil && t.Meta == "event"
}

// HasOption reports whether a command takes the option: an argument that it
// always takes, or, with a variant such as a driver's name, one of that
// variant's.
func (s *Schema) HasOption(command, variant, option string) bool {
	c := s.named[command]
	if c == nil || c.Meta != "command" {
		return false
	}
	args := s.named[c.ArgType]
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

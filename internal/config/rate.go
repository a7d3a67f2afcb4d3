package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Rate bounds throughput per second; 0 is no bound. The read and write bounds
// come on top of those of both together.
type Rate struct {
	Bytes      Size  `toml:"bytes" json:"bytes,omitempty"`
	ReadBytes  Size  `toml:"read-bytes" json:"read-bytes,omitempty"`
	WriteBytes Size  `toml:"write-bytes" json:"write-bytes,omitempty"`
	Ops        int64 `toml:"ops" json:"ops,omitempty"`
	ReadOps    int64 `toml:"read-ops" json:"read-ops,omitempty"`
	WriteOps   int64 `toml:"write-ops" json:"write-ops,omitempty"`

	// Burst is how much time's worth may be used at once after a pause.
	Burst Duration `toml:"burst" json:"burst,omitempty"`
}

// Set gives the rate called key, as a configuration has it, the value of a
// text: a size for bytes, a number for operations, a duration for burst.
func (r *Rate) Set(key, value string) error {
	sizes := map[string]*Size{"bytes": &r.Bytes, "read-bytes": &r.ReadBytes, "write-bytes": &r.WriteBytes}
	ops := map[string]*int64{"ops": &r.Ops, "read-ops": &r.ReadOps, "write-ops": &r.WriteOps}
	var err error
	switch {
	case sizes[key] != nil:
		err = sizes[key].UnmarshalText([]byte(value))
	case ops[key] != nil:
		*ops[key], err = parseOps(value)
	case key == "burst":
		err = r.Burst.UnmarshalText([]byte(value))
	default:
		keys := slices.Concat(slices.Sorted(maps.Keys(sizes)), slices.Sorted(maps.Keys(ops)), []string{"burst"})
		return fmt.Errorf("%q is none of %s", key, strings.Join(keys, ", "))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func parseOps(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%q: want a number", s)
	}
	return int64(n), nil
}

// With is a copy of r, which may be nil, with single rates set as by Set; r
// itself if there are none.
func (r *Rate) With(keys map[string]string) (*Rate, error) {
	if len(keys) == 0 {
		return r, nil
	}
	var changed Rate
	if r != nil {
		changed = *r
	}
	var wrong []error
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		wrong = append(wrong, changed.Set(k, keys[k]))
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, fmt.Errorf("rate: %w", err)
	}
	return &changed, nil
}

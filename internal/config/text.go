package config

import (
	"fmt"
	"strconv"
	"time"

	"github.com/vmdiskd/vmdiskd/internal/units"
)

// String is as Go writes it: "1m30s".
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes the duration as String does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads "5s", "250ms" or "1m30s". A number without a unit is an
// error: nobody agrees on what it would mean.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("duration %q is not a number with a unit, as 250ms or 5s", b)
	}
	*d = Duration(v)
	return nil
}

// String is the number of bytes.
func (s Size) String() string { return strconv.FormatInt(int64(s), 10) }

// MarshalJSON writes the number of bytes.
func (s Size) MarshalJSON() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what units.ParseSize reads.
func (s *Size) UnmarshalText(b []byte) error {
	n, err := units.ParseSize(string(b))
	if err != nil {
		return err
	}
	*s = Size(n)
	return nil
}

// UnmarshalJSON reads a number of bytes, or text as UnmarshalText does. In a
// number without a text, neither fraction nor exponent is allowed.
func (s *Size) UnmarshalJSON(b []byte) error {
	text := string(b)
	if len(b) > 0 && b[0] == '"' {
		var err error
		if text, err = strconv.Unquote(text); err != nil {
			return fmt.Errorf("size %s is not a number of bytes with an optional suffix K, M, G or T", b)
		}
	}
	return s.UnmarshalText([]byte(text))
}

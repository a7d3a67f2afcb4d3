package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Error is a mistake in a file. Lines and columns, in bytes, count from 1.
type Error struct {
	File         string
	Line, Column int
	Text         string
}

// Error begins with the place, as compilers write it.
func (e *Error) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Text)
}

// Errors are all mistakes of a file, in its order, at most
// limits.ConfigProblems.
type Errors []*Error

// Error has a line for each.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Load reads the configuration file name: it is parsed, has its defaults, and
// is valid. Anything but a regular file of at most limits.ConfigFile bytes is
// an error.
func Load(name string) (*Config, error) {
	b, err := ReadText(name)
	if err != nil {
		return nil, err
	}
	return LoadText(name, b)
}

// ReadText reads the configuration file name, for LoadText.
func ReadText(name string) ([]byte, error) { return readFile(name, limits.ConfigFile) }

// LoadText is Load of a file that was read already.
func LoadText(name string, b []byte) (*Config, error) {
	c, err := Parse(name, b)
	if err != nil {
		return nil, err
	}
	c.SetDefaults()
	err = c.Validate()
	if ps, ok := errors.AsType[Problems](err); ok {
		return nil, placed(name, b, ps)
	}
	return c, err
}

// SaysTLS tells whether a configuration that LoadText takes has keys in [tls], be they
// those that are there by default.
func SaysTLS(b []byte) bool {
	c, err := Parse("", b)
	return err == nil && c.TLS != TLS{}
}

// readFile reads a regular file of at most most bytes.
func readFile(name string, most int64, flags ...int) ([]byte, error) {
	flag := os.O_RDONLY | syscall.O_NONBLOCK // a FIFO does not hold us up
	for _, f := range flags {
		flag |= f
	}
	f, err := os.OpenFile(name, flag, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	i, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !i.Mode().IsRegular():
		return nil, fmt.Errorf("%q is not a regular file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	switch {
	case err != nil:
		return nil, err
	case int64(len(b)) > most:
		return nil, fmt.Errorf("%q is larger than %d bytes", name, most)
	}
	return b, nil
}

// Parse reads a configuration in TOML. Keys that do not exist, keys that are
// given twice and values of the wrong kind are errors, of type Errors; name is
// that of the file in them. The result has no defaults yet and may be invalid:
// see SetDefaults and Validate.
func Parse(name string, b []byte) (*Config, error) {
	if len(b) > limits.ConfigFile {
		return nil, fmt.Errorf("%q is larger than %d bytes", name, limits.ConfigFile)
	}
	if es := checkSchema(name, b); len(es) > 0 {
		return nil, es
	}
	c := new(Config)
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(c)
	if err == nil {
		return c, nil
	}
	de, ok := errors.AsType[*toml.DecodeError](err)
	if !ok {
		return nil, Errors{{File: name, Line: 1, Column: 1, Text: plain(err)}}
	}
	row, column := de.Position()
	return nil, Errors{{File: name, Line: row, Column: column, Text: plain(de)}}
}

// plain is an error of the library without its name.
func plain(err error) string { return strings.TrimPrefix(err.Error(), "toml: ") }

// sorted puts mistakes in the order of the file and bounds them.
func (e Errors) sorted() Errors {
	slices.SortStableFunc(e, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return e[:min(len(e), limits.ConfigProblems)]
}

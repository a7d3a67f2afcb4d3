package config

import (
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Problem is something in a configuration that cannot be done.
type Problem struct {
	Place string // such as `export "a", grant 2`; "" is the whole
	Text  string

	// Outside: an image lies outside of the folders where it may.
	Outside bool

	path string // of the key, or of the table; see positions
}

// String is the place and the text.
func (p Problem) String() string {
	if p.Place == "" {
		return p.Text
	}
	return p.Place + ": " + p.Text
}

// Problems are all problems of a configuration, at most limits.ConfigProblems.
type Problems []Problem

// ErrOutside is what Problems are if all of them are Outside.
var ErrOutside = errors.New("outside of the folders that images may come from")

// Is tells whether that is all.
func (ps Problems) Is(target error) bool {
	return target == ErrOutside && !slices.ContainsFunc(ps, func(p Problem) bool { return !p.Outside })
}

// Error has a line for each.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// checker gathers problems. Its place is that of what is looked at, for people,
// and at the same for positions.
type checker struct {
	place, at string
	problems  *Problems
}

func newChecker(place string) checker { return checker{place: place, problems: new(Problems)} }

// in is a checker for a place within the place: a table of its name, the one of
// a list that is counted from 1, or the one of a table that has a name.
func (c checker) in(format string, a ...any) checker {
	inner := checker{fmt.Sprintf(format, a...), within(c.at, strings.Fields(format)[0]), c.problems}
	if len(a) == 1 {
		if n, ok := a[0].(int); ok {
			inner.at = nth(inner.at, n-1)
		} else {
			inner.at = within(inner.at, fmt.Sprint(a[0]))
		}
	}
	if c.place != "" {
		inner.place = c.place + ", " + inner.place
	}
	return inner
}

func (c checker) fail(format string, a ...any) {
	if len(*c.problems) >= limits.ConfigProblems {
		return
	}
	p := Problem{Place: c.place, Text: fmt.Sprintf(format, a...), path: c.at}
	if key, _, ok := strings.Cut(p.Text, ":"); ok && !strings.Contains(key, " ") {
		p.path = within(c.at, key)
	}
	*c.problems = append(*c.problems, p)
}

// full tells that further problems would not be named.
func (c checker) full() bool { return len(*c.problems) >= limits.ConfigProblems }

func (c checker) err() error {
	if len(*c.problems) == 0 {
		return nil
	}
	return *c.problems
}

// word demands one of a few words.
func (c checker) word(key, got string, want ...string) {
	if !slices.Contains(want, got) {
		c.fail("%s: %q is not one of %s", key, cut(got), strings.Join(want, ", "))
	}
}

// most bounds the length of a list.
func (c checker) most(key string, n, most int) bool {
	if n > most {
		c.fail("%s: there are %d, which is more than %d", key, n, most)
	}
	return n <= most
}

// text demands UTF-8 of at most most bytes without control characters but
// those in keep.
func (c checker) text(key, s string, most int, keep string) bool {
	control := func(r rune) bool { return unicode.IsControl(r) && !strings.ContainsRune(keep, r) }
	switch {
	case len(s) > most:
		c.fail("%s: it has %d bytes, which is more than %d", key, len(s), most)
	case !utf8.ValidString(s):
		c.fail("%s: %q is not UTF-8", key, cut(s))
	case strings.ContainsFunc(s, control):
		c.fail("%s: %q has a control character", key, cut(s))
	default:
		return true
	}
	return false
}

// path demands an absolute path without "..", "." and "//", that ends in no
// "/", so that it can be compared with others.
func (c checker) path(key, s string) bool {
	switch {
	case !c.text(key, s, limits.FilePath, ""):
		return false
	case !filepath.IsAbs(s):
		c.fail("%s: %q is not an absolute path", key, cut(s))
		return false
	case slices.Contains(strings.Split(s, "/"), ".."):
		c.fail("%s: %q has \"..\" in it: write what it leads to", key, cut(s))
		return false
	case filepath.Clean(s) != s:
		c.fail("%s: write %q as %q", key, cut(s), cut(filepath.Clean(s)))
		return false
	}
	return true
}

// notNegative checks numbers by their keys.
func (c checker) notNegative(key string, n int64) {
	if n < 0 {
		c.fail("%s: %d is negative", key, n)
	}
}

// span demands a range that no end of a disk excludes. empty allows a length
// of 0.
func (c checker) span(off, n Size, empty bool) {
	switch {
	case off < 0 || n < 0:
		c.fail("offset %d and length %d must not be negative", off, n)
	case n == 0 && !empty:
		c.fail("length: the range is empty")
	case off > math.MaxInt64-n:
		c.fail("offset %d and length %d are beyond the end of any disk", off, n)
	}
}

// cut shortens what somebody else wrote for a message.
func cut(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}

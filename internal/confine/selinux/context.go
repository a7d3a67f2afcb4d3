package selinux

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Context is an SELinux context in a form that can be compared with ==: two
// texts that list the same categories in other words are one Context.
type Context struct {
	User, Role, Type string

	// MLS tells whether the context has a range; a policy without levels has
	// contexts of three parts. Low and High are equal in a single level.
	MLS       bool
	Low, High Level
}

// Level is a sensitivity and an exact set of categories.
type Level struct {
	Sensitivity uint16
	Categories  Categories
}

// Categories is a set of categories; bit n%64 of word n/64 is category n.
type Categories [limits.Categories / 64]uint64

// ErrSyntax is what Parse and ParseRange return for text that is no context.
var ErrSyntax = errors.New("not an SELinux context")

// Parse reads USER:ROLE:TYPE or USER:ROLE:TYPE:RANGE, of at most
// limits.SecurityLabel bytes. What the loaded policy knows is not asked. Errors
// are ErrSyntax.
func Parse(s string) (Context, error) {
	if len(s) > limits.SecurityLabel {
		return Context{}, fmt.Errorf("%w: %d bytes", ErrSyntax, len(s))
	}
	parts := strings.SplitN(s, ":", 4)
	if len(parts) < 3 {
		return Context{}, fmt.Errorf("%w: want USER:ROLE:TYPE:LEVEL", ErrSyntax)
	}
	for _, p := range parts[:3] {
		if !ValidName(p) {
			return Context{}, fmt.Errorf("%w: %q is no name", ErrSyntax, p)
		}
	}
	c := Context{User: parts[0], Role: parts[1], Type: parts[2]}
	if len(parts) == 3 {
		return c, nil
	}
	var err error
	c.MLS = true
	c.Low, c.High, err = ParseRange(parts[3])
	return c, err
}

// ValidName reports whether s may be the name of a user, role or type.
func ValidName(s string) bool {
	for _, c := range []byte(s) {
		ok := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-' || c == '.'
		if !ok {
			return false
		}
	}
	return s != "" && s[0] != '-' && s[0] != '.'
}

// ParseRange reads LEVEL or LOW-HIGH, where a level is a sensitivity and
// categories, as in s0:c1,c5.c7. High has to dominate low. Errors are
// ErrSyntax.
func ParseRange(s string) (low, high Level, err error) {
	if len(s) > limits.SecurityLabel {
		return low, high, fmt.Errorf("%w: %d bytes", ErrSyntax, len(s))
	}
	first, second, isRange := strings.Cut(s, "-")
	if low, err = parseLevel(first); err != nil {
		return low, low, err
	}
	if !isRange {
		return low, low, nil
	}
	if high, err = parseLevel(second); err != nil {
		return low, high, err
	}
	if !high.dominates(low) {
		return low, high, fmt.Errorf("%w: %q does not dominate %q", ErrSyntax, second, first)
	}
	return low, high, nil
}

func parseLevel(s string) (l Level, err error) {
	sensitivity, list, more := strings.Cut(s, ":")
	n, err := parseNumber(sensitivity, 's', limits.Sensitivities)
	if err != nil {
		return l, err
	}
	l.Sensitivity = uint16(n)
	for more {
		var one string
		one, list, more = strings.Cut(list, ",")
		if err := l.Categories.add(one); err != nil {
			return l, err
		}
	}
	return l, nil
}

// add reads cN, or cN.cM for all from N to M.
func (c *Categories) add(s string) error {
	first, last, several := strings.Cut(s, ".")
	from, err := parseNumber(first, 'c', limits.Categories)
	if err != nil {
		return err
	}
	to := from
	if several {
		if to, err = parseNumber(last, 'c', limits.Categories); err != nil {
			return err
		}
	}
	if to < from {
		return fmt.Errorf("%w: %q runs backwards", ErrSyntax, s)
	}
	for n := from; n <= to; n++ {
		c[n/64] |= 1 << (n % 64)
	}
	return nil
}

// parseNumber reads the letter and a number below end.
func parseNumber(s string, letter byte, end int) (int, error) {
	if len(s) < 2 || s[0] != letter || s[1] < '0' || s[1] > '9' {
		return 0, fmt.Errorf("%w: want %c and a number, got %q", ErrSyntax, letter, s)
	}
	n, err := strconv.ParseUint(s[1:], 10, 32)
	if err != nil || n >= uint64(end) {
		return 0, fmt.Errorf("%w: %q is above %c%d", ErrSyntax, s, letter, end-1)
	}
	return int(n), nil
}

func (l Level) dominates(low Level) bool {
	for i := range low.Categories {
		if low.Categories[i]&^l.Categories[i] != 0 {
			return false
		}
	}
	return l.Sensitivity >= low.Sensitivity
}

// WithRange returns c with the range of other.
func (c Context) WithRange(other Context) Context {
	c.MLS, c.Low, c.High = other.MLS, other.Low, other.High
	return c
}

// String is the context as the kernel writes it.
func (c Context) String() string {
	s := c.User + ":" + c.Role + ":" + c.Type
	if !c.MLS {
		return s
	}
	s += ":" + c.Low.String()
	if c.High != c.Low {
		s += "-" + c.High.String()
	}
	return s
}

// String is the level as the kernel writes it: runs of three and more
// categories with a dot, shorter ones with commas.
func (l Level) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "s%d", l.Sensitivity)
	separator := byte(':')
	write := func(n int) {
		fmt.Fprintf(&b, "%cc%d", separator, n)
		separator = ','
	}
	for n := l.Categories.next(0); n < limits.Categories; n = l.Categories.next(n) {
		last := n
		for last+1 < limits.Categories && l.Categories.Has(last+1) {
			last++
		}
		write(n)
		if last > n+1 {
			separator = '.'
		}
		if last > n {
			write(last)
		}
		n = last + 1
	}
	return b.String()
}

// Has reports whether category n, from 0 to limits.Categories-1, is in the set.
func (c *Categories) Has(n int) bool { return c[n/64]&(1<<(n%64)) != 0 }

// next is the first category of the set from n on, or limits.Categories.
func (c *Categories) next(n int) int {
	for n < limits.Categories {
		if rest := c[n/64] >> (n % 64); rest != 0 {
			return n + bits.TrailingZeros64(rest)
		}
		n = (n/64 + 1) * 64
	}
	return limits.Categories
}

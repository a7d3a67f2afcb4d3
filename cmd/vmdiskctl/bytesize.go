package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// byteSize is a flag that takes bytes with an optional binary suffix.
type byteSize int64

const suffixes = "BKMGTPE"

// String is the largest unit that leaves no rest, as nbdinfo writes sizes.
func (b byteSize) String() string {
	if b == 0 {
		return "0"
	}
	unit := 0
	for b%1024 == 0 && unit < len(suffixes)-1 {
		b, unit = b/1024, unit+1
	}
	if unit == 0 {
		return strconv.FormatInt(int64(b), 10)
	}
	return fmt.Sprintf("%d%c", int64(b), suffixes[unit])
}

// Set implements pflag.Value. With a sign it would be a change of a size.
func (b *byteSize) Set(s string) error {
	number, shift := s, 0
	if s != "" {
		if i := strings.IndexByte(suffixes, s[len(s)-1]&^0x20); i >= 0 {
			number, shift = s[:len(s)-1], 10*i
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return fmt.Errorf("size %q is not a number of bytes with an optional suffix K, M, G or T", s)
	}
	*b = byteSize(n << shift)
	return nil
}

// Type implements pflag.Value.
func (b *byteSize) Type() string { return "size" }

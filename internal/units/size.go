// Package units reads quantities as operators write them.
package units

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizes are binary, as in qemu-img.
var sizes = map[string]int64{
	"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
}

// ParseSize reads a size such as "512", "64K" or "1G": a whole number of
// bytes, or of KiB, MiB, GiB or TiB by the suffix K, M, G or T in either case.
// The result is not negative.
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "bBkKmMgGtT")
	unit, ok := sizes[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || !ok {
		return 0, fmt.Errorf("size %q is not a number of bytes with an optional suffix K, M, G or T", s)
	}
	if int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return int64(n) * unit, nil
}

package backing

import "bytes"

// AllZero reports whether p is nothing but zeroes. It compares p with itself,
// one byte on: that takes the steps of memcmp.
func AllZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

//go:build !race

package bitmaps_test

// everyCall is which calls are made to fail: all.
const everyCall = 1

//go:build race

package bitmaps_test

// everyCall is which calls are made to fail: the race detector makes each of
// them ten times as slow.
const everyCall = 4

//go:build race

package qcow2_test

// The race detector makes the random runs ten times as slow. They see the same
// code with fewer of them.
func init() { *diskEpisodes, *crashStates = 1, 500 }

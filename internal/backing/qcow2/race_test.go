//go:build race

package qcow2_test

// thinner is by how much tests of many states are thinned out: the race
// detector makes each state ten times as slow, and sees the same code in fewer.
const thinner = 10

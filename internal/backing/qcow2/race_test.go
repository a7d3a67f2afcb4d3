//go:build race

package qcow2_test

import "math/rand/v2"

// thinner is by how much tests of many states are thinned out: the race
// detector makes each state ten times as slow, and sees the same code in fewer.
const thinner = 10

// kinds is a third of a list of kinds of images, others each time, or all where a
// run is repeated.
func kinds[T any](list []T) []T {
	if *diskSeed != 0 {
		return list
	}
	rand.Shuffle(len(list), func(i, k int) { list[i], list[k] = list[k], list[i] })
	return list[:(len(list)+2)/3]
}

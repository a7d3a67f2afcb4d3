//go:build !race

package qcow2_test

const thinner = 1

// kinds is a list of kinds of images, all of it.
func kinds[T any](list []T) []T { return list }

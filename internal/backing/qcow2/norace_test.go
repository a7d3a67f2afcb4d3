//go:build !race

package qcow2_test

const thinner = 1

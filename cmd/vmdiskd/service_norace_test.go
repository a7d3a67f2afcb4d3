//go:build !race

package main

// leakKiB is what resident memory may grow by in thousands of cycles.
const leakKiB = 4 << 10

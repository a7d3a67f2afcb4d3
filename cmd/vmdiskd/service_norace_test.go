//go:build !race

package main

// leakKiB is what resident memory may grow by in thousands of cycles.
const leakKiB = 4 << 10

// idleKiB is what an idle connection may take of resident memory.
const idleKiB = 64

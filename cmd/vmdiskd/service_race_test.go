//go:build race

package main

// leakKiB is what resident memory may grow by in thousands of cycles: the race
// detector remembers every place in memory that was ever used.
const leakKiB = 64 << 10

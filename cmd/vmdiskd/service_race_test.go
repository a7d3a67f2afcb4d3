//go:build race

package main

// leakKiB is what resident memory may grow by in thousands of cycles: the race
// detector remembers every place in memory that was ever used.
const leakKiB = 64 << 10

// idleKiB is what an idle connection may take of resident memory: the race
// detector shadows its stacks and buffers.
const idleKiB = 512

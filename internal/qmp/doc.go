// Package qmp speaks QEMU's machine protocol: a monitor on a Unix socket with
// bounds and deadlines on everything, the block and device commands that
// plugging a disk needs, and the guest agent.
//
// The peer is a QEMU that its guest may have taken over. Whatever it sends or
// leaves out costs at most what package limits says, ends in an error and
// never in a panic; names that it reports are data.
//
// Monitor implements Monitor of go-qemu, so that its domain queries work over
// it. Command errors are *Error and keep QEMU's class.
package qmp

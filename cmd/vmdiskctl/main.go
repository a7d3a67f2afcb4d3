// Command vmdiskctl is the operator's hand on NBD disks. It contains no
// server.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	outlivePipes()
	ctx, stop := signal.NotifyContext(context.Background(), interruptions()...)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// interruptions are the signals that ask the program to end in order: that of a
// terminal which is gone too, unless it is ignored, as by nohup(1).
func interruptions() []os.Signal {
	list := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		list = append(list, syscall.SIGHUP)
	}
	return list
}

// outlivePipes makes a write to a pipe or terminal that nobody reads any more an
// error like any other: the signal would end the program half way, or a process
// that holds a device. It is caught, not ignored, for other programs that are
// started from here to have it as usual.
func outlivePipes() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// Command mkguest DIR makes a guest that waits for disks: the kernel and the
// initrd that scripts/demo.sh boots.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/vmdiskd/vmdiskd/test/guest"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: mkguest DIR")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := guest.WriteWatcher(ctx, os.Args[1])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		os.Exit(1)
	}
}

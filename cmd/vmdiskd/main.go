// Command vmdiskd serves one guest disk over NBD.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/daemon"
)

// Exit statuses besides those of a captive command.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

// inherit is what stage 0 hands over to this process if it is the worker.
func inherit() (*daemon.Handed, error) {
	h, err := confine.Inherit()
	if err != nil {
		return nil, err
	}
	return daemon.TakeOver(h)
}

// run keeps the main thread to itself, for daemon.Run to wait there: the kernel gives a
// signal of the process to that thread (complete_signal), and if it were waiting for
// storage that does not answer, no other thread would have the signal.
func run(args []string) int {
	runtime.LockOSThread()
	handed, err := inherit()
	if err != nil {
		fmt.Fprintf(os.Stderr, "vmdiskd: %v\n", err)
		return exitFailed
	}
	opt, err := parse(args, handed)
	if err == nil && opt.text != "" {
		_, err = os.Stdout.WriteString(opt.text)
	}
	var usage usageError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "vmdiskd: %v\nTry 'vmdiskd --help'.\n", err)
		return exitUsage
	case err != nil:
		fmt.Fprintf(os.Stderr, "vmdiskd: %v\n", err)
		return exitFailed
	case opt.text != "":
		return 0
	}
	status, err := daemon.Run(opt.config)
	if err != nil {
		fmt.Fprintf(os.Stderr, "vmdiskd: %v\n", err)
	}
	return status
}

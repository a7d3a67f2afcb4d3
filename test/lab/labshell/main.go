// Labshell boots the guest of the lab tests with a root shell on the terminal:
// with SELinux telling but not refusing, or refusing with -enforcing, and with
// the policy modules that are named. Ctrl-A X ends it at once, "poweroff"
// properly.
//
//	labshell [-enforcing] [-memory MIB] [-kernel PACKAGE] [MODULE.pp...]
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"github.com/vmdiskd/vmdiskd/test/lab"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func main() {
	s := lab.Scenario{}
	flag.BoolVar(&s.Enforcing, "enforcing", false, "let SELinux refuse")
	flag.IntVar(&s.MemoryMiB, "memory", 1024, "memory of the guest in MiB")
	flag.StringVar(&s.Kernel, "kernel", lab.DefaultKernel, "meta package of the kernel")
	flag.Parse()
	s.Policy = flag.Args()
	err := lab.Shell(context.Background(), s)
	testenv.Cleanup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "labshell:", err)
		os.Exit(1)
	}
}

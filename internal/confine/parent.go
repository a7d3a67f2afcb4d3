package confine

import (
	"os"

	"golang.org/x/sys/unix"
)

// ExitWithParent makes the kernel send SIGTERM when the parent ends. A parent
// that has ended already is noticed too.
func ExitWithParent() error {
	parent := os.Getppid()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if os.Getppid() != parent {
		return unix.Kill(os.Getpid(), unix.SIGTERM)
	}
	return nil
}

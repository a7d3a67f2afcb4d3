package confine

import (
	"os"

	"golang.org/x/sys/unix"
)

// ExitWithParent makes the kernel send SIGTERM when the parent ends, which is that
// process. One that has ended already is noticed too. A change of the user or of the
// group undoes it (prctl(2)).
func ExitWithParent(parent int) error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if os.Getppid() != parent {
		return unix.Kill(os.Getpid(), unix.SIGTERM)
	}
	return nil
}

package confine

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// SelfTest tries what the worker must not be able to do, to open the forbidden
// paths among others. It is for a process
// whose filter is loaded. An execve would end it; that the filter stands is
// told by a call that it answers.
func SelfTest(forbidden []string) error {
	if n := seccompMode(); n != seccompFilter {
		return fmt.Errorf("self-test: the thread has seccomp mode %d, want %d", n, seccompFilter)
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || n != 1 {
		return fmt.Errorf("self-test: no_new_privs is %d, %v", n, err)
	}
	if _, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("self-test: a netlink socket could be had: %v", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_CONNECT, math.MaxInt32, 0, 0); e != unix.EPERM {
		return fmt.Errorf("self-test: connect was not refused: %w", e)
	}
	for _, path := range forbidden {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			return errors.Join(fmt.Errorf("self-test: %q could be opened", path), unix.Close(fd))
		}
		// The rules are asked after the path is found: what is not there tells
		// nothing of them.
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if !errors.Is(err, unix.EACCES) {
			return fmt.Errorf("self-test: opening %q was not refused, but failed: %w", path, err)
		}
	}
	return nil
}

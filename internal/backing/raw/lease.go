package raw

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Waits between attempts to open a file with a lease, which grow twofold.
const (
	leaseBackoff    = time.Millisecond
	leaseBackoffMax = 250 * time.Millisecond
)

// ErrLeased is the ErrLocked of a file with a lease that is not given back.
var ErrLeased = fmt.Errorf("%w: another program has a lease on it, and does not give it back "+
	"(an NFS server or Samba, whose clients have it open)", backing.ErrLocked)

// PastLease opens a file with O_NONBLOCK, by try, which no signal interrupts. Where
// somebody else has a lease on the file (F_SETLEASE in fcntl(2)), the kernel asks for
// it back and the open ends with EAGAIN: it is tried again until limits.LeaseAnswers,
// when the error is ErrLeased.
func PastLease[F any](try func() (F, error)) (F, error) {
	until := time.Now().Add(limits.LeaseAnswers)
	wait := leaseBackoff
	for {
		f, err := try()
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EAGAIN):
			return f, err
		case time.Now().After(until):
			return f, fmt.Errorf("%w: %w", ErrLeased, err)
		}
		time.Sleep(wait)
		wait = min(2*wait, leaseBackoffMax)
	}
}

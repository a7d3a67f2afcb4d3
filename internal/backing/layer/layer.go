// Package layer changes what a guest disk allows, shows or costs: each layer
// stands on another backing.Device, below backing.Checked and above
// backing.Emulate, and is a backing.Device itself. A layer owns the device
// under it: Close closes that too.
//
// A layer forwards Map only where the host runs below are those that it would
// reach itself; else requests go through its methods.
package layer

import (
	"fmt"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// writing are the capabilities that a disk has only while it may be written.
const writing = backing.CanWrite | backing.CanTrim | backing.CanZero | backing.CanFastZero | backing.CanFUA

// invalid is the error of a constructor, or of a call of the operator.
func invalid(op, format string, args ...any) error {
	return &backing.Error{Op: op, Off: -1, Kind: backing.ErrInvalid, Err: fmt.Errorf(format, args...)}
}

// overlap tells whether [a, a+an) and [b, b+bn) share a byte; no sum of an
// offset and its length exceeds an int64.
func overlap(a, an, b, bn int64) bool { return a < b+bn && b < a+an }

// Range is a stretch of a disk in bytes.
type Range struct{ Off, Len int64 }

// valid tells whether r is neither empty nor beyond what an offset can name.
func (r Range) valid() bool { return r.Off >= 0 && r.Len > 0 && r.Off <= maxOff-r.Len }

const maxOff = 1<<63 - 1

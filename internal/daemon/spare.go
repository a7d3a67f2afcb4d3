package daemon

import (
	"os"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// spare are descriptors that exports cannot take: where there are too few for
// all of them, some fail and the service goes on.
type spare []*os.File

// keepSpare takes limits.SpareFiles, or as many as there are.
func keepSpare() (s spare) {
	for range limits.SpareFiles {
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		s = append(s, f)
	}
	return s
}

// release lets whoever needs them have them.
func (s spare) release() { closeFiles(s) }

package store

import (
	"context"
	"fmt"
	"io"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// ReadFull fills p from off. Its errors are *backing.Error, one of them when
// the file ends before p is full: whoever calls it has seen a file that went
// further.
func ReadFull(ctx context.Context, st Store, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := st.ReadAt(ctx, p, off)
	if err == nil && n < len(p) {
		err = fmt.Errorf("the file has become shorter: %w", io.ErrUnexpectedEOF)
	}
	return backing.Wrap("read", off, int64(len(p)), err)
}

package store

import (
	"context"
	"fmt"
	"io"

	"github.com/vmdiskd/vmdiskd/internal/backing"
)

// ReadFull fills p from off. Its errors are *backing.Error, or that of ctx, one
// of them when the file ends before p is full: whoever calls it has seen a file
// that went further.
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

// ReadPadded is ReadFull for what may lie beyond the end of the file, where it is
// zero.
func ReadPadded(ctx context.Context, st Store, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := st.ReadAt(ctx, p, off)
	clear(p[n:])
	return backing.Wrap("read", off, int64(len(p)), err)
}

// Stretch is how many of the n bytes at off, which lie in the file, are a hole
// that reads as zeroes, or how many before the next one are not.
func Stretch(ctx context.Context, st Store, off, n int64) (length int64, hole bool, err error) {
	err = st.Extents(ctx, off, n, func(e backing.Extent) bool {
		length, hole = e.Len, e.Hole && e.Zero
		return false
	})
	return length, hole, err
}

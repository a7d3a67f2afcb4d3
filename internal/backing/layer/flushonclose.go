package layer

import (
	"context"

	"github.com/vmdiskd/vmdiskd/internal/backing"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// FlushOnClose makes what a guest wrote durable when the disk is closed,
// whether or not the guest asked for it.
type FlushOnClose struct{ backing.Transparent }

// NewFlushOnClose stands on dev.
func NewFlushOnClose(dev backing.Device) *FlushOnClose { return &FlushOnClose{over(dev)} }

// Close flushes, waiting at most limits.CloseFlush for its turn, closes in any
// case and returns the first error.
func (l *FlushOnClose) Close() error {
	var err error
	if l.Next.Info().Caps.Has(backing.CanFlush | backing.CanWrite) {
		ctx, cancel := context.WithTimeout(context.Background(), limits.CloseFlush)
		defer cancel()
		err = l.Next.Flush(ctx)
	}
	if e := l.Next.Close(); err == nil {
		err = e
	}
	return err
}

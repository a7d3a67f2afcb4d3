// Package choose makes the engine that a configuration names. It stands above
// both engines, so that neither has to know the other.
package choose

import (
	"fmt"
	"log/slog"

	"github.com/vmdiskd/vmdiskd/internal/engine"
	"github.com/vmdiskd/vmdiskd/internal/engine/bufpool"
	"github.com/vmdiskd/vmdiskd/internal/engine/uring"
	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Names that New takes.
const (
	Auto  = "auto"  // a ring where the host lets us have one, else the pool
	Uring = "uring" // a ring or an error that says why not
	Pool  = "pool"  // plain system calls
)

// New makes the engine called name. bufs lends the buffers of its transfers
// and must be closed after it; nil means that no buffers are registered. What
// Auto decided, and why, is logged at info level. Nil for log is
// slog.Default.
func New(name string, bufs *bufpool.Pool, log *slog.Logger) (engine.Engine, error) {
	if log == nil {
		log = slog.Default()
	}
	return choose(name, log, func() (engine.Engine, error) {
		return uring.New(uring.Options{Buffers: bufs, Log: log})
	})
}

func choose(name string, log *slog.Logger, newRing func() (engine.Engine, error)) (engine.Engine, error) {
	switch name {
	case Auto:
		e, err := newRing()
		if err != nil {
			log.Info("engine is pool", "reason", err)
			return engine.NewPool(limits.PoolWorkers), nil
		}
		log.Info("engine is uring", "reason", "the kernel offers it")
		return e, nil
	case Uring:
		e, err := newRing()
		if err != nil {
			return nil, fmt.Errorf("engine %q: %w", name, err)
		}
		return e, nil
	case Pool:
		return engine.NewPool(limits.PoolWorkers), nil
	}
	return nil, fmt.Errorf("engine %q: want %q, %q or %q", name, Auto, Uring, Pool)
}

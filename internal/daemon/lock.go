package daemon

import (
	"context"
	"sync"
)

// lock is a mutex that who waits for it can give up. The zero value is free.
type lock struct {
	once  sync.Once
	taken chan struct{} // full while somebody has it; made by once
}

func (l *lock) place() chan struct{} {
	l.once.Do(func() { l.taken = make(chan struct{}, 1) })
	return l.taken
}

// Wait takes the lock, or returns the error of ctx, which may have ended before.
func (l *lock) Wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case l.place() <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Lock is Wait for what has to be done: an end of what was begun. Whoever has the
// lock meanwhile must not hold it for long.
func (l *lock) Lock() { l.place() <- struct{}{} }

// TryLock takes the lock if it is free.
func (l *lock) TryLock() bool {
	select {
	case l.place() <- struct{}{}:
		return true
	default:
		return false
	}
}

// Unlock frees the lock, which somebody has.
func (l *lock) Unlock() { <-l.place() }

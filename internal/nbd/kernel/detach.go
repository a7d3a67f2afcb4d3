package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// Detach takes the server away from a device. What was written to the device
// is flushed before. It fails with ErrBusy while the device is mounted, swapped
// on or part of another device, unless force is set; then nothing is flushed,
// and whoever uses it gets errors; the device can be attached again when nobody
// has it open any more. It fails with ErrNoDevice if the device is not attached,
// or without force if another one has its number meanwhile.
func Detach(ctx context.Context, d *Driver, s Sysfs, index int, force bool) error {
	before, err := s.Info(index)
	if err != nil {
		return err
	}
	if !force {
		return detachUnused(ctx, d, s, before)
	}
	if err := d.Disconnect(index); err != nil {
		return err
	}
	err = gone(ctx, s, before)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil // who has it open keeps its number, and nothing else
	}
	return err
}

// detachUnused is Detach without force.
func detachUnused(ctx context.Context, d *Driver, s Sysfs, before Info) error {
	if err := disconnectUnused(d, s, before); err != nil {
		return err
	}
	return gone(ctx, s, before)
}

// disconnectUnused flushes and disconnects a device while nobody else can begin
// to use it. The driver lets go of the server when the node is closed, and gives
// its number to no other one while it is open.
func disconnectUnused(d *Driver, s Sysfs, before Info) error {
	f, err := d.claim(before.Index)
	if err != nil {
		return err
	}
	defer f.Close()
	now, err := s.Info(before.Index)
	if err != nil {
		return err
	}
	if now.Backend != before.Backend {
		return ErrNoDevice
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return d.Disconnect(before.Index)
}

// claim opens the node for this process alone.
func (d *Driver) claim(index int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(d.nodes, Name(index)), os.O_RDONLY|unix.O_EXCL|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%w: it is mounted, swapped on or part of another device", ErrBusy)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, ErrPermission
	}
	return f, err
}

// gone waits until a device is not what it was.
func gone(ctx context.Context, s Sysfs, before Info) error {
	ctx, cancel := context.WithTimeout(ctx, limits.DeviceGone)
	defer cancel()
	tick := time.NewTicker(limits.DeviceRetryLeast)
	defer tick.Stop()
	for {
		now, err := s.Info(before.Index)
		if errors.Is(err, ErrNoDevice) || err == nil && now.Backend != before.Backend {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not let go of its server: %w", Name(before.Index), ctx.Err())
		case <-tick.C:
		}
	}
}

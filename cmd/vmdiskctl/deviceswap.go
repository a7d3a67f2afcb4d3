package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/vmdiskd/vmdiskd/internal/limits"
)

// swapOn makes a swap area of a device and uses it, unless it is used already.
// On an error that may be so all the same. swapon(8) is waited for whatever
// becomes of ctx: the kernel finishes what that has asked for even if it is
// killed.
func swapOn(ctx context.Context, device string) error {
	if on, err := isSwap(device); err != nil || on {
		return err
	}
	if err := runTool(ctx, "mkswap", device); err != nil {
		return err
	}
	if err := runTool(context.WithoutCancel(ctx), "swapon", device); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// swapOff stops swapping to a device, if that is done: a swap device that is
// taken away kills every process with pages there.
func swapOff(ctx context.Context, device string) error {
	if on, err := isSwap(device); err != nil || !on {
		return err
	}
	return runTool(ctx, "swapoff", device)
}

// isSwap tells whether the machine swaps to a device.
func isSwap(device string) (bool, error) {
	f, err := os.Open("/proc/swaps")
	if os.IsNotExist(err) {
		return false, nil // a kernel without swap
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limits.SwapTable))
	return err == nil && swapsOn(string(text), device), err
}

// swapsOn looks for a device in what /proc/swaps shows. The names of devices
// have no characters that are escaped there.
func swapsOn(table, device string) bool {
	for line := range strings.Lines(table) {
		if name, _, ok := strings.Cut(line, " "); ok && name == device {
			return true
		}
		if name, _, ok := strings.Cut(line, "\t"); ok && strings.TrimRight(name, " ") == device {
			return true
		}
	}
	return false
}

// runTool runs a program of the system on a device.
func runTool(ctx context.Context, name, device string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, name, device)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		text := said.String()
		return fmt.Errorf("%s %s: %w (%q)", name, device, err, text[:min(len(text), limits.MaxString)])
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// leastAttached is how many disks are attached for one sample at least.
const leastAttached = 10

// attach gives a disk to a machine and takes it out again, by the program, for
// as long as a case lasts. The latencies are those of the whole command, what
// QEMU takes of it included; the cost is the program's processor time. The
// machine's processor does not run: no guest holds anything up.
func (b *bench) attach(ctx context.Context, dir string) (s sample, err error) {
	ctl, err := testenv.Build(ctx, "vmdiskctl")
	if err != nil {
		return s, err
	}
	stop, err := startMachine(ctx, filepath.Join(dir, "qmp"))
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	var walls []float64
	var cost time.Duration
	end := time.Now().Add(time.Duration(b.secs * float64(time.Second)))
	for len(walls) < leastAttached || time.Now().Before(end) {
		took, cpu, err := b.plug(ctx, ctl, dir, "attach", filepath.Join(b.dir, "idle", "added"), "--bus=scsi", "--target=d0")
		if err == nil {
			_, _, err = b.plug(ctx, ctl, dir, "detach", "d0")
		}
		if err != nil {
			return s, err
		}
		walls, cost = append(walls, micros(took)), cost+cpu
	}
	slices.Sort(walls)
	n := len(walls)
	s.Requests, s.PerIO = uint64(n), micros(cost)/float64(n)
	s.P50, s.P99 = median(walls), walls[min(n-1, n*99/100)]
	return s, nil
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// plug runs one command on the machine.
func (b *bench) plug(ctx context.Context, ctl, dir, command, disk string, flags ...string) (took, cpu time.Duration, err error) {
	args := append([]string{command, "--socket=" + controlSocket(dir)}, flags...)
	cmd := exec.CommandContext(ctx, ctl, append(args, filepath.Join(dir, "qmp"), disk)...)
	begun := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, 0, fmt.Errorf("vmdiskctl %s: %w: %s", command, err, out)
	}
	return time.Since(begun), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// startMachine starts one with a SCSI controller and a monitor at the path.
func startMachine(ctx context.Context, monitor string) (stop func() error, err error) {
	qemu, err := testenv.Tool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, qemu, "-accel", "tcg", "-S", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none",
		"-device", "virtio-scsi-pci,id=scsi0", "-qmp", "unix:"+monitor+",server=on,wait=off")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() error {
		err := cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		return err
	}
	if err := testenv.Await(ctx, func() bool { _, err := os.Stat(monitor); return err == nil }); err != nil {
		return nil, errors.Join(err, stop())
	}
	return stop, nil
}

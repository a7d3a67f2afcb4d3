package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/syslog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/kernel"
)

// holdsFolder is where processes claim the devices that they hold.
const holdsFolder = "/run"

// holderError is how the process ended that should hold a device.
type holderError struct {
	code int
	text string
}

func (e *holderError) Error() string { return e.text }

// holder is a process that holds a device, or is about to.
type holder struct {
	*exec.Cmd
	ready, said *os.File // what it reports, and its standard error
}

// background runs the same command again as a process of its own that stays,
// and returns when that has attached the device, or failed to. A device of which
// that cannot be said is taken away again, unless it was attached before.
func (f *deviceFlags) background(c *cobra.Command, config kernel.Config) error {
	_, fresh := config.Sysfs.Info(config.Index) // an error: not attached
	self, err := os.Executable()
	if err != nil {
		return err
	}
	h, uri, err := f.startHolder(c, self)
	if err != nil {
		return err
	}
	defer h.ready.Close()
	defer h.said.Close()
	stop := context.AfterFunc(c.Context(), func() { h.Process.Signal(unix.SIGTERM) })
	defer stop()
	tell(uri, c.Flags().Arg(0))
	line, err := io.ReadAll(io.LimitReader(h.ready, limits.MaxString))
	if err == nil && len(line) > 0 {
		if _, err = c.OutOrStdout().Write(line); err != nil && fresh != nil {
			return errors.Join(err, f.dismiss(c.Context(), h.Cmd, config.Sysfs, line))
		}
		return errors.Join(err, h.Process.Release())
	}
	text, _ := io.ReadAll(io.LimitReader(h.said, limits.MaxString))
	return holderFailed(h.Wait(), text)
}

// startHolder runs the program self. It is to be told the URI, which is not for
// everybody who sees its arguments.
func (f *deviceFlags) startHolder(c *cobra.Command, self string) (h *holder, uri *os.File, err error) {
	ready, readyW, err1 := os.Pipe()
	said, saidW, err2 := os.Pipe()
	uriR, uri, err3 := os.Pipe()
	err = errors.Join(err1, err2, err3)
	// Not bound to the context: it outlives this process.
	cmd := exec.Command(self, f.arguments(c)...)
	if err == nil {
		cmd.Stderr, cmd.ExtraFiles = saidW, []*os.File{readyW, uriR}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		err = cmd.Start()
	}
	closePipes(readyW, saidW, uriR)
	if err != nil {
		closePipes(ready, said, uri)
		return nil, nil, err
	}
	return &holder{cmd, ready, said}, uri, nil
}

// closePipes passes over ends that are nil.
func closePipes(ends ...*os.File) {
	for _, f := range ends {
		f.Close()
	}
}

// tell writes the URI for a holder and closes w. One that does not read it ends,
// and says why.
func tell(w *os.File, uri string) {
	_, _ = w.WriteString(uri)
	w.Close()
}

// uri is the one to attach: what tell has written, if there is a descriptor for
// it, which is closed, and else the argument.
func (f *deviceFlags) uri(argument string) (string, error) {
	if f.uriFD < 0 {
		return argument, nil
	}
	file := os.NewFile(uintptr(f.uriFD), "uri")
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, limits.DeviceURI+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("--uri-fd: %w", err)
	case len(b) > limits.DeviceURI:
		return "", usage("--uri-fd: a URI of more than %d bytes", limits.DeviceURI)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// dismiss takes away the device that a process holds, which has said line: that
// ends the process.
func (f *deviceFlags) dismiss(ctx context.Context, holder *exec.Cmd, sysfs kernel.Sysfs, line []byte) error {
	driver, err := kernel.Open()
	if err == nil {
		defer driver.Close()
		var index int
		if index, err = f.heldDevice(line); err == nil {
			err = withdraw(ctx, driver, sysfs, index)
		}
	}
	if err != nil {
		return errors.Join(err, holder.Process.Release())
	}
	return holder.Wait()
}

// heldDevice is the device of what report has written.
func (f *deviceFlags) heldDevice(line []byte) (index int, err error) {
	r := deviceReport{Device: string(bytes.TrimSpace(line))}
	if f.json {
		if err := json.Unmarshal(line, &r); err != nil {
			return 0, err
		}
	}
	return kernel.ParseDevice(r.Device)
}

// arguments are those of the command line that holds the device, in which the URI
// is as others may see it.
func (f *deviceFlags) arguments(c *cobra.Command) []string {
	args := []string{"device", "attach", "--foreground", "--syslog", "--ready-fd=3", "--uri-fd=4"}
	c.Flags().Visit(func(g *pflag.Flag) {
		args = append(args, "--"+g.Name+"="+g.Value.String())
	})
	positional := slices.Clone(c.Flags().Args())
	positional[0] = kernel.ShownURI(positional[0])
	return append(append(args, "--"), positional...)
}

func holderFailed(err error, text []byte) error {
	e := &holderError{code: exitFailed, text: strings.TrimPrefix(string(bytes.TrimSpace(text)), "vmdiskctl: ")}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
		e.code = exit.ExitCode()
	}
	if e.text == "" {
		e.text = fmt.Sprintf("the process that holds the device ended: %v", err)
	}
	return e
}

// prepare makes this process one that can hold a device. What it returns tells
// of dead connections until ctx ends.
func (f *deviceFlags) prepare(ctx context.Context) (dead <-chan int, err error) {
	if f.swap {
		// Its memory must not lie on the device that it keeps alive.
		if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE); err != nil {
			return nil, fmt.Errorf("lock memory: %w", err)
		}
	}
	return kernel.Watch(ctx)
}

// hold keeps the device until it is detached. What interrupts the program
// detaches it if nobody uses it.
func (f *deviceFlags) hold(ctx context.Context, k *kernel.Keeper) error {
	leave := make(chan os.Signal, 1)
	signal.Notify(leave, interruptions()...)
	defer signal.Stop(leave)
	if ctx.Err() != nil { // the signal came before
		leave <- unix.SIGTERM
	}
	k.Leave = leave
	if k.Device.TakenOver {
		k.Say("%s was attached already: taken over", k.Device.Path())
	}
	return k.Keep(context.WithoutCancel(ctx))
}

// ready tells whoever waits that the device is attached, and returns where
// messages go from now on.
func (f *deviceFlags) ready(v *kernel.Device, uri string, w io.Writer) (say func(string, ...any), err error) {
	if f.readyFD >= 0 {
		file := os.NewFile(uintptr(f.readyFD), "ready")
		if file == nil {
			return nil, usage("--ready-fd: %d is not a descriptor", f.readyFD)
		}
		w = file
		defer file.Close()
	}
	if err := f.report(w, v, uri); err != nil {
		return nil, fmt.Errorf("report the device: %w", err)
	}
	// Without a service manager there is nobody to tell.
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	if !f.log {
		return func(format string, args ...any) {
			fmt.Fprintf(os.Stderr, "vmdiskctl: %s\n", visible(fmt.Sprintf(format, args...)))
		}, nil
	}
	return toSyslog()
}

// toSyslog replaces the standard descriptors by /dev/null. Messages are lost on
// a machine without a system log.
func toSyslog() (func(string, ...any), error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return nil, os.NewSyscallError("dup3", err)
		}
	}
	log, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_NOTICE, "vmdiskctl")
	return func(format string, args ...any) {
		if err == nil {
			_ = log.Notice(visible(fmt.Sprintf(format, args...)))
		}
	}, nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/nbd/kernel"
	"github.com/vmdiskd/vmdiskd/internal/nbd/wire"
)

func newDevice() *cobra.Command {
	return group("device", "Give this kernel a disk as /dev/nbdN", newDeviceAttach(), newDeviceList(), newDeviceDetach())
}

// deviceFlags are those of device attach.
type deviceFlags struct {
	connectFlags
	connections        int
	timeout, deadConn  time.Duration
	block              uint32
	readOnly, json     bool
	swap, swapOn       bool
	persist, stay, log bool
	poll               time.Duration
	readyFD, uriFD     int
}

func newDeviceAttach() *cobra.Command { return new(deviceFlags).command() }

// command is device attach with these flags.
func (f *deviceFlags) command() *cobra.Command {
	c := &cobra.Command{
		Use:   "attach URI [/dev/nbdN]",
		Short: "Attach an export as a device",
		Long: `Attach an export as a device, and print its name.

The kernel speaks to Unix sockets and TCP by itself; this command ends then, and
nobody makes a new connection when one is lost, unless --persist is given. For
vsock and TLS, a process stays that holds the connections. When that process has
died, the same command with the name of the device takes the device over.`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error { return f.run(c, args) },
	}
	f.add(c)
	n := c.Flags()
	n.IntVar(&f.connections, "connections", 1, "connections to the server, if it allows more than one")
	n.DurationVar(&f.timeout, "timeout", limits.DeviceTimeout, "how long a request may take before its connection counts as dead; 0 is for ever")
	n.DurationVar(&f.deadConn, "dead-conn-timeout", limits.DeviceGrace, "how long requests wait for a new connection before they fail")
	n.Uint32Var(&f.block, "block-size", 0, "logical block size in bytes; 0 is the smallest that the server takes, from 512")
	n.BoolVar(&f.readOnly, "readonly", false, "let nobody write to the device")
	n.BoolVar(&f.swap, "swap", false, "set the device up for swap: one connection, no timeout, small requests")
	n.BoolVar(&f.swapOn, "swapon", false, "with --swap: run mkswap and swapon")
	n.BoolVar(&f.persist, "persist", false, "leave a process that makes lost connections anew and follows the size of the export")
	n.BoolVar(&f.stay, "foreground", false, "be that process")
	n.BoolVar(&f.log, "syslog", false, "with --foreground: when attached, let go of the terminal and write to the system log")
	n.IntVar(&f.readyFD, "ready-fd", -1, "with --foreground: write the device to this descriptor when it is attached")
	n.IntVar(&f.uriFD, "uri-fd", -1, "with --foreground: read the URI from this descriptor; the argument is for others to see")
	n.DurationVar(&f.poll, "poll", limits.DevicePoll, "how often that process asks for the size; 0 is never, the default with --swap")
	n.BoolVar(&f.json, "json", false, "write JSON")
	return c
}

// checkHolder refuses what is wrong with the flags of the process that holds the
// device.
func (f *deviceFlags) checkHolder(c *cobra.Command) error {
	set := c.Flags().Changed
	switch {
	case (f.log || set("ready-fd") || set("uri-fd")) && !f.stay:
		return usage("--syslog, --ready-fd and --uri-fd belong to --foreground")
	case set("ready-fd") && f.readyFD < 3:
		return usage("--ready-fd: want a descriptor from 3")
	case set("uri-fd") && (f.uriFD < 3 || f.uriFD == f.readyFD):
		return usage("--uri-fd: want a descriptor from 3, another one than --ready-fd")
	}
	return nil
}

// check refuses flags that contradict each other and fills in what depends on
// others.
func (f *deviceFlags) check(c *cobra.Command, direct bool) error {
	set := c.Flags().Changed
	switch {
	case f.connections < 1 || f.connections > limits.DeviceSockets:
		return usage("--connections: want 1 to %d", limits.DeviceSockets)
	case f.swapOn && !f.swap:
		return usage("--swapon belongs to --swap")
	case f.poll != 0 && f.poll < limits.DevicePollLeast:
		return usage("--poll: want 0 or at least %v", limits.DevicePollLeast)
	case f.swap && (set("timeout") && f.timeout != 0 || f.connections != 1):
		return usage("--swap has one connection and no timeout")
	}
	f.persist = f.persist || f.stay || !direct
	if f.swap {
		f.timeout = 0
		if !set("poll") {
			f.poll = 0 // a swap area does not grow
		}
	}
	if set("dead-conn-timeout") {
		return nil
	}
	switch {
	case !f.persist:
		f.deadConn = 0 // nobody makes a new one
	case f.swap:
		f.deadConn = limits.DeviceTimeMost
	}
	return nil
}

func (f *deviceFlags) run(c *cobra.Command, args []string) error {
	if err := f.checkHolder(c); err != nil {
		return err
	}
	uri, err := f.uri(args[0])
	if err != nil {
		return err
	}
	s, err := f.server(uri)
	if err != nil {
		return err
	}
	index := kernel.Any
	if len(args) == 2 {
		if index, err = kernel.ParseDevice(args[1]); err != nil {
			return usageError{err}
		}
	}
	config := kernel.Config{
		Server: kernel.Server{Target: s.Target, Export: s.Export, TLS: s.renew},
		URI:    s.URI.String(), Index: index, Sysfs: kernel.BlockDevices,
	}
	if err := f.check(c, config.Server.Direct()); err != nil {
		return err
	}
	config.Connections, config.Timeout, config.DeadConn = f.connections, f.timeout, f.deadConn
	config.ReadOnly, config.Block, config.Swap = f.readOnly, f.block, f.swap
	if err := config.Check(); err != nil {
		return err
	}
	if f.persist && !f.stay {
		return f.background(c, config)
	}
	if f.stay {
		config.Holds = holdsFolder
	}
	return f.attach(c.Context(), config, c.OutOrStdout())
}

// deviceReport is what device attach and device list say of a device.
type deviceReport struct {
	Device   string `json:"device"`
	Size     int64  `json:"size"`
	Block    int64  `json:"block_size"`
	ReadOnly bool   `json:"read_only"`
	PID      int    `json:"pid,omitempty"`
	Server   string `json:"server"`
}

// attach attaches the device, says so, and holds it if it is to.
func (f *deviceFlags) attach(ctx context.Context, config kernel.Config, w io.Writer) error {
	driver, err := kernel.Open()
	if err != nil {
		return err
	}
	defer driver.Close()
	var dead <-chan int
	if f.stay {
		// Not the command's context: signals ask a holder to detach.
		hold, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		if dead, err = f.prepare(hold); err != nil {
			return err
		}
	}
	v, err := kernel.Attach(ctx, driver, config)
	if err != nil {
		return err
	}
	defer v.Close()
	say, err := f.announce(ctx, v, config.URI, w)
	if err != nil && v.TakenOver {
		return err // whoever uses it had it before
	}
	if err != nil {
		return errors.Join(err, withdraw(ctx, driver, config.Sysfs, v.Index()))
	}
	if f.stay {
		return f.hold(ctx, &kernel.Keeper{Device: v, Dead: dead, Poll: f.poll, Say: say})
	}
	return nil
}

// announce swaps to the device, if that is asked for, and says that it is
// there. A holder's messages go to what it returns.
func (f *deviceFlags) announce(ctx context.Context, v *kernel.Device, uri string, w io.Writer) (say func(string, ...any), err error) {
	if f.swapOn {
		if err := swapOn(ctx, v.Path()); err != nil {
			return nil, err
		}
	}
	if f.stay {
		say, err = f.ready(v, uri, w)
	} else {
		err = f.report(w, v, uri)
	}
	return say, err
}

// withdraw takes a device away again that could not be announced, also when ctx
// has ended. One that the machine goes on swapping to stays.
func withdraw(ctx context.Context, driver *kernel.Driver, sysfs kernel.Sysfs, index int) error {
	ctx = context.WithoutCancel(ctx)
	device := "/dev/" + kernel.Name(index)
	if err := swapOff(ctx, device); err != nil {
		return fmt.Errorf("%s stays attached: %w", device, err)
	}
	return kernel.Detach(ctx, driver, sysfs, index, true)
}

func (f *deviceFlags) report(w io.Writer, v *kernel.Device, uri string) error {
	if !f.json {
		_, err := fmt.Fprintln(w, v.Path())
		return err
	}
	return writeJSON(w, deviceReport{Device: v.Path(), Size: int64(v.Size()), Block: int64(v.Block()),
		ReadOnly: v.Flags()&wire.ReadOnly != 0, Server: kernel.ShownURI(uri)})
}

func newDeviceList() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "Show the attached devices",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			driver, err := kernel.Open()
			if err != nil {
				return err
			}
			defer driver.Close()
			list, err := attached(driver, kernel.BlockDevices)
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(c.OutOrStdout(), list)
			}
			return printDevices(c.OutOrStdout(), list)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return c
}

// attached are the devices that the driver calls connected, as sysfs describes
// them. One that is detached meanwhile is left out.
func attached(d *kernel.Driver, sysfs kernel.Sysfs) ([]deviceReport, error) {
	all, err := d.Devices()
	if err != nil {
		return nil, err
	}
	connected := map[int]bool{}
	for _, s := range all {
		connected[s.Index] = s.Connected
	}
	infos, err := sysfs.List()
	if err != nil {
		return nil, err
	}
	list := []deviceReport{}
	for _, i := range infos {
		if connected[i.Index] {
			list = append(list, deviceReport{Device: "/dev/" + kernel.Name(i.Index), Size: i.Size, Block: i.Block,
				ReadOnly: i.ReadOnly, PID: i.PID, Server: kernel.BackendURI(i.Backend)})
		}
	}
	return list, nil
}

func printDevices(w io.Writer, list []deviceReport) error {
	t := table{head: []string{"DEVICE", "SIZE ", "BLOCK ", "MODE", "PID ", "SERVER"}}
	for _, d := range list {
		mode := "rw"
		if d.ReadOnly {
			mode = "ro"
		}
		server := "-"
		if d.Server != "" {
			server = shown(d.Server)
		}
		t.add(d.Device, byteSize(d.Size).String(), fmt.Sprint(d.Block), mode, fmt.Sprint(d.PID), server)
	}
	return t.print(w)
}

func newDeviceDetach() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "detach /dev/nbdN",
		Short: "Take a device away",
		Long: `Flush a device and take it away; a swap device is switched off before. One
that is mounted or otherwise in use stays, unless --force is given.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			index, err := kernel.ParseDevice(args[0])
			if err != nil {
				return usageError{err}
			}
			driver, err := kernel.Open()
			if err != nil {
				return err
			}
			defer driver.Close()
			if err := swapOff(c.Context(), "/dev/"+kernel.Name(index)); err != nil {
				return err
			}
			if err := kernel.Detach(c.Context(), driver, kernel.BlockDevices, index, force); err != nil {
				return fmt.Errorf("/dev/%s: %w", kernel.Name(index), err)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "detach it under those who use it: they get errors, and what was not flushed is lost")
	return c
}

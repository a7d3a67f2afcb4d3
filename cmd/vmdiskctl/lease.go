package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// leaseFlags are those of vm lease.
type leaseFlags struct {
	ctlFlags
	cid uint32
	pid int
	ttl time.Duration
}

func newVMLease() *cobra.Command {
	f := &leaseFlags{}
	c := &cobra.Command{
		Use:   "lease VM",
		Short: "Let a running machine open what is granted to it over vsock",
		Long: `Lease the CID of a running machine for it, until it ends or this command does: a
daemon's grants with vm = ["VM"] are for connections from that CID in the
meantime, and those connections end with the lease. Where several of these
commands hold it, it ends with the machine or with the last of them.

VM is the name that the grants have. If it is the path of a QMP socket, it has a
slash, and QEMU says its CID and who it is: then the machine has also ended when
that socket has gone. Otherwise --cid and --pid say it.
Runs until then, as a service would.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return f.run(c, args[0])
		},
	}
	f.addSocket(c)
	c.PreRunE = checkText
	c.Flags().Uint32Var(&f.cid, "cid", 0, "`CID` of the machine")
	c.Flags().IntVar(&f.pid, "pid", 0, "process `ID` of its QEMU")
	c.Flags().DurationVar(&f.ttl, "ttl", limits.LeaseUsual, "`TIME` after which the lease ends by itself if this command is killed")
	return c
}

func (f *leaseFlags) run(c *cobra.Command, vm string) error {
	switch {
	case f.ttl < limits.LeaseShortest || f.ttl > limits.LeaseLongest:
		return usage("--ttl: want %v to %v", limits.LeaseShortest, limits.LeaseLongest)
	case len(vm) > limits.LeaseName:
		return usage("VM: the name has more than %d bytes", limits.LeaseName)
	case f.pid < 0 || f.pid > math.MaxInt32:
		return usage("--pid: %d is no process", f.pid)
	case !strings.Contains(vm, "/") && (f.cid == 0 || f.pid == 0):
		return usage("--cid and --pid are needed for a machine that is no QMP socket")
	}
	cl, err := f.dial()
	if err != nil {
		return err
	}
	var monitor os.FileInfo
	if f.pid == 0 || f.cid == 0 {
		if monitor, err = os.Stat(vm); err != nil {
			return err
		}
	}
	if f.pid == 0 {
		if f.pid, err = qemuAt(c.Context(), vm); err != nil {
			return plugError(err)
		}
	}
	p, err := watchProcess(f.pid)
	if err != nil {
		return err
	}
	defer p.close()
	p.monitor = monitor
	if f.cid == 0 {
		if f.cid, err = cidOf(c.Context(), vm); err != nil {
			return plugError(err)
		}
	}
	h := &leaseHolder{client: cl, process: p, lease: api.OpenLease{CID: f.cid, VM: vm, Start: p.start, TTL: config.Duration(f.ttl), Holder: rand.Text()}}
	h.note = notesOf(c)
	return told(h.hold(c.Context()))
}

// qemuAt is the process that listens at a QMP socket. Where somebody else has
// made the socket for QEMU, as libvirt does, that is not QEMU.
func qemuAt(ctx context.Context, path string) (int, error) {
	conn, err := qmp.DialSocket(ctx, path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, err
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cred.Pid))
	if err != nil {
		return 0, err
	}
	if !bytes.HasPrefix(name, []byte("qemu")) {
		return 0, usage("the socket was made by process %d, %q, which is no QEMU: say --pid", cred.Pid, bytes.TrimSpace(name))
	}
	return int(cred.Pid), nil
}

func cidOf(ctx context.Context, path string) (uint32, error) {
	m, err := qmp.Dial(ctx, path)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	return qmp.GuestCID(ctx, m)
}

// process is a process whose number cannot become another's unnoticed.
type process struct {
	fd      int         // pidfd
	start   string      // tells it from all others since the machine has started
	monitor os.FileInfo // its QMP socket, if it was asked there
}

// has tells whether the QMP socket at path is still that of the process, which
// takes it away when it ends.
func (p *process) has(path string) bool {
	if p.monitor == nil {
		return true
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(now, p.monitor)
}

func watchProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	p := &process{fd: fd}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil {
		p.start, err = startOf(pid, b)
	}
	if err == nil && p.wait(0) {
		err = unix.ESRCH // and what was read may be another's
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return p, nil
}

// startOf makes a name of a process ID and the time when it started, field 22
// of /proc/PID/stat (proc(5)); the name of the program, in brackets, may hold
// anything.
func startOf(pid int, stat []byte) (string, error) {
	const after = 22 - 3 // from the field behind the brackets
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= after {
		return "", errors.New("stat is not what it should be")
	}
	return fmt.Sprintf("%d-%s", pid, fields[after]), nil
}

// wait waits for the end of the process for at most d, and reports it.
func (p *process) wait(d time.Duration) bool {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, int(d.Milliseconds()))
	return err == nil && n == 1
}

func (p *process) close() { _ = unix.Close(p.fd) }

// leaseHolder keeps a lease open as long as a process lives.
type leaseHolder struct {
	client  *control.Client
	process *process
	lease   api.OpenLease
	note    func(string)
}

// leaseLook is how often the process and the signals are looked at: a lease
// ends within that time after its machine.
const leaseLook = 100 * time.Millisecond

// hold returns when the machine has ended, or ctx has, and the lease is closed.
// A daemon that does not answer is asked again; one that does not want the
// lease ends it.
func (h *leaseHolder) hold(ctx context.Context) error {
	if err := h.renew(ctx); err != nil {
		return err
	}
	defer h.close()
	h.note(fmt.Sprintf("CID %d is leased to %q", h.lease.CID, h.lease.VM))
	next, lost := time.Now().Add(h.third()), false
	for ctx.Err() == nil && !h.ended(leaseLook) {
		if time.Now().Before(next) {
			continue
		}
		err := h.renew(ctx)
		if control.RefusalOf(err) != nil {
			return err
		}
		if bad := err != nil; bad != lost {
			if lost = bad; lost {
				h.note(fmt.Sprintf("the daemon does not answer: %v", err))
			} else {
				h.note("the daemon answers again")
			}
		}
		next = time.Now().Add(h.third())
		if lost {
			next = time.Now().Add(min(time.Second, h.third()))
		}
	}
	return nil
}

// ended waits for the end of the machine for at most d, and reports it: its
// process or its QMP socket has gone.
func (h *leaseHolder) ended(d time.Duration) bool {
	return h.process.wait(d) || !h.process.has(h.lease.VM)
}

// third lets two attempts fail before the lease ends.
func (h *leaseHolder) third() time.Duration { return time.Duration(h.lease.TTL) / 3 }

func (h *leaseHolder) renew(ctx context.Context) error {
	_, err := h.client.OpenLease(ctx, h.lease)
	return err
}

// close ends the lease for this holder, and for all when the machine has ended; if
// the daemon does not answer, it ends by itself.
func (h *leaseHolder) close() {
	holder := h.lease.Holder
	if h.ended(0) {
		holder = ""
	}
	err := h.client.CloseLease(context.Background(), h.lease.CID, h.lease.Start, holder)
	if e := control.RefusalOf(err); e != nil && e.Code == api.CodeNotFound {
		return // another holder has seen the end of the machine, too
	}
	if err != nil {
		h.note(fmt.Sprintf("the lease could not be closed: %v", err))
	}
}

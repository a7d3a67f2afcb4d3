package guest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/control/api"
	control "github.com/vmdiskd/vmdiskd/internal/control/client"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// leased is a machine of QEMU with a QMP socket.
type leased struct {
	qmp   string
	cmd   *exec.Cmd
	guest io.Writer // its console
}

// bootLeased starts a machine whose guest says that it is up and is powered off
// by a line on its console; with -S among the options it waits before that.
func (e *estate) bootLeased(t *testing.T, options ...string) *leased {
	t.Helper()
	ctx := testenv.Context(t)
	kernel := testenv.CloudKernel(t, stableKernel)
	in, err := newInitramfs(ctx, kernel, "echo guest: up\nread line\n")
	if err == nil {
		err = in.writeFile(e.dir + "/leased")
	}
	if err != nil {
		t.Fatal(err)
	}
	m := &leased{qmp: e.dir + "/qmp"}
	options = append(options, "-qmp", "unix:"+m.qmp+",server=on,wait=off")
	m.cmd, err = Machine{Kernel: kernel, Initrd: e.dir + "/leased", MemoryMiB: 256, Devices: options}.Command(ctx)
	if err != nil {
		t.Fatal(err)
	}
	console, err := os.Create(e.dir + "/console")
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	m.cmd.Stdout, m.cmd.Stderr = console, console
	m.guest, err = m.cmd.StdinPipe()
	if err = errors.Join(err, m.cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill() // it may have ended
		_ = m.cmd.Wait()
	})
	e.await(t, "QEMU listens", func() bool {
		c, err := net.Dial("unix", m.qmp)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return m
}

// tell sends a command to QMP, which may end QEMU before it answers.
func (m *leased) tell(t *testing.T, command string) {
	t.Helper()
	c, err := net.Dial("unix", m.qmp)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(c, `{"execute":"qmp_capabilities"}{"execute":%q}`, command); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, r) // until QEMU is gone
}

// TestLeaseEndsWithTheMachineOfQEMU: a machine that runs has a lease until its
// guest is powered off, or QEMU quits, is killed or loses its QMP socket.
func TestLeaseEndsWithTheMachineOfQEMU(t *testing.T) {
	e := newEstate(t)
	ctl := control.Dial(e.dir + "/control")
	for _, tt := range []struct {
		name    string
		options []string
		end     func(t *testing.T, m *leased)
	}{
		{"guest is powered off", nil, func(t *testing.T, m *leased) {
			e.expect(t, "up")
			if _, err := io.WriteString(m.guest, "\n"); err != nil {
				t.Fatal(err)
			}
		}},
		{"QEMU quits", []string{"-S"}, func(t *testing.T, m *leased) { m.tell(t, "quit") }},
		{"QEMU is killed", []string{"-S"}, func(t *testing.T, m *leased) {
			if err := m.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}},
		{"QMP socket is gone", []string{"-S"}, func(t *testing.T, m *leased) {
			if err := os.Remove(m.qmp); err != nil {
				t.Fatal(err)
			}
		}},
		{"QMP socket is another's", []string{"-S"}, func(t *testing.T, m *leased) {
			l, err := net.Listen("unix", m.qmp+"2")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			if err := os.Rename(m.qmp+"2", m.qmp); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := e.bootLeased(t, tt.options...)
			// The machine has no vsock device: not every host has one to give.
			holder := exec.Command(e.ctl, "vm", "lease", m.qmp, "--cid=42", "--ttl=1h", "--socket", e.dir+"/control")
			var said bytes.Buffer
			holder.Stderr = &said
			holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := holder.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- holder.Wait() }()
			leases := func() []api.Lease {
				list, err := ctl.Leases(testenv.Context(t))
				if err != nil {
					t.Fatal(err)
				}
				return list
			}
			e.await(t, "the CID is leased", func() bool { return len(leases()) == 1 })
			l := leases()[0]
			if l.CID != 42 || l.VM != m.qmp || !strings.HasPrefix(l.Start, fmt.Sprint(m.cmd.Process.Pid, "-")) {
				t.Errorf("the lease is %+v, of process %d", l, m.cmd.Process.Pid)
			}
			tt.end(t, m)
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("vm lease: %v: %s", err, said.String())
				}
			case <-testenv.Context(t).Done():
				_ = holder.Process.Kill()
				t.Fatal("vm lease does not end")
			}
			if list := leases(); len(list) != 0 {
				t.Errorf("at the end there are leases: %+v", list)
			}
		})
	}
}

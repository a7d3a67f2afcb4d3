package daemon

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vmdiskd/vmdiskd/internal/transport"
)

// exitStatus is how a captive command ended; the daemon ends the same way.
type exitStatus int

func (exitStatus) Error() string { return "command has ended" }

// startCommand runs the command of --run by the shell. It finds the disk in
// shell variables: $uri, $unixsocket, $port, $exportname, and $nbd, which is
// an older spelling of the address for QEMU's tools.
func (d *daemon) startCommand() error {
	if d.cfg.Run == "" {
		return nil
	}
	if d.cfg.Handed != nil {
		return d.releaseCommand()
	}
	if len(d.doors.all()) == 0 {
		return errNoSocket
	}
	cmd := exec.Command("/bin/sh", "-c", d.cfg.shellVariables(d.doors.all()[0])+d.cfg.Run)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go d.awaitCommand(cmd.Process)
	return nil
}

var errNoSocket = errors.New("--run needs a socket")

// awaitCommand ends the daemon as the command ends.
func (d *daemon) awaitCommand(p *os.Process) {
	state, err := p.Wait()
	switch {
	case err != nil:
		d.finished <- err
	default:
		d.finished <- statusOf(state.Sys().(syscall.WaitStatus))
	}
}

// statusOf is the status of a process as shells have it: one that a signal has
// ended has 128 and its number.
func statusOf(w syscall.WaitStatus) exitStatus {
	if w.Signaled() {
		return exitStatus(128 + w.Signal())
	}
	return exitStatus(w.ExitStatus())
}

// shellVariables are for a command that finds the disk at l.
func (c *Config) shellVariables(l transport.Listener) string {
	name := c.Disk.Name
	var path, port, old string
	switch l.Kind() {
	case transport.Unix:
		path = l.Addr()
		old = "nbd:unix:" + path
	case transport.TCP:
		host, number, _ := net.SplitHostPort(l.Addr())
		if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
			host = "localhost"
		}
		port, old = number, "nbd:"+net.JoinHostPort(host, number)
	case transport.VSock:
		_, port, _ = strings.Cut(l.Addr(), ":")
	}
	if old != "" && name != "" {
		old += ":exportname=" + name
	}
	var b strings.Builder
	for _, v := range [...]struct{ name, value string }{
		{"uri", l.URI(name, c.wantsTLS())},
		{"unixsocket", path},
		{"port", port},
		{"exportname", name},
		{"nbd", old},
	} {
		b.WriteString(v.name + "=" + quote(v.value) + "\n")
	}
	return b.String()
}

// quote makes one word of the shell of s.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

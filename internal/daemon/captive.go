package daemon

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"

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
	if len(d.doors.all()) == 0 {
		return errors.New("--run needs a socket")
	}
	cmd := exec.Command("/bin/sh", "-c", d.shellVariables()+d.cfg.Run)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		err := cmd.Wait()
		var exit *exec.ExitError
		switch {
		case err == nil:
			d.finished <- exitStatus(0)
		case errors.As(err, &exit) && exit.ExitCode() >= 0:
			d.finished <- exitStatus(exit.ExitCode())
		default:
			d.finished <- err
		}
	}()
	return nil
}

func (d *daemon) shellVariables() string {
	l := d.doors.all()[0]
	name := d.cfg.Disk.Name
	var path, port, old string
	switch l.Kind() {
	case transport.Unix:
		path = l.Addr()
		old = "nbd:unix:" + path
	case transport.TCP:
		_, port, _ = net.SplitHostPort(l.Addr())
		old = "nbd:localhost:" + port
	case transport.VSock:
		_, port, _ = strings.Cut(l.Addr(), ":")
	}
	if old != "" && name != "" {
		old += ":exportname=" + name
	}
	var b strings.Builder
	for _, v := range [...]struct{ name, value string }{
		{"uri", l.URI(name, d.cfg.wantsTLS())},
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

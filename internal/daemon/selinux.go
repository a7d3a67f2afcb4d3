package daemon

import (
	"fmt"
	"os"
	"slices"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine"
	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
)

// selinuxControl is what SELinux does on this machine. That it only tells, and
// does not refuse, is in the log as well if a socket was to have a label.
func (d *daemon) selinuxControl() confine.Control {
	c := confine.Control{Name: confine.ControlSELinux, State: confine.Enforced}
	switch {
	case !selinux.Enabled():
		c.State, c.Reason = confine.Off, selinux.ErrDisabled.Error()
	case !selinux.Enforcing():
		c.State, c.Reason = confine.Degraded, "SELinux is permissive: labels are set, and nothing is refused"
		if d.labels() {
			d.log.Warn("sockets are labelled for nothing", "reason", c.Reason)
		}
	}
	return c
}

// labels tells whether the configuration names a label.
func (d *daemon) labels() bool {
	for _, e := range d.cfg.Endpoints {
		if e.Label != "" || e.PathLabel != "" {
			return true
		}
	}
	c := d.conf.Load()
	if c == nil {
		return false
	}
	labelled := func(l config.Listener) bool { return l.SELinuxLabel != "" || l.SELinuxPathLabel != "" }
	return slices.ContainsFunc(c.Listeners, labelled) ||
		slices.ContainsFunc(c.Exports, func(x config.Export) bool { return slices.ContainsFunc(x.Listeners, labelled) })
}

// mayLabel lets the worker label the sockets that it makes later on: it asks
// the policy, and writes attributes of its threads.
func (s *stage0) mayLabel() {
	if !selinux.Enabled() {
		return
	}
	s.may("/sys/fs/selinux/enforce", confine.Read)
	s.may("/sys/fs/selinux/context", confine.Read|confine.Write)
	s.may(fmt.Sprintf("/proc/%d/task", os.Getpid()), confine.Read|confine.Write)
}

package attach

import (
	"errors"
	"fmt"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// NoLabel, as a label of Source, leaves it to the policy.
const NoLabel = "none"

// ErrUnlabelled is for a machine whose categories are not known on a host where
// SELinux is enforcing: it could not connect, or any other could.
var ErrUnlabelled = errors.New("the socket would have no SELinux label")

// socketTypes are types of sockets that machines may connect to, the better
// first: Fedora's, and that of the daemon's own policy, which every policy can
// have. A machine connects to a socket as to the process that has made it.
var socketTypes = [...]string{"svirt_socket_t", "vmdiskd_t"}

// setLabels completes the labels of s from those of the running machine: its
// categories belong on the socket and on its file, so that no other machine
// connects. What is said already stays.
func (s *Source) setLabels(x *libvirtxml.Domain, host selinux.System) error {
	if s.Image == "" {
		return nil
	}
	is, image, known := machineLabels(x)
	if s.Label == "" || s.PathLabel == "" {
		switch {
		case !known && host.Enforcing():
			return fmt.Errorf("%w: libvirt does not say that of the domain; name both labels, or %q", ErrUnlabelled, NoLabel)
		case !known, !host.Enabled():
			return nil
		}
	}
	if s.PathLabel == "" {
		s.PathLabel = image
	}
	if s.Label == "" {
		var err error
		if s.Label, err = socketLabel(is, host.CheckContext); err != nil {
			return err
		}
	}
	return nil
}

// machineLabels are the contexts of the process and of the images of a running
// machine.
func machineLabels(x *libvirtxml.Domain) (process selinux.Context, image string, known bool) {
	if x == nil {
		return process, "", false
	}
	for _, l := range x.SecLabel {
		if l.Model != "selinux" || l.Type == "none" {
			continue
		}
		process, err := selinux.Parse(l.Label)
		if err != nil {
			continue
		}
		if _, err := selinux.Parse(l.ImageLabel); err != nil {
			continue
		}
		return process, l.ImageLabel, true
	}
	return process, "", false
}

// socketLabel is the first context with the machine's categories that the
// policy knows.
func socketLabel(machine selinux.Context, check func(string) error) (string, error) {
	c := selinux.Context{User: "system_u", Role: "system_r"}.WithRange(machine)
	for _, c.Type = range socketTypes {
		err := check(c.String())
		if err == nil {
			return c.String(), nil
		}
		if !errors.Is(err, selinux.ErrContext) {
			return "", err
		}
	}
	return "", fmt.Errorf("%w: the policy has none of the types %q: install the daemon's module, or name a label", ErrUnlabelled, socketTypes)
}

// checkLabels looks at the text of labels that somebody has named.
func (s *Source) checkLabels() error {
	for _, label := range []string{s.Label, s.PathLabel} {
		if label == "" || label == NoLabel {
			continue
		}
		if _, err := selinux.Parse(label); err != nil {
			return fmt.Errorf("%w label %q: %w", qmp.ErrInvalid, qmp.Printable(label, 200), err)
		}
	}
	return nil
}

// labelText is the label for the daemon.
func labelText(label string) string {
	if label == NoLabel {
		return ""
	}
	return label
}

// labelNote says in a plan how the socket and its file are labelled.
func (s *Source) labelNote() string {
	text := ""
	if label := labelText(s.Label); label != "" {
		text += ", labelled " + label
	}
	if label := labelText(s.PathLabel); label != "" {
		text += ", its file " + label
	}
	return text
}

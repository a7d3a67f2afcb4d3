package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"

	"github.com/vmdiskd/vmdiskd/internal/config"
	"github.com/vmdiskd/vmdiskd/internal/confine/selinux"
	"github.com/vmdiskd/vmdiskd/internal/control/api"
	"github.com/vmdiskd/vmdiskd/internal/qmp"
)

// selinuxHost has a selinuxfs in which the policy knows every context; enforce "" is
// a host without SELinux.
func selinuxHost(t *testing.T, enforce string) selinux.System {
	t.Helper()
	s := selinux.System{FS: t.TempDir()}
	for name, text := range map[string]string{"enforce": enforce, "context": ""} {
		if err := os.WriteFile(filepath.Join(s.FS, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// running is a machine with libvirt's labels.
func running(labels ...libvirtxml.DomainSecLabel) *libvirtxml.Domain {
	return &libvirtxml.Domain{SecLabel: append([]libvirtxml.DomainSecLabel{{Model: "dac", Label: "+107:+107"}}, labels...)}
}

var svirt = libvirtxml.DomainSecLabel{
	Model: "selinux", Type: "dynamic", Relabel: "yes",
	Label:      "system_u:system_r:svirt_tcg_t:s0:c525,c596",
	ImageLabel: "system_u:object_r:svirt_image_t:s0:c525,c596",
}

func TestSocketGetsTheCategoriesOfTheMachine(t *testing.T) {
	const (
		socket = "system_u:system_r:svirt_socket_t:s0:c525,c596"
		file   = "system_u:object_r:svirt_image_t:s0:c525,c596"
	)
	none := svirt
	none.Type = "none"
	broken := svirt
	broken.ImageLabel = "<imagelabel>"
	for _, tt := range []struct {
		name          string
		machine       *libvirtxml.Domain
		enforce       string
		in            Source
		label, path   string
		unlabelledErr bool
	}{
		{"as libvirt says", running(svirt), "1", Source{}, socket, file, false},
		{"permissive", running(svirt), "0", Source{}, socket, file, false},
		{"named socket", running(svirt), "1", Source{Label: "u:r:t:s0"}, "u:r:t:s0", file, false},
		{"named file", running(svirt), "1", Source{PathLabel: NoLabel}, socket, NoLabel, false},
		{"no SELinux", running(svirt), "", Source{}, "", "", false},
		{"domain without labels, permissive", running(), "0", Source{}, "", "", false},
		{"domain without labels, enforcing", running(), "1", Source{}, "", "", true},
		{"domain that does not run", nil, "1", Source{}, "", "", true},
		{"domain without SELinux", running(none), "1", Source{}, "", "", true},
		{"label that is none", running(broken), "1", Source{}, "", "", true},
		{"nothing known, all named", running(), "1", Source{Label: NoLabel, PathLabel: NoLabel}, NoLabel, NoLabel, false},
		{"nothing known, one named", running(), "1", Source{Label: "u:r:t:s0"}, "u:r:t:s0", "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.in
			s.Image = "/a"
			err := s.setLabels(tt.machine, selinuxHost(t, tt.enforce))
			if errors.Is(err, ErrUnlabelled) != tt.unlabelledErr || (err != nil) != tt.unlabelledErr {
				t.Fatalf("got error %v, want ErrUnlabelled: %v", err, tt.unlabelledErr)
			}
			if s.Label != tt.label || s.PathLabel != tt.path {
				t.Errorf("labels %q and %q, want %q and %q", s.Label, s.PathLabel, tt.label, tt.path)
			}
		})
	}
}

// TestSocketTypeIsOneThatThePolicyKnows: Debian's has no svirt_socket_t.
func TestSocketTypeIsOneThatThePolicyKnows(t *testing.T) {
	machine, err := selinux.Parse(svirt.Label)
	if err != nil {
		t.Fatal(err)
	}
	knows := func(types ...string) func(string) error {
		return func(c string) error {
			for _, name := range types {
				if strings.Contains(c, ":"+name+":") {
					return nil
				}
			}
			return fmt.Errorf("%w: %q", selinux.ErrContext, c)
		}
	}
	for _, tt := range []struct {
		check func(string) error
		want  string
		err   error
	}{
		{knows("svirt_socket_t", "vmdiskd_t"), "system_u:system_r:svirt_socket_t:s0:c525,c596", nil},
		{knows("vmdiskd_t"), "system_u:system_r:vmdiskd_t:s0:c525,c596", nil},
		{knows(), "", ErrUnlabelled},
		{func(string) error { return os.ErrPermission }, "", os.ErrPermission},
	} {
		if got, err := socketLabel(machine, tt.check); got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("got %q, %v, want %q, %v", got, err, tt.want, tt.err)
		}
	}
}

func TestPlanShowsAndSendsTheLabels(t *testing.T) {
	s := Source{Image: "/a", Socket: "/run/x", Label: "u:r:t:s0:c1", PathLabel: NoLabel}
	v, err := s.serveImage(t.Context(), nil, "vm", "d")
	if err != nil {
		t.Fatal(err)
	}
	if got := v.steps[0].Name; !strings.HasSuffix(got, ", labelled u:r:t:s0:c1") {
		t.Errorf("the step is called %q", got)
	}
	s.PathLabel = "u:r:t:s0:c1024"
	if _, err := s.serveImage(t.Context(), nil, "vm", "d"); !errors.Is(err, qmp.ErrInvalid) {
		t.Errorf("label that is none: got %v, want ErrInvalid", err)
	}
}

// TestExportWithLabelsOfAnEarlierStartIsRefused: its machine has other
// categories by now and could not connect.
func TestExportWithLabelsOfAnEarlierStartIsRefused(t *testing.T) {
	listener := func(label string) []config.Listener {
		return []config.Listener{{URI: "nbd+unix:///?socket=/s", SELinuxLabel: label}}
	}
	var x api.Export
	var a api.AddExport
	x.Listeners, a.Listeners = listener("u:r:t:s0:c1"), listener("u:r:t:s0:c2")
	if err := same(x, a); !errors.Is(err, ErrDiffers) {
		t.Errorf("other categories: got %v, want ErrDiffers", err)
	}
	x.Listeners = listener("u:r:t:s0:c2")
	if err := same(x, a); err != nil {
		t.Errorf("same categories: %v", err)
	}
}

package lab

import (
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestGuestIsWhatAScenarioSays: what scenarios rely on holds in a guest.
func TestGuestIsWhatAScenarioSays(t *testing.T) {
	t.Parallel()
	r := Run(t, Scenario{
		Enforcing: true,
		Text: map[string]string{
			"/etc/systemd/system/hello.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/echo hello from a unit\n",
		},
		Links: map[string]string{"/etc/systemd/system/multi-user.target.wants/hello.service": "../hello.service"},
		Steps: []Step{
			{Name: "SELinux refuses", Script: "[ $(getenforce) = Enforcing ]; id -Z | tee /lab/out/context"},
			{Name: "files are labelled", Script: "matchpathcon -V /etc/systemd/system/hello.service /usr/sbin/vmdiskd /etc/shadow"},
			{Name: "units are enabled", Script: "systemctl start hello.service; journalctl -u hello.service | grep 'hello from a unit'"},
			{Name: "modules can be loaded", Script: "modprobe vsock_loopback; modprobe nbd; ls -l /dev/vsock /dev/nbd0"},
			{Name: "vmdiskd runs", Script: "vmdiskd --version; vmdiskctl --help"},
		},
	})
	if !strings.Contains(r.Outputs["context"], ":unconfined_t:") {
		t.Errorf("steps run as %q", r.Outputs["context"])
	}
}

package lab

import (
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// hello is a unit that is enabled by a link.
var (
	helloUnit = map[string]string{
		"/etc/systemd/system/hello.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/echo hello from a unit\n",
	}
	helloLink = map[string]string{"/etc/systemd/system/multi-user.target.wants/hello.service": "../hello.service"}
)

// promised are steps that hold in every enforcing guest with that unit: what
// scenarios rely on.
var promised = []Step{
	{Name: "SELinux refuses", Script: "[ $(getenforce) = Enforcing ]; id -Z | tee /lab/out/context"},
	{Name: "files are labelled", Script: "matchpathcon -V /etc/systemd/system/hello.service /usr/sbin/vmdiskd /etc/shadow"},
	{Name: "units are enabled", Script: "systemctl start hello.service; journalctl -u hello.service | grep 'hello from a unit'"},
	{Name: "modules can be loaded", Script: "modprobe vsock_loopback; modprobe nbd; ls -l /dev/vsock /dev/nbd0"},
	{Name: "programs run", Script: "vmdiskd --version; vmdiskctl --help >/dev/null; nbdinfo --version"},
}

package lab

import (
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// TestServiceUnderAppArmor boots the guest with AppArmor in place of SELinux,
// as Debian has it, and runs the unit of the packages in its profile.
func TestServiceUnderAppArmor(t *testing.T) {
	t.Parallel()
	root := testenv.Root()
	profile := filepath.Join(t.TempDir(), "profile")
	_, err := testenv.Command(t.Context(), root, "apparmor_parser", "--skip-kernel-load", "--skip-cache",
		"--features-file=/etc/apparmor.d/abi/3.0", "--ofile="+profile, "packaging/apparmor/vmdiskd")
	if err != nil {
		t.Fatal(err)
	}
	Run(t, Scenario{
		Append: "security=apparmor selinux=0",
		Files: map[string]string{
			"/lab/profile": profile,
			"/usr/lib/systemd/system/vmdiskd.service": root + "/systemd/vmdiskd.service",
			"/usr/lib/sysusers.d/vmdiskd.conf":        root + "/systemd/vmdiskd.sysusers",
			"/usr/lib/tmpfiles.d/vmdiskd.conf":        root + "/systemd/vmdiskd.tmpfiles",
		},
		Text: map[string]string{"/etc/vmdiskd/vmdiskd.toml": `
[control]
socket = "/run/vmdiskd/control.sock"
state = "/var/lib/vmdiskd/exports"
[images]
roots = ["/var/lib/vmdiskd/images", "/srv"]
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/nbd.sock"
[[listener]]
uri = "nbd+vsock://1:10809"
[[export]]
name = "a"
image = "/var/lib/vmdiskd/images/a.img"
`},
		Steps: []Step{
			{Name: "profile is loaded", Script: `
cat /lab/profile >/sys/kernel/security/apparmor/.replace
grep -x 'vmdiskd (enforce)' /sys/kernel/security/apparmor/profiles`},
			{Name: "service runs in it", Seconds: 180, Script: `
systemd-sysusers; systemd-tmpfiles --create vmdiskd.conf; modprobe vsock_loopback
mkdir -p /var/lib/vmdiskd/images
truncate -s 1M /var/lib/vmdiskd/images/a.img /var/lib/vmdiskd/images/b.img /srv/c.img
chown -R vmdiskd:vmdiskd /var/lib/vmdiskd /srv/c.img
systemctl start vmdiskd || { journalctl -b --no-pager -u vmdiskd; journalctl -b -k --no-pager --grep apparmor; exit 1; }
grep -x 'vmdiskd (enforce)' /proc/$(systemctl show -P MainPID vmdiskd)/attr/current`},
			{Name: "it serves and keeps exports", Seconds: 180, Script: `
uri='nbd+unix:///a?socket=/run/vmdiskd/nbd.sock'
head -c 1048576 /dev/urandom >/tmp/data
nbdcopy /tmp/data "$uri"; nbdcopy "$uri" /tmp/back; cmp /tmp/data /tmp/back
nbdinfo --size nbd+vsock://1:10809/a
vmdiskctl export add b /var/lib/vmdiskd/images/b.img --persist --listen 'nbd+unix:///?socket=/run/vmdiskd/b.sock'
systemctl restart vmdiskd
systemctl reload vmdiskd || { journalctl --no-pager -b -u vmdiskd; exit 1; }
nbdinfo --size 'nbd+unix:///b?socket=/run/vmdiskd/b.sock'
fails journalctl -b -k --quiet --no-pager --grep 'apparmor="DENIED".*profile="vmdiskd"'`},
			{Name: "it opens nothing else", Seconds: 180, Script: `
fails vmdiskctl export add c /srv/c.img --readonly
journalctl -b -k --no-pager --grep 'apparmor="DENIED".*profile="vmdiskd".*/srv'
systemctl stop vmdiskd`},
		},
	})
}

package lab

import (
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// serviceConfig is the service of the packages with two disks; the second is
// for processes of the guest itself, over vsock.
const serviceConfig = `
[control]
socket = "/run/vmdiskd/control.sock"

[images]
roots = ["/var/lib/vmdiskd"]

[[listener]]
uri = "systemd:nbd"

[[listener]]
uri = "systemd:vsock"

[[export]]
name = "disk"
image = "/var/lib/vmdiskd/disk.img"
format = "raw"
vsock-trust-cid = true

[[export.grant]]
access = "rw"
cid = [1]

[[export.grant]]
access = "rw"

[[export]]
name = "guests"
image = "/var/lib/vmdiskd/guests.img"
format = "raw"
`

// service is a guest with the units of the packages, whose sockets are
// enabled, and with short times.
func service(enforcing bool, steps ...Step) Scenario {
	units := filepath.Join(testenv.Root(), "systemd")
	s := Scenario{
		Enforcing: enforcing,
		Files: map[string]string{
			"/usr/lib/sysusers.d/vmdiskd.conf": filepath.Join(units, "vmdiskd.sysusers"),
			"/usr/lib/tmpfiles.d/vmdiskd.conf": filepath.Join(units, "vmdiskd.tmpfiles"),
		},
		Text: map[string]string{
			"/etc/vmdiskd/vmdiskd.toml":      serviceConfig,
			"/etc/modules-load.d/vsock.conf": "vsock_loopback\nvhost_vsock\n",
			// A machine that only emulates is slow: the watchdog of the unit has time.
			"/etc/systemd/system/vmdiskd.service.d/lab.conf": "[Service]\nRestartSec=100ms\n",
		},
	}
	for _, unit := range []string{"vmdiskd.service", "vmdiskd.socket", "vmdiskd-vsock.socket"} {
		s.Files["/usr/lib/systemd/system/"+unit] = filepath.Join(units, unit)
	}
	s.Steps = append([]Step{{Name: "users and folders", Script: `
systemd-sysusers
systemd-tmpfiles --create vmdiskd.conf
install -d -o vmdiskd -g vmdiskd /var/lib/vmdiskd
for name in disk guests; do
	head -c 32M /dev/urandom >/var/lib/vmdiskd/$name.img
	chown vmdiskd: /var/lib/vmdiskd/$name.img
done
restorecon -RF /var/lib/vmdiskd /run/vmdiskd
vmdiskd --config /etc/vmdiskd/vmdiskd.toml --check
`}}, steps...)
	return s
}

const (
	unixDisk  = "nbd+unix:///disk?socket=/run/vmdiskd/nbd.sock"
	vsockDisk = "nbd+vsock://2:10809/disk"
)

// transient runs vmdiskd without any unit of its own.
const transient = `
head -c 16M /dev/urandom >/run/one.img
systemd-run --unit=one --property=Type=notify vmdiskd -f -U /run/one.sock /run/one.img
nbdinfo 'nbd+unix:///?socket=/run/one.sock'
nbdcopy --connections=4 'nbd+unix:///?socket=/run/one.sock' /run/copy
cmp /run/one.img /run/copy
systemctl stop one
systemd-run --unit=two --property=Type=notify vmdiskd -f --vsock --vsock-local --vsock-trust-cid -p 10810 /run/one.img
[ "$(nbdinfo --size nbd+vsock://1:10810)" = 16777216 ]
head -c 16M /dev/urandom >/run/other
nbdcopy --flush /run/other nbd+vsock://1:10810
systemctl stop two
cmp /run/one.img /run/other
rm /run/one.img /run/copy /run/other
`

// activated starts the service by its first connection.
const activated = `
systemctl start vmdiskd.socket vmdiskd-vsock.socket
fails systemctl is-active vmdiskd.service
[ "$(nbdinfo --size '` + unixDisk + `')" = 33554432 ]
systemctl is-active vmdiskd.service
[ "$(nbdinfo --size ` + vsockDisk + `)" = 33554432 ]
nbdcopy --connections=4 ` + vsockDisk + ` /run/copy
cmp /run/copy /var/lib/vmdiskd/disk.img
nbdcopy --connections=4 '` + unixDisk + `' /run/copy
cmp /run/copy /var/lib/vmdiskd/disk.img
rm /run/copy
cat /proc/$(systemctl show --property=MainPID --value vmdiskd)/attr/current
`

// refused is what processes of the host meet that no grant names: another
// disk does not exist for them, and a server that has nothing for them does
// not greet them.
const refused = `
for who in 0 65534; do
	fails setpriv --reuid=$who --clear-groups nbdinfo --size nbd+vsock://2:10809/guests >/run/said 2>&1
	grep "no export named 'guests'" /run/said
done
truncate -s 1M /run/three.img
systemd-run --unit=three --property=Type=notify vmdiskd -f --verbose --vsock --readonly -p 10811 /run/three.img
for cid in 1 2; do
	for who in 0 65534; do
		fails setpriv --reuid=$who --clear-groups nbdinfo --size nbd+vsock://$cid:10811 >/run/said 2>&1
		cat /run/said
		fails grep "export named" /run/said
	done
done
systemctl stop three
[ $(journalctl --unit=three | grep -c 'no export is for this peer') = 4 ]
`

// restarted stops and starts the service while clients come and go. Those in
// the middle of a conversation may lose it; nobody finds a closed door.
const restarted = `
touch /run/load
load() {
	while [ -e /run/load ]; do
		if nbdcopy --connections=2 "$1" null: 2>/run/said; then echo copied; else cat /run/said; fi
	done >>/run/log.$2
}
load '` + unixDisk + `' unix &
load ` + vsockDisk + ` vsock &
for round in 1 2 3; do
	systemctl restart vmdiskd
	size=
	for try in 1 2 3 4 5; do
		[ -n "$size" ] || size=$(nbdinfo --size '` + unixDisk + `') || true
	done
	[ "$size" = 33554432 ]
done
rm /run/load
wait
sort /run/log.unix | uniq -c
sort /run/log.vsock | uniq -c
grep copied /run/log.unix
grep copied /run/log.vsock
fails grep -i -e refused -e 'no such file' /run/log.unix /run/log.vsock
`

// watched is a worker that no longer answers.
const watched = `
mkdir -p /run/systemd/system/vmdiskd.service.d
printf '[Service]\nWatchdogSec=5s\n' >/run/systemd/system/vmdiskd.service.d/watchdog.conf
systemctl daemon-reload
systemctl restart vmdiskd
pid() { systemctl show --property=MainPID --value vmdiskd; }
old=$(pid)
kill -STOP $old
another() { [ "$(pid)" != $old ]; }
await another
await systemctl is-active vmdiskd
journalctl --unit=vmdiskd | grep -i 'watchdog timeout'
[ "$(nbdinfo --size '` + unixDisk + `')" = 33554432 ]
`

// TestServiceOfThePackagesInAGuest: units, sockets, users and watchdog of the
// packages, on a real systemd with SELinux enforcing; and before them, in the same
// boot, what every scenario relies on.
func TestServiceOfThePackagesInAGuest(t *testing.T) {
	t.Parallel()
	s := service(true,
		Step{Name: "transient units serve Unix and vsock", Script: transient},
		Step{Name: "sockets start the service", Script: activated},
		Step{Name: "processes of the host are no guests", Script: refused},
		Step{Name: "restart refuses no connection", Script: restarted, Seconds: 240},
		Step{Name: "watchdog replaces a worker that hangs", Script: watched, Seconds: 240},
	)
	maps.Copy(s.Text, helloUnit)
	s.Links = helloLink
	s.Steps = append(slices.Clone(promised), s.Steps...)
	r := Run(t, s)
	if !strings.Contains(r.Outputs["context"], ":unconfined_t:") {
		t.Errorf("steps run as %q", r.Outputs["context"])
	}
}

package lab

import "testing"

// lackingConfig is a service whose state can be looked at.
const lackingConfig = `
[control]
socket = "/run/vmdiskd/control.sock"
[images]
roots = ["/srv"]
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/s.sock"
[[export]]
name = "d"
image = "/srv/d.img"
`

// asUnit are functions of the shell: start runs vmdiskd with a mode and options
// as a unit by the name of the mode, with the properties in $unit; said shows
// what the last one by that name has said; serves reads its disk.
const asUnit = `
start() {
	mode=$1
	shift
	systemctl stop $mode 2>/run/null || true
	systemctl reset-failed $mode 2>/run/null || true
	systemd-run --unit=$mode -p Type=notify -p User=nobody $unit /usr/sbin/vmdiskd --confine=$mode "$@"
}
said() { journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID $1); }
serves() { [ "$(nbdinfo --size 'nbd+unix:///d?socket=/run/vmdiskd/s.sock')" = 1048576 ]; }
service='--config /etc/vmdiskd/vmdiskd.toml'
`

// TestWhatAMachineLacksIsSaid is CF-11 and CF-12 on a kernel without Landlock
// and SELinux, whose rings and system call filters are taken away too: strict
// does not start, auto says what it goes on without, and what was asked for by
// name is refused.
func TestWhatAMachineLacksIsSaid(t *testing.T) {
	t.Parallel()
	Run(t, Scenario{
		Kernel: NewKernel, // the first with kernel.io_uring_disabled
		Append: "lsm=capability",
		Text:   map[string]string{"/etc/vmdiskd/vmdiskd.toml": lackingConfig},
		Steps: []Step{
			{Name: "the kernel lacks them", Script: `
install -d -o nobody /run/vmdiskd
truncate -s 1M /srv/d.img
chown nobody /srv/d.img
fails grep -E 'landlock|selinux' /sys/kernel/security/lsm`},
			{Name: "strict does not start without Landlock", Script: asUnit + `
fails start strict $service
said strict | grep 'landlock is off: the kernel does not offer it.*--confine=strict refuses that'
[ ! -e /run/vmdiskd/s.sock ]`},
			{Name: "auto goes on and says so", Script: asUnit + `
start auto $service
said auto | grep 'not confined as it could be.*control=landlock state=off'
vmdiskctl status >/run/status
grep 'landlock: off, the kernel does not offer it' /run/status
grep 'selinux: off, SELinux is not enabled' /run/status
grep 'seccomp: enforced' /run/status
grep 'engine: uring' /run/status
serves`},
			{Name: "labels that were asked for are not left out", Script: asUnit + `
fails start auto -U /run/vmdiskd/x.sock --selinux-label=system_u:object_r:vmdiskd_t:s0 /srv/d.img
said auto | grep 'x.sock.*SELinux is not enabled'
[ ! -e /run/vmdiskd/x.sock ]`},
			{Name: "without rings there are threads", Script: asUnit + `
echo 2 >/proc/sys/kernel/io_uring_disabled
start auto $service
said auto | grep 'engine is pool.*kernel.io_uring_disabled is 2'
serves
fails start auto --engine=uring -U /run/vmdiskd/x.sock /srv/d.img
said auto | grep 'io_uring_setup: operation not permitted'`},
			{Name: "without filters too it says both", Script: asUnit + `
unit='-p SystemCallFilter=~seccomp -p SystemCallErrorNumber=EPERM'
start auto $service
said auto | grep 'control=landlock state=off'
said auto | grep 'control=seccomp state=off'
vmdiskctl status | grep 'seccomp: off'
serves
systemctl stop auto`},
		},
	})
}

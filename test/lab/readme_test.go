package lab

import (
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/guest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// hypervisor is what README.md expects on a host with libvirt and SELinux.
var hypervisor = []string{
	"libvirt-clients", "libvirt-daemon-driver-qemu", "libvirt-daemon-system", "make", "qemu-system-x86", "selinux-policy-dev",
}

// machineOf is a function of the shell: the categories of the machine vm1, as
// its QEMU runs with them.
const machineOf = `
console=/var/log/libvirt/qemu/console
context() { tr -d '\0' </proc/$(cat /run/libvirt/qemu/vm1.pid)/attr/current; }
level() { context | cut -d: -f4-; }
socket() { ls /run/vmdiskd/*.sock | grep -v control.sock; }
`

// TestPackageToGuestOfTheReadme runs what README.md prints, in the folder of the
// package, on a hypervisor with libvirt whose SELinux refuses. No domain is
// permissive. Then it looks at what has become of it.
func TestPackageToGuestOfTheReadme(t *testing.T) {
	t.Parallel()
	Require(t)
	dir := testenv.TempDir(t)
	if err := guest.WriteWatcher(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	deb := debPackage(t)
	files := map[string]string{
		"/root/" + filepath.Base(deb):    deb,
		"/root/vm1.xml":                  "testdata/vm1.xml",
		"/var/lib/libvirt/images/kernel": testenv.CloudKernel(t, DefaultKernel).Image,
		"/var/lib/libvirt/images/initrd": filepath.Join(dir, "initrd"),
	}
	printed := func(name string) Step {
		return Step{Name: "README " + name, Script: "cd /root\n" + testenv.Printed(t, name), Seconds: 600}
	}
	Run(t, Scenario{
		Enforcing: true, MemoryMiB: 1024,
		Packages: hypervisor,
		Policy:   []string{"testdata/clients.cil", filepath.Join(testenv.Root(), "packaging/examples/debian-libvirt.cil")},
		Files:    files,
		Steps: []Step{
			{Name: "host is without it", Script: `
rm /usr/sbin/vmdiskd /usr/bin/vmdiskctl
truncate -s 16M /root/disk.img`},
			printed("install"),
			printed("policy"),
			{Name: "machine runs", Seconds: 600, Script: machineOf + `
modprobe kvm_amd
virsh define /root/vm1.xml
virsh start vm1
await grep 'guest: ready' $console
context | grep '^system_u:system_r:svirt_t:s0:c[0-9]*,c[0-9]*$'`},
			printed("disk"),
			{Name: "guest reads and writes it", Seconds: 600, Script: machineOf + `
await grep 'a disk appears' $console
await grep '2 rounds written and read back' $console
fails grep ERROR $console
grep -a 'This line was written by the guest' /var/lib/vmdiskd/images/vm1.img
virsh suspend vm1 # it would take all time of the processor`},
			{Name: "socket is labelled for the machine", Script: machineOf + `
[ "$(getenforce)" = Enforcing ]
ls -lZ $(socket)
[ "$(stat -c '%U %G %a %C' $(socket))" = "vmdiskd kvm 660 system_u:object_r:svirt_image_t:$(level)" ]
ss -xlz | grep "$(socket) .*sock_ctx=system_u:system_r:vmdiskd_t:$(level))"`},
			{Name: "service is confined", Script: `
pid=$(systemctl show -P MainPID vmdiskd)
for task in /proc/$pid/task/*; do
	tr -d '\0' <$task/attr/current | grep -x system_u:system_r:vmdiskd_t:s0-s0:c0.c1023
	[ $(grep -cE '^(NoNewPrivs:	1|Seccomp:	2|Cap(Eff|Prm|Bnd):	0{16})$' $task/status) = 5 ]
	fails grep '^Uid:	0' $task/status
done
vmdiskctl status >/run/status
grep 'selinux: enforced' /run/status
fails grep -E ': (off|degraded)' /run/status`},
			{Name: "other machines are refused", Seconds: 600, Script: machineOf + `
as() { systemd-run --quiet --wait -p User=libvirt-qemu -p SELinuxContext=system_u:system_r:svirt_t:$1 /usr/bin/vmdiskctl info --list "nbd+unix:///?socket=$(socket)"; }
as $(level)
fails as s0:c1022,c1023
fails as s0
journalctl --boot --no-pager --grep "avc:  denied .*svirt_t:s0:c1022,c1023.*svirt_image_t:$(level).*tclass=sock_file"`},
			{Name: "disk goes without a trace", Seconds: 600, Script: machineOf + `
virsh resume vm1
vmdiskctl detach vm1 /var/lib/vmdiskd/images/vm1.img
await grep 'the disk is gone' $console
[ -z "$(socket)" ]
virsh destroy vm1`},
		},
	})
}

package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// debPackage builds the Debian package.
func debPackage(t *testing.T) string { return builtPackage(t, "0.1.0", "deb") }

// builtPackage builds the packages of a version and returns that of a kind.
func builtPackage(t *testing.T, version, kind string) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), filepath.Join(testenv.Root(), "scripts", "packages.sh"), dir)
	cmd.Env = append(os.Environ(), "VERSION="+version)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("packages.sh: %v\n%s", err, out)
	}
	list, err := filepath.Glob(filepath.Join(dir, "*."+kind))
	if err != nil || len(list) != 1 {
		t.Fatalf("packages %q, %v", list, err)
	}
	return list[0]
}

// packageConfig is what is added to the configuration of the package.
const packageConfig = `
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/own.sock"
mode = "0660"
owner = ":kvm"
[[export]]
name = "a"
image = "/var/lib/vmdiskd/images/a.img"
`

// instanceConfig is that of a machine of its own, with all that it has.
const instanceConfig = `
[control]
socket = "/run/vmdiskd/vm1/control.sock"
[images]
roots = ["/var/lib/vmdiskd/images"]
[[listener]]
uri = "systemd:nbd"
[[export]]
name = "b"
image = "/var/lib/vmdiskd/images/b.img"
`

// TestPackageFromInstallationToPurge does with the package what an operator
// does with it.
func TestPackageFromInstallationToPurge(t *testing.T) {
	t.Parallel()
	steps := packageSteps()
	for i := range steps {
		steps[i].Seconds = packageSeconds
	}
	space := filepath.Join(t.TempDir(), "swap")
	if err := makeHole(space, 64<<20); err != nil {
		t.Fatal(err)
	}
	Run(t, Scenario{
		Enforcing: true,
		Devices:   []string{"-drive", disk(space)}, // /dev/vdd
		Files:     map[string]string{"/root/vmdiskd.deb": debPackage(t)},
		Text:      map[string]string{"/root/more.toml": packageConfig, "/root/vm1.toml": instanceConfig},
		Steps:     steps,
	})
}

// packageSeconds bounds each step: a machine that has other work takes minutes
// for what else takes seconds.
const packageSeconds = 300

// packageSteps are those of TestPackageFromInstallationToPurge.
func packageSteps() []Step {
	const own, vm = "nbd+unix:///a?socket=/run/vmdiskd/own.sock", "nbd+unix:///b?socket=/run/vmdiskd/vm1.sock"
	const made, handed = "nbd+unix:///c?socket=/run/vmdiskd/c.sock", "nbd+unix:///d?socket=/run/vmdiskd/own.sock"
	size := func(uri string) string { return `[ "$(timeout 40 nbdinfo --size '` + uri + `')" = 67108864 ]; ` }
	return []Step{
		{Name: "install", Script: `
				find / -xdev -name '*vmdiskd*' >/root/before
				dpkg -i /root/vmdiskd.deb
				id vmdiskd | grep '(kvm)'
				[ "$(stat -c '%U %G %a' /run/vmdiskd)" = 'vmdiskd kvm 2711' ]
				[ "$(stat -c '%U %a' /var/lib/vmdiskd/images)" = 'vmdiskd 750' ]
				fails systemctl is-enabled vmdiskd.service vmdiskd.socket`},
		{Name: "serve", Script: `
				for x in a b; do
					truncate -s 64M /var/lib/vmdiskd/images/$x.img
					chown vmdiskd: /var/lib/vmdiskd/images/$x.img
				done
				cat /root/more.toml >>/etc/vmdiskd/vmdiskd.toml
				vmdiskd --config /etc/vmdiskd/vmdiskd.toml --check
				systemctl enable --now vmdiskd.service || { journalctl --no-pager -u vmdiskd; exit 1; }
				[ "$(stat -c '%U %G %a' /run/vmdiskd/own.sock)" = 'vmdiskd kvm 660' ]; ` + size(own)},
		{Name: "confined", Script: `
				pid=$(systemctl show -P MainPID vmdiskd)
				cat /proc/$pid/task/*/status >/root/status
				tasks=$(grep -c '^Tgid:' /root/status)
				[ $(grep -cE '^(NoNewPrivs:	1|Seccomp:	2|Cap(Eff|Prm|Bnd):	0{16})$' /root/status) = $((tasks * 5)) ]
				fails grep '^Uid:	0' /root/status
				vmdiskctl status`},
		{Name: "exports made while it runs", Script: `
				truncate -s 64M /var/lib/vmdiskd/images/c.img /root/d.img
				chown vmdiskd: /var/lib/vmdiskd/images/c.img
				chmod 600 /root/d.img
				vmdiskctl export add c /var/lib/vmdiskd/images/c.img --persist --listen 'nbd+unix:///?socket=/run/vmdiskd/c.sock'
				vmdiskctl export add d /root/d.img --fd
				[ "$(stat -c '%U %G %a' /run/vmdiskd/c.sock)" = 'vmdiskd kvm 600' ]
				` + size(made) + size(handed)},
		{Name: "no client is refused while it starts again", Script: `
				mkdir -p /run/systemd/system/vmdiskd.service.d
				printf '[Service]\nExecStartPre=/bin/sleep 3\n' >/run/systemd/system/vmdiskd.service.d/slow.conf
				systemctl daemon-reload
				for i in 1 2; do
					old=$(systemctl show -P MainPID vmdiskd)
					systemctl restart --no-block vmdiskd.service
					while [ "$(systemctl show -P MainPID vmdiskd)" = "$old" ]; do sleep 0.5; done
					[ "$(systemctl is-active vmdiskd)" = activating ]
					` + size(own) + size(made) + `
					systemctl is-active vmdiskd
				done
				rm -r /run/systemd/system/vmdiskd.service.d; systemctl daemon-reload
				journalctl --no-pager -u vmdiskd | grep -c serving`},
		{Name: "the clock is set while a disk is in use", Script: `
				modprobe nbd
				nbd-client -unix /run/vmdiskd/own.sock -N a /dev/nbd0
				client=$(vmdiskctl clients --json | grep -o '"id": *[0-9]*')
				for step in '+1 hour' '-2 hours' '+1 hour'; do
					date -s "$step"
					dd if=/dev/nbd0 of=/dev/null bs=1M count=2 iflag=direct
				done
				[ "$(vmdiskctl clients --json | grep -o '"id": *[0-9]*')" = "$client" ]
				nbd-client -d /dev/nbd0`},
		{Name: "reload", Script: `
				systemctl reload vmdiskd.service
				systemctl is-active vmdiskd.service; ` + size(own)},
		{Name: "upgrade", Script: "dpkg -i /root/vmdiskd.deb; systemctl is-active vmdiskd.service; " + size(own)},
		{Name: "an instance for one machine", Script: `
				cp /root/vm1.toml /etc/vmdiskd/vm/vm1.toml
				systemctl enable --now vmdiskd@vm1.socket
				` + size(vm) + `
				vmdiskctl status --socket /run/vmdiskd/vm1/control.sock`},
		{Name: "swap space", Script: `
				echo 16384 >/proc/sys/vm/min_free_kbytes
				echo IMAGE=/dev/vdd >/etc/vmdiskd/swap/s1.conf
				systemctl start vmdiskd-swap@s1.service || { journalctl --no-pager -u vmdiskd-swap@s1; exit 1; }
				[ "$(nbdinfo --size 'nbd+unix:///?socket=/run/vmdiskd-swap/s1.sock')" = 67108864 ]
				pid=$(systemctl show -P MainPID vmdiskd-swap@s1)
				[ "$(cat /proc/$pid/oom_score_adj)" = -1000 ]
				grep -x 'CapEff:	0000000000000000' /proc/$pid/status
				systemctl stop vmdiskd-swap@s1.service
				rm /etc/vmdiskd/swap/s1.conf`},
		{Name: "remove and purge", Script: `
				dpkg -r vmdiskd
				fails systemctl is-active vmdiskd.service vmdiskd.socket vmdiskd@vm1.service
				fails ls /etc/systemd/system/*.wants/vmdiskd*
				[ -e /etc/vmdiskd/vmdiskd.toml ]
				[ -e /var/lib/vmdiskd/images/a.img ]
				rm /var/lib/vmdiskd/images/* /etc/vmdiskd/vm/vm1.toml
				ls /var/lib/vmdiskd/exports/c.json
				mkdir /var/lib/vmdiskd/vm/vm2 /root/volume
				mount --bind /root/volume /var/lib/vmdiskd/vm/vm2
				touch /var/lib/vmdiskd/vm/vm1/disk.img /root/volume/x.json
				dpkg --purge vmdiskd
				fails ls /var/lib/vmdiskd/exports
				rm /var/lib/vmdiskd/vm/vm1/disk.img /root/volume/x.json # both are there
				umount /var/lib/vmdiskd/vm/vm2
				rmdir /var/lib/vmdiskd/vm/* /var/lib/vmdiskd/vm /var/lib/vmdiskd
				getent passwd vmdiskd; getent group vmdiskd # who owns images elsewhere
				find / -xdev -name '*vmdiskd*' ! -path '/proc/*' ! -path '/lab/*' >/root/after
				fails grep -vxF -f /root/before /root/after`},
	}
}

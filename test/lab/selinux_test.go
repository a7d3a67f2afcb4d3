package lab

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// policy builds the policy module of the packages.
func policy(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := testenv.Command(ctx, testenv.Root(), "make", "-s", "selinux", "SELINUX_OUT="+dir)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "vmdiskd.pp")
}

// labelled is the configuration of a service with a socket for the machine
// whose categories are c1 and c2, one for any machine and one without labels.
const labelled = `
[control]
socket = "/run/vmdiskd/control.sock"
[images]
roots = ["/var/lib/libvirt/images", "/var/lib/vmdiskd/images"]

[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/one.sock"
mode = "0666"
selinux-label = "system_u:system_r:vmdiskd_t:s0:c1,c2"
selinux-path-label = "system_u:object_r:svirt_image_t:s0:c2,c1"
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/path.sock"
mode = "0666"
selinux-label = "system_u:system_r:vmdiskd_t:s0:c1,c2"
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/any.sock"
mode = "0666"
selinux-label = "system_u:system_r:vmdiskd_t:s0"
[[listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/none.sock"
mode = "0666"
[[listener]]
uri = "nbd+vsock://1:10809"

[[export]]
name = "all"
image = "/var/lib/libvirt/images/a.img"
[[export]]
name = "level"
image = "/var/lib/vmdiskd/images/b.img"
grant = [{ access = "rw", selinux-type = ["svirt_t"], selinux-level = "s0:c1,c2" }]
[[export]]
name = "label"
image = "/var/lib/vmdiskd/images/c.img"
grant = [{ access = "ro", label = "system_u:system_r:svirt_t:s0:c2,c1" }]
`

// asMachine is a function of the shell: a client of a socket and an export, as
// a machine with the level connects.
const asMachine = `
uri() { echo "nbd+unix:///$2?socket=/run/vmdiskd/$1.sock"; }
as() { systemd-run --quiet --wait -p SELinuxContext=system_u:system_r:svirt_t:$1 -p StandardOutput=null /usr/bin/vmdiskctl info "$(uri $2 $3)"; }
denied() { ! as "$@"; }
avc() { journalctl --boot --no-pager --grep "avc:  denied .*$1"; }
`

// TestLabelsUnderEnforcingSELinux is CF-05, CF-06, CF-07, AU-07 and AU-08 with
// the unit and the policy of the packages.
func TestLabelsUnderEnforcingSELinux(t *testing.T) {
	t.Parallel()
	root := testenv.Root()
	clients, err := filepath.Abs("testdata/clients.cil")
	if err != nil {
		t.Fatal(err)
	}
	r := Run(t, Scenario{
		Enforcing: true,
		Policy:    []string{policy(t), clients},
		Files: map[string]string{
			"/etc/systemd/system/vmdiskd.service": root + "/systemd/vmdiskd.service",
			"/usr/lib/sysusers.d/vmdiskd.conf":    root + "/systemd/vmdiskd.sysusers",
			"/usr/lib/tmpfiles.d/vmdiskd.conf":    root + "/systemd/vmdiskd.tmpfiles",
		},
		Text: map[string]string{
			"/etc/vmdiskd/vmdiskd.toml": labelled,
		},
		Steps: []Step{
			{Name: "prepare", Script: `
systemd-sysusers; systemd-tmpfiles --create vmdiskd.conf; modprobe vsock_loopback
mkdir -p /var/lib/libvirt/images /var/lib/vmdiskd/images
truncate -s 1M /var/lib/libvirt/images/a.img /var/lib/vmdiskd/images/b.img /var/lib/vmdiskd/images/c.img
chown -R vmdiskd:vmdiskd /var/lib/vmdiskd /var/lib/libvirt/images
restorecon -R /etc/vmdiskd /var/lib/libvirt /var/lib/vmdiskd /run/vmdiskd
ls -dZ /run/vmdiskd | grep vmdiskd_runtime_t`},
			{Name: "service starts in its domain", Seconds: 180, Script: `
systemctl start vmdiskd || { systemctl status --no-pager -l vmdiskd; exit 1; }
pid=$(systemctl show -P MainPID vmdiskd)
tr -d '\0' </proc/$pid/attr/current | grep -x system_u:system_r:vmdiskd_t:s0-s0:c0.c1023`},
			{Name: "CF-06 socket and path are labelled", Script: `
cd /run/vmdiskd; ls -Z
ls -Z one.sock | grep -x 'system_u:object_r:svirt_image_t:s0:c1,c2 one.sock'
ls -Z path.sock | grep -x 'system_u:object_r:vmdiskd_runtime_t:s0 path.sock'
ss -xlz | grep vmdiskd
ss -xlz | grep 'one.sock.*sock_ctx=system_u:system_r:vmdiskd_t:s0:c1,c2)'`},
			{Name: "CF-06 nothing else is labelled", Script: `
pid=$(systemctl show -P MainPID vmdiskd)
for task in /proc/$pid/task/*; do
	[ "$(cat $task/attr/sockcreate)" = "" ]
	[ "$(cat $task/attr/fscreate)" = "" ]
	tr -d '\0' <$task/attr/current | grep -x system_u:system_r:vmdiskd_t:s0-s0:c0.c1023
done
ss -xlz | grep 'none.sock.*sock_ctx=system_u:system_r:vmdiskd_t:s0-s0:c0.c1023)'
ss --vsock -lz | grep 'sock_ctx=system_u:system_r:vmdiskd_t:s0-s0:c0.c1023)'`},
			{Name: "CF-06 client sees the label of the socket", Script: `
perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0) && connect(S, pack_sockaddr_un("/run/vmdiskd/one.sock")) || die $!; print getsockopt(S, SOL_SOCKET, 31)' |
	grep -a '^system_u:system_r:vmdiskd_t:'`},
			{Name: "CF-07 machine with the categories connects", Seconds: 180, Script: asMachine + "as s0:c1,c2 one all"},
			{Name: "CF-07 others are denied by the path", Seconds: 180, Script: asMachine + `
denied s0:c1,c3 one all
denied s0 one all
avc 'write.*name="one.sock".*svirt_t:s0:c1,c3.*svirt_image_t:s0:c1,c2.*tclass=sock_file'`},
			{Name: "CF-07 others are denied by the socket", Seconds: 180, Script: asMachine + `
as s0:c1,c2 path all
denied s0:c1,c3 path all
avc 'connectto.*svirt_t:s0:c1,c3.*vmdiskd_t:s0:c1,c2.*tclass=unix_stream_socket'`},
			{Name: "socket without a label is for no machine", Seconds: 180, Script: asMachine + `
denied s0:c1,c2 none all
avc 'connectto.*svirt_t:s0:c1,c2.*vmdiskd_t:s0-s0:c0.c1023'`},
			{Name: "AU-08 grants want the very categories", Seconds: 300, Script: asMachine + `
as s0:c1,c2 any level
as s0:c2,c1 any label
as s0 any all
for other in s0 s0:c1 s0:c1.c3 s0-s0:c1,c2; do
	denied $other any level
	denied $other any label
done`},
			{Name: "AU-08 grants want the type", Script: `
nbdinfo --size "nbd+unix:///all?socket=/run/vmdiskd/any.sock"
fails nbdinfo --size "nbd+unix:///level?socket=/run/vmdiskd/any.sock"`},
			{Name: "AU-07 peer without a label is denied", Seconds: 180, Script: `
nbdinfo --size nbd+vsock://1:10809/all
fails nbdinfo --size nbd+vsock://1:10809/level`},
			{Name: "CID alone reads what others write", Seconds: 180, Script: `
nbdinfo --json nbd+vsock://1:10809/all | grep '"is_read_only": true'
nbdinfo --json 'nbd+unix:///all?socket=/run/vmdiskd/any.sock' | grep '"is_read_only": false'
truncate -s 1M /tmp/zeroes
fails nbdcopy /tmp/zeroes nbd+vsock://1:10809/all
vmdiskctl export set all vsock-trust-cid=true
nbdcopy /tmp/zeroes nbd+vsock://1:10809/all
vmdiskctl export set all vsock-trust-cid=false
nbdinfo --json nbd+vsock://1:10809/all | grep '"is_read_only": true'
journalctl --boot --no-pager -u vmdiskd --grep 'read-only over vsock.*export=all'`},
			{Name: "worker labels what comes later", Seconds: 180, Script: asMachine + `
cat >>/etc/vmdiskd/vmdiskd.toml <<end
[[export.listener]]
uri = "nbd+unix:///?socket=/run/vmdiskd/later.sock"
mode = "0666"
selinux-label = "system_u:system_r:vmdiskd_t:s0:c5"
selinux-path-label = "system_u:object_r:svirt_image_t:s0:c5"
end
systemctl reload vmdiskd || { journalctl --no-pager -b -u vmdiskd; exit 1; }
until [ -S /run/vmdiskd/later.sock ]; do sleep 0.2; done
ls -Z /run/vmdiskd/later.sock | grep svirt_image_t:s0:c5
ss -xlz | grep 'later.sock.*sock_ctx=system_u:system_r:vmdiskd_t:s0:c5)'
pid=$(systemctl show -P MainPID vmdiskd)
[ -z "$(cat /proc/$pid/task/*/attr/sockcreate /proc/$pid/task/*/attr/fscreate)" ]`},
			{Name: "worker labels what vmdiskctl asks for", Seconds: 240, Script: asMachine + `
truncate -s 1M /var/lib/vmdiskd/images/d.img
chown vmdiskd: /var/lib/vmdiskd/images/d.img
add() {
	vmdiskctl export add added /var/lib/vmdiskd/images/d.img --listen 'nbd+unix:///?socket=/run/vmdiskd/added.sock' \
		--socket-mode=0666 --grant=rw,selinux-type=svirt_t,selinux-level=s0:c6,c8 --selinux-path-label=system_u:object_r:svirt_image_t:s0:c6,c8 "$@"
}
fails add --selinux-label=system_u:system_r:no_such_t:s0
[ ! -e /run/vmdiskd/added.sock ]
add --selinux-label=system_u:system_r:vmdiskd_t:s0:c6,c8
ls -Z /run/vmdiskd/added.sock | grep svirt_image_t:s0:c6,c8
ss -xlz | grep 'added.sock.*sock_ctx=system_u:system_r:vmdiskd_t:s0:c6,c8)'
as s0:c6,c8 added added
denied s0:c6,c9 added added
vmdiskctl export remove added`},
			{Name: "CF-05 unknown type is named", Script: `
truncate -s 1M /tmp/d
for option in --selinux-label --selinux-path-label; do
	code=0
	vmdiskd -U /tmp/s $option=system_u:object_r:no_such_t:s0 /tmp/d 2>/tmp/err || code=$?
	cat /tmp/err
	[ $code = 1 ]
	grep 'not valid in the loaded SELinux policy: "system_u:object_r:no_such_t:s0"' /tmp/err
	[ ! -e /tmp/s ]
done`},
			{Name: "command line labels too", Script: `
vmdiskd -U /tmp/s --selinux-label=unconfined_u:unconfined_r:unconfined_t:s0:c7 --selinux-path-label=system_u:object_r:svirt_image_t:s0:c7,c9 \
	--run 'ls -Z /tmp/s; ss -xlz | grep /tmp/s; ls -Z /tmp/s | grep svirt_image_t:s0:c7,c9; ss -xlz | grep "/tmp/s.*unconfined_t:s0:c7)"' /tmp/d`},
			{Name: "instance is held to its machine", Seconds: 180, Script: asMachine + `
cd /var/lib/libvirt/images
truncate -s 1M own.img other.img
chown vmdiskd: own.img other.img
chcon -t svirt_image_t -l s0:c1,c2 own.img
chcon -t svirt_image_t -l s0:c1,c3 other.img
instance() {
	systemd-run --unit=$1 -p Type=notify -p User=vmdiskd -p NoNewPrivileges=yes -p SELinuxContext=system_u:system_r:vmdiskd_t:s0:c1,c2 \
		/usr/sbin/vmdiskd -U /run/vmdiskd/$1.sock --unix-mode=0666 /var/lib/libvirt/images/$1.img
}
instance own
tr -d '\0' </proc/$(systemctl show -P MainPID own)/attr/current | grep -x system_u:system_r:vmdiskd_t:s0:c1,c2
as s0:c1,c2 own ''
denied s0:c1,c3 own ''
fails instance other
avc 'vmdiskd_t:s0:c1,c2 .*svirt_image_t:s0:c1,c3'`},
			{Name: "CF-11 permissive is told", Seconds: 180, Script: `
setenforce 0
systemctl restart vmdiskd
vmdiskctl status | grep 'selinux: degraded, SELinux is permissive'
journalctl --no-pager -u vmdiskd --grep 'labelled for nothing'
setenforce 1
systemctl restart vmdiskd
vmdiskctl status | grep 'selinux: enforced'`},
			{Name: "it may not do more", Script: `
cat /sys/fs/selinux/policy >/lab/out/policy
systemctl stop vmdiskd
fails journalctl --boot --quiet --no-pager -u vmdiskd --grep 'panic|level=ERROR'`},
		},
	})
	checkPolicy(t, r.Outputs["policy"])
	for _, d := range r.Denials() {
		if strings.Contains(d, "scontext=system_u:system_r:vmdiskd_t:s0-s0:c0.c1023 ") {
			t.Errorf("the service was denied: %s", d)
		}
	}
}

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/transport/psk"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// deviceStart is how scenarios of kernel devices begin: the server listens on
// a Unix socket and on vsock.
const deviceStart = startServer + `
await() { i=0; until eval "$1"; do sleep 0.1; i=$((i+1)); [ $i -lt 600 ] || { echo "in vain: $1"; return 1; }; done; }
await '[ -S /run/disk.sock ]'
unix='nbd+unix:///?socket=/run/disk.sock'
fails() { want=$1; shift; rc=0; "$@" >/run/out 2>&1 || rc=$?; cat /run/out; [ $rc = $want ]; }
`

// deviceScenario: a device with four connections holds a file system, and is
// taken away when nobody uses it, and not before.
const deviceScenario = deviceStart + `
[ "$(vmdiskctl device list --json)" = "[]" ]
[ "$(vmdiskctl device attach "$unix" /dev/nbd3 --connections 4)" = /dev/nbd3 ]
vmdiskctl device list
vmdiskctl device list | grep -q "/dev/nbd3  *256M  *512  rw .*nbd+unix:///?socket=/run/disk.sock"
fails 1 vmdiskctl device attach "$unix" nbd3
grep -q "in use" /run/out
/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd3
mount -t ext4 /dev/nbd3 /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=40 2>/dev/null
sync
md5sum /mnt/file >/run/sum
echo 3 >/proc/sys/vm/drop_caches
md5sum -c /run/sum
before=$(stat -c %b $IMAGE)
rm /mnt/file
sync
fstrim -v /mnt
[ $((before - $(stat -c %b $IMAGE))) -gt 70000 ]
dd if=/dev/urandom of=/mnt/second bs=64k count=100 oflag=direct 2>/dev/null
fails 1 vmdiskctl device detach /dev/nbd3
grep -q "mounted" /run/out
umount /mnt
echo written late | dd of=/dev/nbd3 bs=512 seek=524287 count=1 conv=sync,notrunc 2>/dev/null
vmdiskctl device detach /dev/nbd3
[ "$(tail -c 512 $IMAGE | head -n 1)" = "written late" ]
fails 1 vmdiskctl device detach /dev/nbd3
grep -q "not attached" /run/out
[ "$(vmdiskctl device list --json)" = "[]" ]
/usr/sbin/e2fsck -fn $IMAGE
dev=$(vmdiskctl device attach "$unix" --readonly --block-size 4096)
[ "$(cat /sys/block/${dev#/dev/}/ro)" = 1 ]
[ "$(cat /sys/block/${dev#/dev/}/queue/logical_block_size)" = 4096 ]
vmdiskctl device detach $dev
if dmesg | grep -iE 'nbd.*(error|timed out|dead)'; then exit 9; fi
`

// onlyVmdiskd skips what nbdkit has no part in.
func onlyVmdiskd(t *testing.T) {
	t.Helper()
	if k := testenv.Under(t); k.Program != "" {
		t.Skipf("is about vmdiskd, not %s", k.Name)
	}
}

func bootDevice(t *testing.T, k testenv.Kernel, scenario, options string, modules ...string) {
	t.Helper()
	onlyVmdiskd(t)
	in := inGuest(t, k, scenario, options, append([]string{"nbd", "ext4"}, modules...), []string{"mke2fs", "e2fsck"})
	if console := mustBoot(t, in, 768); testing.Verbose() {
		t.Log(console)
	}
}

func TestDeviceHoldsAFileSystemWithFourConnections(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, deviceScenario, "-f -U /run/disk.sock")
	})
}

// serviceStart begins scenarios about a service that comes and goes: its
// exports are reached over a Unix socket and over vsock. Timeouts are short: a
// request that was in flight when the service went away takes as long.
const serviceStart = `
await() { i=0; until eval "$1"; do sleep 0.1; i=$((i+1)); [ $i -lt 200 ] || { echo "in vain: $1"; return 1; }; done; }
fails() { want=$1; shift; rc=0; "$@" >/run/out 2>&1 || rc=$?; cat /run/out; [ $rc = $want ]; }
mkdir -p /run/d/state
truncate -s 64M /run/d/disk.img
cat >/run/conf <<END
[control]
socket = "/run/d/control"
state = "/run/d/state"
[images]
roots = ["/run/d"]
[[listener]]
uri = "nbd+unix:///?socket=/run/d/nbd"
[[listener]]
uri = "nbd+vsock://1:10809"
[[export]]
name = "disk0"
image = "/run/d/disk.img"
vsock-trust-cid = true
[[export.grant]]
access = "rw"
cid = [1]
[[export.grant]]
access = "rw"
uid = [0]
END
export VMDISKD_SOCKET=/run/d/control
serve() {
	vmdiskd --config /run/conf >>/run/server.log 2>&1 &
	server=$!
	await 'kill -0 $server && [ -S /run/d/control ] && vmdiskctl status >/dev/null 2>&1'
}
# bounce: the service dies without a word and is back after a moment.
bounce() {
	kill -9 $server
	wait $server || :
	sleep 1
	serve
}
# writer: files are written and read back past the page cache until told to
# stop. It ends well if no request has failed.
writer() {
	n=0
	rm -f /run/stop
	while [ ! -e /run/stop ]; do
		dd if=/dev/urandom of=/run/data bs=64k count=4 2>/dev/null
		dd if=/run/data of=/mnt/w bs=64k oflag=direct conv=fsync 2>/run/dd || { cat /run/dd; return 1; }
		dd if=/mnt/w of=/run/back bs=64k iflag=direct 2>/run/dd || { cat /run/dd; return 1; }
		cmp /run/data /run/back || return 1
		n=$((n+1))
		echo $n >/run/rounds
	done
}
rounds() { cat /run/rounds 2>/dev/null || echo 0; }
more() { now=$(rounds); await '[ $(rounds) -gt $((now+2)) ]'; }
trap 'rc=$?; [ $rc = 0 ] || { tail -n 20 /run/server.log; dmesg | tail -n 30; ps | grep vmdisk; }' EXIT
[ ! -e /proc/sys/kernel/hung_task_timeout_secs ] || echo 20 >/proc/sys/kernel/hung_task_timeout_secs
serve
`

// kept attaches URI with options and checks what a keeper does: the device
// stays usable while its service dies and comes back, without an error.
const kept = `
kept() {
	uri=$1
	shift
	rm -f /run/rounds
	[ "$(vmdiskctl device attach "$uri" /dev/nbd0 --timeout 2s --poll 200ms "$@")" = /dev/nbd0 ]
	vmdiskctl device list
	holder=$(cat /sys/block/nbd0/pid)
	/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd0
	mount -t ext4 /dev/nbd0 /mnt
	writer &
	writer=$!
	more
	bounce
	more
}
# left: the process that keeps the device refuses to leave while it is mounted,
# and takes it away when not.
left() {
	touch /run/stop
	wait $writer
	echo "rounds: $(rounds)"
	kill -TERM $holder
	sleep 1
	kill -0 $holder
	[ -e /sys/block/nbd0/pid ]
	umount /mnt
	/usr/sbin/e2fsck -fn /dev/nbd0
	kill -TERM $holder
	await '[ ! -e /sys/block/nbd0/pid ]'
	await '! kill -0 $holder 2>/dev/null'
}
`

// keepScenario: the driver's own connection to a Unix socket is replaced, and
// so are the relays of two over vsock, which the driver does not take. The
// device grows with its export.
const keepScenario = serviceStart + kept + `
kept 'nbd+unix:///disk0?socket=/run/d/nbd' --persist
left
kept nbd+vsock://1:10809/disk0 --connections 2
bounce
more
vmdiskctl export resize disk0 +64M
await '[ $(cat /sys/block/nbd0/size) = 262144 ]'
more
left
vmdiskctl device attach 'nbd+unix:///disk0?socket=/run/d/nbd' /dev/nbd0 --swap --persist
holder=$(cat /sys/block/nbd0/pid)
grep VmLck /proc/$holder/status
[ "$(sed -n 's/^VmLck:[^0-9]*\([0-9]*\).*/\1/p' /proc/$holder/status)" -gt 1000 ]
bounce
dd if=/dev/nbd0 of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null
vmdiskctl device detach /dev/nbd0
await '! kill -0 $holder 2>/dev/null'
if dmesg | grep -E 'I/O error|blocked for more'; then exit 9; fi
dmesg | grep nbd0
`

func TestDeviceSurvivesItsServer(t *testing.T) {
	eachKernel(t, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, keepScenario, "", "vsock_loopback")
	})
}

// takenScenario: the process that keeps a device is killed under a writer, and
// the same command takes the device over: connections that the driver still
// has, and relays that died with their process.
const takenScenario = serviceStart + kept + `
takeover() {
	kill -9 $holder
	await '! kill -0 $holder 2>/dev/null'
	"$@"
	[ "$(vmdiskctl device attach "$uri" /dev/nbd0 --poll 200ms $options)" = /dev/nbd0 ]
	holder=$(pidof vmdiskctl)
	more
	fails 1 vmdiskctl device attach "$uri" /dev/nbd0 $options
	grep -q "in use: a process keeps it" /run/out
	bounce
	more
}
uri='nbd+unix:///disk0?socket=/run/d/nbd'
options=--persist
kept "$uri" $options
fails 1 vmdiskctl device attach "$uri" /dev/nbd0 --persist
grep -q "in use: a process keeps it" /run/out
takeover more
fails 1 vmdiskctl device attach 'nbd+unix:///other?socket=/run/d/nbd' /dev/nbd0 --persist
grep -q "not attached from" /run/out
takeover bounce
left
uri=nbd+vsock://1:10809/disk0
options="--connections 2"
kept "$uri" $options
takeover true
left
[ -z "$(ls /run/*.lock)" ]
if dmesg | grep -E 'I/O error|blocked for more'; then exit 9; fi
`

func TestDeviceIsTakenOverFromADeadProcess(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, takenScenario, "", "vsock_loopback")
	})
}

// defaultScenario: another export, of another size, becomes the one that opens
// without a name. The device's own is asked for by its name, also by who takes
// the device over, and with its token.
const defaultScenario = serviceStart + `
kill $server
wait $server || :
truncate -s 64M /run/d/a.img
truncate -s 128M /run/d/b.img
cat >/run/conf <<END
[control]
socket = "/run/d/control"
[images]
roots = ["/run/d"]
[[listener]]
uri = "nbd+unix:///?socket=/run/d/nbd"
[[export]]
name = "a"
image = "/run/d/a.img"
END
serve
token=$(printf %064d 7)
attach() { vmdiskctl device attach "nbd+unix:///%3F$token?socket=/run/d/nbd" /dev/nbd0 --persist --timeout 2s --poll 200ms; }
attach
/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
sed -i 's/^\[\[export\]\]/[[export]]\nname = "b"\nimage = "\/run\/d\/b.img"\n&/' /run/conf
bounce
vmdiskctl info --size 'nbd+unix:///?socket=/run/d/nbd' | grep 134217728
dd if=/dev/urandom of=/mnt/one bs=64k count=16 conv=fsync 2>/dev/null
holder=$(pidof vmdiskctl)
kill -9 $holder
await '! kill -0 $holder 2>/dev/null'
attach
bounce
dd if=/dev/urandom of=/mnt/two bs=64k count=16 conv=fsync 2>/dev/null
cat /sys/block/nbd0/backend
fails 1 grep $token /sys/block/nbd0/backend
tr '\0' ' ' </proc/$(pidof vmdiskctl)/cmdline >/run/cmdline
grep -- --foreground /run/cmdline
fails 1 grep $token /run/cmdline
[ $(stat -c %b /run/d/b.img) = 0 ]
[ $(cat /sys/block/nbd0/size) = 131072 ]
umount /mnt
/usr/sbin/e2fsck -fn /dev/nbd0
vmdiskctl device detach /dev/nbd0
/usr/sbin/e2fsck -fn /run/d/a.img
if dmesg | grep -E 'I/O error|blocked for more'; then exit 9; fi
`

func TestDeviceStaysWithItsExport(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) { bootDevice(t, k, defaultScenario, "", "vsock_loopback") })
}

// securedScenario: the driver takes no TLS, so relays speak it: with certificates
// over TCP, with a pre-shared key over vsock. The service dies under each, and
// comes back with another key.
const securedScenario = serviceStart + kept + `
ip link set lo up
truncate -s 64M /run/d/secret.img
kill $server
wait $server || :
cat >>/run/conf <<END
[[listener]]
uri = "nbds://127.0.0.1:10810"
[[listener]]
uri = "nbds+vsock://1:10811"
[tls]
certificates = "/pki"
psk = "/pki/keys.psk"
[[export]]
name = "secret"
image = "/run/d/secret.img"
require-tls = true
vsock-trust-cid = true
[[export.grant]]
access = "rw"
cert-name = ["client"]
[[export.grant]]
access = "rw"
psk = ["vm1"]
END
serve
fails 1 vmdiskctl device attach 'nbd+unix:///secret?socket=/run/d/nbd' /dev/nbd0
fails 1 vmdiskctl device attach 'nbds+vsock://vm1@1:10811/secret?tls-psk-file=/pki/wrong.psk' /dev/nbd0
for uri in 'nbds://127.0.0.1:10810/secret?tls-certificates=/pki' 'nbds+vsock://vm1@1:10811/secret?tls-psk-file=/pki/keys.psk'; do
	kept "$uri" --connections 2
	printf 'vm1:%064d\n' $((key += 1)) >/pki/keys.psk
	bounce
	more
	left
done
if dmesg | grep -E 'I/O error|blocked for more'; then exit 9; fi
`

func TestDeviceIsEncryptedToItsServer(t *testing.T) {
	onlyVmdiskd(t)
	requireGuest(t)
	if err := psk.Supported(); err != nil {
		t.Skipf("this build has no overlay of crypto/tls, make test has: %v", err)
	}
	in := inGuest(t, testenv.CloudKernel(t, stableKernel), securedScenario, "", []string{"nbd", "ext4", "vsock_loopback"}, []string{"mke2fs", "e2fsck"})
	pki := testenv.Certificates(t)
	for _, name := range []string{"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"} {
		b, err := os.ReadFile(filepath.Join(pki, name))
		if err != nil {
			t.Fatal(err)
		}
		in.addFile("pki/"+name, 0o600, b)
	}
	in.addFile("pki/keys.psk", 0o600, []byte("vm1:"+strings.Repeat("1a", 32)+"\n"))
	in.addFile("pki/wrong.psk", 0o600, []byte("vm1:"+strings.Repeat("3c", 32)+"\n"))
	if console := mustBoot(t, in, 768); testing.Verbose() {
		t.Log(console)
	}
}

// lostScenario: an export that is taken away under a mounted file system, and
// relays that are killed, mean errors after the grace, and no task that hangs.
const lostScenario = serviceStart + `
attach() { vmdiskctl device attach "$@" --timeout 1s --dead-conn-timeout 3s; }
attach 'nbd+unix:///disk0?socket=/run/d/nbd' /dev/nbd0 --persist --connections 4
holder=$(cat /sys/block/nbd0/pid)
/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=16 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
vmdiskctl export remove disk0 --force
fails 1 dd if=/mnt/file of=/dev/null bs=64k iflag=direct
grep -q "Input/output error" /run/out
fails 1 dd if=/run/conf of=/mnt/second bs=64k conv=fsync
umount /mnt || umount -l /mnt
fails 1 vmdiskctl device attach 'nbd+unix:///disk0?socket=/run/d/nbd' /dev/nbd1
vmdiskctl device detach --force /dev/nbd0
await '! kill -0 $holder 2>/dev/null'
vmdiskctl export add disk0 /run/d/disk.img
attach nbd+vsock://1:10809/disk0 /dev/nbd0
dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null
kill -9 $(cat /sys/block/nbd0/pid)
fails 1 dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct
grep -q "Input/output error" /run/out
vmdiskctl device detach --force /dev/nbd0
[ "$(vmdiskctl device list --json)" = "[]" ]
attach nbd+vsock://1:10809/disk0 /dev/nbd0
dd if=/dev/nbd0 of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null
vmdiskctl device detach /dev/nbd0
if dmesg | grep 'blocked for more'; then exit 9; fi
if ps -o stat,comm | grep '^D'; then exit 10; fi
`

func TestDeviceWithoutItsServerFailsInTime(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, lostScenario, "", "vsock_loopback")
	})
}

// silentScenario: nobody reads what the process says that keeps a device, while
// the service goes away and comes back under a writer; and a device whose name
// cannot be said is not left behind, nor is a process that would keep it.
const silentScenario = serviceStart + kept + `
mkfifo /run/pipe
exec 5<>/run/pipe 6>/run/pipe 5<&-
unix='nbd+unix:///disk0?socket=/run/d/nbd'
unsaid() {
	fails 1 "$@"
	[ "$(vmdiskctl device list --json)" = "[]" ]
	await '! pidof vmdiskctl'
}
unsaid sh -c 'exec vmdiskctl device attach "$0" >&6' "$unix"
unsaid sh -c 'exec vmdiskctl device attach "$0" --persist >&6' "$unix"
unsaid sh -c 'exec vmdiskctl device attach "$0" --persist >/dev/full' "$unix"
unsaid sh -c 'exec vmdiskctl device attach "$0" --persist --json --swap --swapon >/dev/full' "$unix"
for uri in "$unix" nbd+vsock://1:10809/disk0; do
	vmdiskctl device attach "$uri" /dev/nbd0 --foreground --timeout 2s >/run/name 2>&6 &
	holder=$!
	await '[ -s /run/name ]'
	/usr/sbin/mke2fs -q -F -t ext4 /dev/nbd0
	mount -t ext4 /dev/nbd0 /mnt
	rm -f /run/rounds
	writer &
	writer=$!
	more
	bounce
	more
	left
	rm /run/name
done
vmdiskctl device attach "$unix" /dev/nbd0
fails 1 sh -c 'exec vmdiskctl device attach "$0" /dev/nbd0 --persist >/dev/full' "$unix"
[ "$(vmdiskctl device list --json)" != "[]" ]
if dmesg | grep -E 'I/O error|blocked for more'; then exit 9; fi
`

func TestDeviceDoesNotNeedToBeHeard(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, silentScenario, "", "vsock_loopback")
	})
}

// swapOnScenario: a signal comes while swapon(8) is at work, which the kernel
// ends in its own time. The machine swaps to a device that is there, or to none.
const swapOnScenario = serviceStart + `
mkdir /run/bin
cat >/run/bin/swapon <<END
#!/bin/sh
/bin/swapon "\$@"
touch /run/on
until [ -e /run/go ]; do sleep 0.1; done
END
chmod +x /run/bin/swapon
for persist in "" --persist; do
	rm -f /run/on /run/go
	PATH=/run/bin:$PATH vmdiskctl device attach 'nbd+unix:///disk0?socket=/run/d/nbd' /dev/nbd0 --swap --swapon $persist &
	attach=$!
	await '[ -e /run/on ]'
	kill -TERM $attach
	touch /run/go
	rc=0
	wait $attach || rc=$?
	cat /proc/swaps
	vmdiskctl device list
	there=0
	if vmdiskctl device list | grep -q nbd0; then there=1; fi
	[ $(grep -c "^/dev/nbd0 " /proc/swaps) = $there ]
	[ $rc = $((1-there)) ]
	[ $there = 0 ] || vmdiskctl device detach /dev/nbd0
done
if dmesg | grep -E 'I/O error|Read-error|Write-error|blocked for more'; then exit 9; fi
`

func TestDeviceThatIsSwappedToStays(t *testing.T) {
	oneKernel(t, stableKernel, func(t *testing.T, k testenv.Kernel) {
		bootDevice(t, k, swapOnScenario, "", "vsock_loopback")
	})
}

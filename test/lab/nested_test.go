package lab

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmdiskd/vmdiskd/internal/limits"
	"github.com/vmdiskd/vmdiskd/test/guest"
	"github.com/vmdiskd/vmdiskd/test/testenv"
)

// nestedConfig gives a disk to the guest with CID 3, one to the machine that has
// leased its CID and shows tenantToken, and one to nobody that the test boots.
const nestedConfig = `
[control]
socket = "/run/control.sock"

[images]
roots = ["/run/images"]

[[listener]]
uri = "nbd+vsock://2:10809"

[[export]]
name = "disk"
image = "/run/images/disk.img"
format = "raw"
vsock-trust-cid = true

[[export.grant]]
access = "rw"
cid = [3]

[[export]]
name = "other"
image = "/run/images/other.img"
format = "raw"

[[export.grant]]
access = "ro"
cid = [4]

[[export]]
name = "leased"
image = "/run/images/leased.img"
format = "raw"

[[export.grant]]
access = "rw"
vm = ["tenant", "/run/qmp"]
token-sha256 = ["SUM"]
`

var tenantToken = strings.Repeat("7e", limits.TokenDigits/2)

// hostScenario runs in the outer guest, which is the host of the inner ones:
// the emulated processor has AMD's virtualization, so that they run on KVM.
const hostScenario = `
trap 'rc=$?; [ $rc = 0 ] || { cat /run/server.log /run/inner; dmesg | tail -n 20; }' EXIT
# What hangs is not seen to exit.
{ sleep 200; echo "still running:"; cat /run/server.log /run/inner; ps; } &
mkdir /run/images
dd if=/dev/urandom of=/run/images/disk.img bs=1M count=16 2>/dev/null
truncate -s 16M /run/images/other.img /run/images/leased.img
vmdiskd --verbose --config /vmdiskd.toml >/run/server.log 2>&1 &
server=$!
until vmdiskctl --socket /run/control.sock status >/dev/null 2>&1; do kill -0 $server; sleep 0.1; done

# Processes of this host are refused before the greeting, root or not.
for cid in 1 2; do
	for who in 0 65534; do
		/usr/bin/setpriv --reuid=$who --clear-groups /usr/bin/nbdinfo --size nbd+vsock://$cid:10809/disk 2>&1 && exit 2
	done
done
[ $(grep -c 'no export is for this peer' /run/server.log) = 2 ]

# start runs a guest with a CID and a part of the scenario.
start() {
	/usr/bin/qemu-system-x86_64 -L /usr/share/qemu -L /usr/share/seabios -accel kvm -cpu host -smp 1 -m 384 \
		-machine q35 -device vhost-vsock-pci,guest-cid=$1 -nodefaults -display none -serial stdio -no-reboot -qmp unix:/run/qmp,server=on,wait=off \
		-kernel /vmlinuz -initrd /inner.cpio -append "console=ttyS0 quiet panic=-1 mitigations=off lab=$2" </dev/null >/run/inner 2>&1 &
	qemu=$!
}
end() {
	wait $qemu
	sed 's/^/inner: /' /run/inner
	grep -q LAB-RC=0 /run/inner
}
# said waits for what the guest says on its console.
said() { until grep -q "$1" /run/inner; do kill -0 $qemu; sleep 0.2; done; }

md5sum </run/images/disk.img >/run/before
start 3 owner
end
grep -q "$(cut -d' ' -f1 /run/before)" /run/inner
[ "$(tail -c 512 /run/images/disk.img | head -n 1)" = "written by the guest" ]
[ "$(tail -c 1024 /run/images/disk.img | head -n 1)" = "written by its kernel" ]

# A lease lets the machine in, its end puts it out, and the end of the machine
# is the end of the lease, whether we say its CID and process or QEMU does.
lease() { vmdiskctl vm lease "$@" --socket /run/control.sock & holder=$!; }
start 6 tenant
lease tenant --cid 6 --pid $qemu
said "tenant: has the disk"
kill $holder
said "tenant: has lost the disk"
lease /run/qmp
said "tenant: has the disk again"
kill -9 $qemu
wait $holder || true
refused=$(grep -c 'no export is for this peer' /run/server.log)
start 6 stranger
end
[ $(grep -c 'no export is for this peer' /run/server.log) -gt $refused ]
kill $server
wait $server || [ $? = 143 ]
`

// innerScenario runs in a guest of the guest: as the one that the disk is for,
// as the one that has leased its CID, or as one that no disk is for.
const innerScenario = `
uri=nbd+vsock://2:10809/disk
case $(cat /proc/cmdline) in
*lab=owner*)
	[ "$(nbdinfo --size $uri)" = 16777216 ]
	nbdcopy --connections=4 $uri /run/copy
	md5sum </run/copy
	nbdinfo --list nbd+vsock://2:10809 >/run/list
	grep -q disk /run/list
	if grep -q other /run/list; then exit 3; fi
	if nbdinfo --size nbd+vsock://2:10809/other; then exit 4; fi
	echo "written by the guest" | dd of=/run/copy bs=512 seek=32767 conv=sync,notrunc 2>/dev/null
	nbdcopy --flush /run/copy $uri
	rm /run/copy
	# The guest's kernel takes no vsock socket: a process stays between.
	[ "$(vmdiskctl device attach $uri /dev/nbd0 --connections 2)" = /dev/nbd0 ]
	vmdiskctl device list
	echo "written by its kernel" | dd of=/dev/nbd0 bs=512 seek=32766 conv=sync,notrunc 2>/dev/null
	vmdiskctl device detach /dev/nbd0
	;;
*lab=tenant*)
	uri=nbd+vsock://2:10809/leased%3FTOKEN
	until nbdinfo --size $uri; do sleep 0.2; done
	if nbdinfo --size nbd+vsock://2:10809/leased; then exit 8; fi
	dd if=/dev/urandom of=/run/new bs=1M count=16 2>/dev/null
	nbdcopy --flush /run/new $uri
	nbdcopy $uri /run/copy
	cmp /run/new /run/copy
	rm /run/new /run/copy
	echo "tenant: has the disk"
	while nbdcopy $uri null:; do :; done
	if nbdinfo --size $uri; then exit 7; fi
	echo "tenant: has lost the disk"
	until nbdinfo --size $uri; do sleep 0.2; done
	echo "tenant: has the disk again"
	sleep 600
	;;
*)
	for name in disk leased other; do
		if nbdinfo --size nbd+vsock://2:10809/$name >/run/out 2>&1; then exit 5; fi
		cat /run/out
		if grep -qi 'no export' /run/out; then exit 6; fi
	done
	;;
esac
`

// TestGuestsReachTheirDisksOverVsock: real guests with their own CIDs, through
// the host's vhost driver: the one that a disk is for reads and writes it and
// sees no other; one that has leased its CID and has a token writes its disk as
// long as the lease is open, and whoever takes the CID after it has nothing; one
// that no disk is for, and processes of the host, are not even greeted.
func TestGuestsReachTheirDisksOverVsock(t *testing.T) {
	t.Parallel()
	Require(t)
	for _, tool := range []string{"nbdinfo", "nbdcopy", "setpriv", "ldd"} {
		if _, err := testenv.Tool(tool); err != nil {
			lacks(t, err)
		}
	}
	kernel := testenv.CloudKernel(t, DefaultKernel)
	ctx, cancel := context.WithTimeout(t.Context(), 2*bootPatience)
	defer cancel()
	dir := testenv.TempDir(t)
	inner, config, outer := filepath.Join(dir, "inner"), filepath.Join(dir, "config"), filepath.Join(dir, "outer")
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(tenantToken)))
	if err := put(dir, "config", []byte(strings.ReplaceAll(nestedConfig, "SUM", sum))); err != nil {
		t.Fatal(err)
	}
	err := guest.Archive{
		Kernel: kernel, Scenario: strings.ReplaceAll(innerScenario, "TOKEN", tenantToken),
		Modules:  []string{"virtio_pci", "vmw_vsock_virtio_transport", "nbd"},
		Programs: []string{"nbdinfo", "nbdcopy"},
		Files:    map[string]string{"usr/bin/vmdiskctl": testenv.Binary(t, "vmdiskctl")},
	}.Write(ctx, inner)
	if err != nil {
		t.Fatal(err)
	}
	err = guest.Archive{
		Kernel: kernel, Scenario: hostScenario,
		Modules: []string{"vsock_loopback", "vhost_vsock", "kvm_amd"},
		Programs: []string{"qemu-system-x86_64", "nbdinfo", "setpriv", "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
			"/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"},
		Files: map[string]string{
			"usr/bin/vmdiskd": testenv.Binary(t, "vmdiskd"), "usr/bin/vmdiskctl": testenv.Binary(t, "vmdiskctl"),
			"vmdiskd.toml": config, "inner.cpio": inner, "vmlinuz": kernel.Image,
		},
	}.Write(ctx, outer)
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := guest.Machine{Kernel: kernel, Initrd: outer, MemoryMiB: 2048}.Command(ctx)
	if err != nil {
		t.Fatal(err)
	}
	console, err := cmd.CombinedOutput()
	if said := clean(console); err != nil || !strings.Contains(said, "\nLAB-RC=0\n") {
		t.Errorf("%v; console:\n%s", err, tail(said))
	}
}
